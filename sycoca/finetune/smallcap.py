"""Fits SmallCap: cross-entropy of training captions, behind captions of similar images and with patch states to look at.

Everything but the cross-attention adapters is frozen. Retrieval uses stored embeddings, once for all images; patch states come
from the store too, or are encoded at every step.
"""

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from sycoca.captioners.captioner import write_fit
from sycoca.captioners.embeddings import EmbeddingStore, Reading
from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.captioners.lm import Condition
from sycoca.captioners.patches import EncodedPatches, PatchSource, StoredPatches, store_patches
from sycoca.captioners.prompt import PromptBatch, PromptConfig, arrange_items, encode_prompt, pad_prompts
from sycoca.captioners.smallcap import SmallCap, SmallCapConfig, build_smallcap
from sycoca.config import Config
from sycoca.distributed import gather_uneven_rows, rank, sum_over_ranks, world_size
from sycoca.evaluation.ptb_tokenizer import tokenize_caption
from sycoca.finetune.closed_form import PairsConfig
from sycoca.finetune.numbered import NumberedBatches, Order
from sycoca.finetune.stored_captioning import CHOOSE_BY, EvaluateStoredConfig, StoredImages, open_held_out
from sycoca.log import logger
from sycoca.pretrained import find_checkpoint, load_weights
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.task import precision
from sycoca.types import ConfigError, Metrics

SEARCH_ROWS = 1024
"""Images that are retrieved for at a time."""


class SmallCapDataConfig(Config):
    """How training captions become batches."""

    batch_size: int = Field(default=64, ge=1)
    """Captions a process and step."""
    max_tokens: int = Field(default=26, ge=2)
    """Of a caption, its end counted; a longer one loses its last words."""
    pool: int | None = Field(default=None, ge=1)
    """Draws the prompt's captions from so many of the best, anew each time, so that the model does not learn to copy what most
    of them have (arXiv:2406.02265); null takes the best."""
    excludes_own: bool = True
    """False leaves an image's own captions in its prompt: a control, that must copy."""
    patches: bool = True
    """Whether patch states are kept beside the embeddings, in float16; false encodes images of `pairs.shards` at every step."""


class EvaluateSmallCapConfig(EvaluateStoredConfig):
    """As any captioner's, and the control that patch states are read at all."""

    blank_patches: bool = False
    """Measures also with patch states of zeros, as `blank/CIDEr` and so on: the score must drop."""


class SmallCapFit(TrainConfig):
    """One experiment; `run.folder` is also the captioner's."""

    encoder: str
    """As `load_encoder` takes it."""
    pairs: PairsConfig
    captioner: SmallCapConfig
    data: SmallCapDataConfig = SmallCapDataConfig()
    evaluate: EvaluateSmallCapConfig = EvaluateSmallCapConfig()


class SmallCapTask(nn.Module):
    """Cross-entropy of captions and their ends. The adapters are its only parameters, so checkpoints hold nothing else."""

    def __init__(self, captioner: SmallCap, *, is_bf16: bool):
        super().__init__()
        self.adapters = captioner.adapters
        # its method and not the language model, which would be a part of this module
        self._log_probs, self._device, self._is_bf16 = captioner.lm.log_probs, captioner.lm.device, is_bf16

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """Nats a token; the mean over ranks is that of the whole batch."""
        prompt, memory = PromptBatch(batch["prompt"], batch["prompt_is_real"]), Condition(memory_NMF=batch["memory"])
        with precision(self._device, is_bf16=self._is_bf16):
            log_prob_NT = self._log_probs(prompt, batch["token"], batch["length"], memory)
        num_tokens = batch["length"].sum().to(log_prob_NT)
        loss = -log_prob_NT.sum() * world_size() / sum_over_ranks(num_tokens)
        return loss, {"loss": loss.detach()}


class SmallCapTable:
    """Training captions by number, with their image and what was retrieved for it."""

    def __init__(self, captioner: SmallCap, train: EmbeddingStore, config: SmallCapDataConfig):
        self.captioner, self.store, self._config = captioner, train, config
        self.image_keys, self.texts, self.image_of_text = train.keys, [], []
        start = 0
        for block in train.blocks():
            self.texts += block.texts
            self.image_of_text += (block.image_of_text_N + start).tolist()
            start += len(block.keys)
        self.keys = [f"{self.image_keys[image]}/{number}" for number, image in enumerate(self.image_of_text)]
        self.prompt: PromptConfig = captioner.config.prompt
        if config.pool is not None:
            self.prompt = PromptConfig(**{**self.prompt.model_dump(), "order": "sample", "pool": config.pool})
        self._found_NK = self._search(train, config.pool or self.prompt.num_items)

    def retrieved(self, index: int) -> list[str]:
        """What was found for a caption's image, best first."""
        return self.captioner.retriever.datastore.texts(self._found_NK[self.image_of_text[index]][None])[0]

    def collate(self, patches: PatchSource, indices: Sequence[int], generators: Sequence[Random]) -> dict[str, Any]:
        """`prompt` and `prompt_is_real` (NL, padded on the left), `token` (NT), `length`, `memory` (NMF), `key`."""
        lm, config = self.captioner.lm, self._config
        prompts = [
            encode_prompt(arrange_items(self.retrieved(index), self.prompt, generator), self.prompt, lm.encode_prompt)
            for index, generator in zip(indices, generators, strict=True)
        ]
        batch = pad_prompts(prompts, lm.pad)
        token_NT, length_N = lm.pad_captions([lm.encode_caption(self.texts[i], max_tokens=config.max_tokens) for i in indices])
        memory_NMF = patches([self.image_keys[self.image_of_text[index]] for index in indices])
        caption = {"token": token_NT, "length": length_N, "key": [self.keys[index] for index in indices]}
        return {"prompt": batch.token_NL, "prompt_is_real": batch.is_real_NL, "memory": memory_NMF, **caption}

    def _search(self, train: EmbeddingStore, num: int) -> Tensor:
        """NK int32 for all images; ranks share them in blocks."""
        size = -(-len(train) // world_size())
        own = range(len(train))[rank() * size : (rank() + 1) * size]
        found = [torch.zeros((0, num), dtype=torch.int64)]
        for start in range(0, len(own), SEARCH_ROWS):
            rows = own[start : start + SEARCH_ROWS]
            keys = [train.keys[row] for row in rows]
            excludes_own = self._config.excludes_own
            found.append(self.captioner.retriever.search(train.image_rows(rows), keys, num=num, excludes_own=excludes_own))
        device = self.captioner.lm.device
        return gather_uneven_rows(torch.cat(found).to(device)).cpu()


def fit_smallcap(config: SmallCapFit) -> dict[str, Any]:
    """Train the adapters on all ranks and save the captioner. Raises ConfigError, DataError, CheckpointError."""
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    check(config, accelerator)
    encoder, lm = load_encoder(config.encoder, accelerator.device), config.captioner.lm.load(accelerator.device)
    train = config.pairs.open(encoder)
    captioner = build_smallcap(encoder, lm, train, config.captioner)
    num_trained = sum(parameter.numel() for parameter in captioner.adapters.parameters())
    num_rows = len(captioner.retriever.datastore)
    logger.info("smallcap: %.2f M parameters train, %d captions in the datastore", num_trained / 1e6, num_rows)
    task = SmallCapTask(captioner, is_bf16=config.run.is_bf16)
    images = open_held_out(config.pairs, config.evaluate, encoder)
    job = build_job(config, task, SmallCapTable(captioner, train, config.data), images)
    started = time.perf_counter()
    figures = run_job(config, job, accelerator)
    seconds = time.perf_counter() - started - (images.seconds if images is not None else 0.0)
    if accelerator.is_main_process:  # the process group has ended: no rank to ask for
        source = find_checkpoint(Path(config.run.folder))
        load_weights(task.cpu(), load_file(source / "model.safetensors"), source=str(source))
        captioner.save(Path(config.run.folder))
        write_fit(Path(config.run.folder), {"fit_seconds": seconds, "num_trained": num_trained})
    return {"captioner": config.run.folder, "fit_seconds": seconds, "num_trained": num_trained, **figures}


def check(config: SmallCapFit, accelerator: Accelerator) -> None:
    """What the parts cannot check alone. Raises ConfigError."""
    if config.run.compile or config.optim.num_chunks > 1 or config.optim.layer_decay != 1 or config.run.grad_norms_every:
        raise ConfigError("leave out run.compile, run.grad_norms_every, optim.num_chunks, optim.layer_decay: not for SmallCap")
    if config.data.pool is not None and config.data.pool < config.captioner.prompt.num_items:
        raise ConfigError(f"data.pool is {config.data.pool}, fewer than captioner.prompt.num_items; raise it, or leave it out")
    if not config.data.patches and not config.pairs.shards:
        raise ConfigError("data.patches: false encodes images at every step; name their shards in pairs.shards")
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage > 2):
        raise ConfigError("SmallCap's few weights are not to be split: launch one process, DDP, or ZeRO-1 or 2")


def build_job(config: SmallCapFit, task: SmallCapTask, table: SmallCapTable, images: StoredImages | None) -> Job:
    """The task with its captions and its evaluation."""
    captioner = table.captioner
    patches = open_patches(config, captioner.encoder, table.store, config.pairs.shards)
    evaluation = None
    if images is not None:
        seen = open_patches(config, captioner.encoder, images.store, config.pairs.held_out_shards)
        evaluation = Evaluation(partial(measure, config, captioner, images, seen), config.evaluate.every, CHOOSE_BY)

    def load_batches(position: Any) -> Iterable[Any]:
        order = Order(config.run.seed, config.data.batch_size, rank(), world_size())
        return NumberedBatches(table.keys, partial(table.collate, patches), order, resume=position)

    return Job(task, load_batches, describe=lambda folder: None, evaluation=evaluation)


def open_patches(config: SmallCapFit, encoder: FrozenEncoder, store: EmbeddingStore, shards: list[str]) -> PatchSource:
    """The split's patch states, made first where they are to be kept and are not there. Raises DataError."""
    if not config.data.patches:
        return EncodedPatches(encoder, shards)
    num = store_patches(encoder, store, Reading(shards, store.split, config.pairs.batch_size, config.pairs.num_workers))
    logger.info("patch states of the split %s: %d parts made", store.split, num)
    return StoredPatches(store)


def measure(config: SmallCapFit, captioner: SmallCap, images: StoredImages, patches: PatchSource) -> dict[str, float]:
    """The scores of the captioner as it stands, and `blank/` those without patch states where they are asked for."""
    was_training = captioner.adapters.training
    captioner.adapters.eval()
    figures = measure_with(config, captioner, images, patches)
    if config.evaluate.blank_patches:
        blank = measure_with(config, captioner, images, lambda keys: torch.zeros_like(patches(keys)))
        figures |= {f"blank/{name}": value for name, value in blank.items()}
    captioner.adapters.train(was_training)
    return figures


def measure_with(config: SmallCapFit, captioner: SmallCap, images: StoredImages, patches: PatchSource) -> dict[str, float]:
    """The scores, with these patch states; `copied_share` of the captions stood in their own prompt, word by word."""
    is_copied: list[bool] = []

    def write(row_N: Tensor, keys: Sequence[str]) -> list[str]:
        with precision(captioner.lm.device, is_bf16=config.run.is_bf16):
            written = captioner.write(images.store.image_rows(row_N.tolist()), patches(keys), keys)
        is_copied.extend(tokenize_caption(one.caption) in map(tokenize_caption, one.retrieved) for one in written)
        return [one.caption for one in written]

    figures, _ = images.measure(write)
    num_copied = sum_over_ranks(torch.tensor(float(sum(is_copied)), device=captioner.lm.device)).item()
    return {**figures, "copied_share": num_copied / figures["num_images"]}
