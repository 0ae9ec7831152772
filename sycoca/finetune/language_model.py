"""A small language model trained on captions alone, for machines that download nothing: it has never seen an image.

GPT-2's architecture with random weights. It learns captions, and captions behind prompts of other captions, so that a frozen-LM
captioner finds a model that knows the format. What it writes is no measure of what a pretrained language model would.
"""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.lm_loading import wrap_lm
from sycoca.captioners.prompt import TEMPLATES, PromptBatch
from sycoca.config import Config
from sycoca.data.caption_texts import read_captions
from sycoca.data.tokenizer import train_prompt_tokenizer
from sycoca.distributed import barrier, rank, sum_over_ranks, world_size
from sycoca.finetune.numbered import Order
from sycoca.finetune.prompted_captions import CaptionTable, PromptedBatches, PromptedConfig, collate_prompted
from sycoca.log import logger
from sycoca.pretrained import find_checkpoint, load_weights
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.task import precision
from sycoca.types import ConfigError, Metrics

CHOOSE_BY = "log_prob"
"""The figure by which the best checkpoint is chosen."""
WORDS = "words"
FOLDER = "lm"
"""In the run's folder: the model and its tokenizer, as transformers saves them."""
NOTE = "trained on captions alone, from random weights; no image and no pretrained language model had a part in it"
STANDING_BEHIND = {
    "perplexity": {"prompted_share": 0.0},
    "perplexity_behind_others": {"prompted_share": 1.0, "same_image_share": 0.0, "own_share": 0.0},
    "perplexity_behind_own": {"prompted_share": 1.0, "same_image_share": 1.0, "own_share": 0.0},
    "perplexity_behind_itself": {"prompted_share": 1.0, "same_image_share": 0.0, "own_share": 1.0},
}
ZERO_3 = 3


class SmallLMConfig(Config):
    """GPT-2's architecture, in small."""

    width: int = Field(default=256, ge=1)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    tokenizer: str = WORDS
    """`words` makes one of the training captions' words; otherwise a transformers tokenizer by name or folder."""


class EvaluateLMConfig(Config):
    """Held-out captions; how probable they are `every` steps and at the end, 0 is never."""

    texts: list[str] = []
    every: int = Field(default=1000, ge=0)
    batch_size: int = Field(default=64, ge=1)
    limit: int = Field(default=1000, ge=1)
    """Captions at most, of all ranks together."""


class TrainLMConfig(TrainConfig):
    """One experiment."""

    lm: SmallLMConfig = SmallLMConfig()
    data: PromptedConfig
    evaluate: EvaluateLMConfig = EvaluateLMConfig()


class LanguageModelTask(nn.Module):
    """Cross-entropy of captions and their ends; a prompt's own tokens are read and not learnt."""

    def __init__(self, lm: CaptionLM, *, is_bf16: bool):
        super().__init__()
        self.lm, self.is_bf16 = lm, is_bf16

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """Nats a token; the mean over ranks is that of the whole batch."""
        total, num_tokens = sum_log_probs(self.lm, batch, is_bf16=self.is_bf16)
        loss = -total * world_size() / sum_over_ranks(num_tokens)
        return loss, {"loss": loss.detach()}


def sum_log_probs(lm: CaptionLM, batch: dict[str, Any], *, is_bf16: bool) -> tuple[Tensor, Tensor]:
    """The captions' log-probability in nats, summed, and their number of tokens."""
    with precision(lm.device, is_bf16=is_bf16):
        prompt = PromptBatch(batch["prompt"], batch["prompt_is_real"])
        log_prob_NT = lm.log_probs(prompt, batch["token"], batch["length"])
    return log_prob_NT.sum(), batch["length"].sum().to(log_prob_NT)


def train_language_model(config: TrainLMConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and the folder that `load_lm` reads."""
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    check(config, accelerator)
    captions = read_captions(config.data.texts, config.data.captions)
    table = CaptionTable(captions)
    logger.info("%d captions of %d images; the language model is %s", len(table), len(captions), NOTE)
    lm = build_small_lm(config, load_tokenizer(config, table.texts, is_main=accelerator.is_main_process))
    task = LanguageModelTask(lm, is_bf16=config.run.is_bf16)
    figures = run_job(config, build_job(config, table, task), accelerator)
    folder = Path(config.run.folder) / FOLDER
    if accelerator.is_main_process:  # the process group has ended: no rank to ask for
        source = find_checkpoint(Path(config.run.folder))
        load_weights(task.cpu(), load_file(source / "model.safetensors"), source=str(source))
        save_lm(lm, folder)
    return {**figures, "lm": str(folder), "note": NOTE}


def check(config: TrainLMConfig, accelerator: Accelerator) -> None:
    """What the parts cannot check alone. Raises ConfigError."""
    if config.run.compile or config.optim.num_chunks > 1 or config.optim.layer_decay != 1:
        raise ConfigError("run.compile, optim.num_chunks and optim.layer_decay: not for a small language model; leave them out")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == ZERO_3:
        raise ConfigError("a small language model needs no ZeRO-3, which cannot save its tied weights; launch ZeRO-1, 2 or DDP")


def load_tokenizer(config: TrainLMConfig, texts: Iterable[str], *, is_main: bool) -> Any:
    """The tokenizer that is named, or one made of these words; the same words make the same one."""
    if config.lm.tokenizer != WORDS:
        return AutoTokenizer.from_pretrained(config.lm.tokenizer)
    folder = Path(config.run.folder) / "tokenizer"
    if is_main:
        templates = [template.fill([""]) for template in (*TEMPLATES.values(), config.data.prompt.find_template())]
        train_prompt_tokenizer([*texts, *templates], folder)
    barrier()
    return AutoTokenizer.from_pretrained(str(folder))


def build_small_lm(config: TrainLMConfig, tokenizer: Any) -> CaptionLM:
    """A model with random weights, all of them to train, with as many places as the longest prompt and caption take."""
    size, data = config.lm, config.data
    if size.width % size.num_heads:
        raise ConfigError(f"lm.num_heads: a width of {size.width} does not divide into {size.num_heads} heads")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=data.prompt.max_tokens + data.max_tokens, n_embd=size.width,
            n_layer=size.num_layers, n_head=size.num_heads, embd_pdrop=size.dropout, attn_pdrop=size.dropout,
            resid_pdrop=size.dropout, pad_token_id=tokenizer.pad_token_id, **special,
        )
    )  # fmt: skip
    lm = wrap_lm(model, tokenizer, source="the small language model")
    model.requires_grad_(True)
    return lm.train()


def build_job(config: TrainLMConfig, table: CaptionTable, task: LanguageModelTask) -> Job:
    """The task with its captions and its evaluation."""
    evaluation = None
    if config.evaluate.texts:
        held_out = CaptionTable(read_captions(config.evaluate.texts, config.data.captions))
        evaluation = Evaluation(partial(measure, config, held_out, task), config.evaluate.every, CHOOSE_BY)

    def load_batches(position: Any) -> Iterable[Any]:
        order = Order(config.run.seed, config.data.batch_size, rank(), world_size())
        return PromptedBatches(table, task.lm, config.data, order, resume=position)

    return Job(task, load_batches, describe=lambda folder: task.lm.tokenizer.save_pretrained(str(folder / "tokenizer")),
               evaluation=evaluation)  # fmt: skip


@torch.no_grad()
def measure(config: TrainLMConfig, table: CaptionTable, task: LanguageModelTask) -> dict[str, float]:
    """Perplexity of held-out captions: plain, and behind captions of other images, others of their own image, and themselves.

    `log_prob` is of those behind others of their own image, in nats a token: a model that reads its prompt does better there.
    """
    was_training = task.training
    task.eval()
    means: dict[str, float] = {}
    for name, shares in STANDING_BEHIND.items():
        captions_only = {**shares, "words": None, "words_share": 0.0}
        means[name] = mean_log_prob(task, table, config.data.model_copy(update=captions_only), config.evaluate)
    task.train(was_training)
    return {name: math.exp(-mean) for name, mean in means.items()} | {CHOOSE_BY: means["perplexity_behind_own"]}


def mean_log_prob(task: LanguageModelTask, table: CaptionTable, data: PromptedConfig, config: EvaluateLMConfig) -> float:
    """Nats a token, of captions spread evenly over the table, on all ranks together."""
    indices = range(0, len(table), max(1, len(table) // config.limit))[rank() : config.limit : world_size()]
    sums_2 = torch.zeros(2, device=task.lm.device)
    for start in range(0, len(indices), config.batch_size):
        part = indices[start : start + config.batch_size]
        batch = collate_prompted(table, part, task.lm, data, generators=[Random(table.keys[index]) for index in part])
        moved = {name: value.to(sums_2.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        sums_2 += torch.stack(sum_log_probs(task.lm, moved, is_bf16=task.is_bf16))
    total, num_tokens = sum_over_ranks(sums_2).tolist()
    return total / num_tokens


def save_lm(lm: CaptionLM, folder: Path) -> None:
    """Model and tokenizer as transformers saves them, with a README that says what the model is not."""
    model: Any = lm.model
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text(f"A small language model, {NOTE}.\n", encoding="utf-8")
