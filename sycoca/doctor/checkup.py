"""The whole check-up, in the order in which a run would meet the faults."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from sycoca.data.pipeline import build_train_loader
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.doctor.budget import TRIAL_PAIRS, check_budget, take_first
from sycoca.doctor.launch_file import Launch, check_launch, read_launch
from sycoca.doctor.masks import check_masks
from sycoca.doctor.overfit import check_overfitting
from sycoca.doctor.report import Check
from sycoca.doctor.settings import check_settings
from sycoca.doctor.shards import check_held_out, check_shards, read_facts
from sycoca.doctor.tokens import check_tokenizer
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.train.engine import build_accelerator
from sycoca.train.loop import to_device
from sycoca.train.pretrain import PretrainConfig, build_task
from sycoca.types import CheckpointError, ConfigError, DataError, TrainingError

_FAULTS = (ConfigError, DataError, CheckpointError, TrainingError)
_NUM_CAPTIONS = 500


@dataclass
class CheckUp:
    """Findings so far, and the numbers behind them; `tell` is called with each finding as it is made."""

    config: PretrainConfig
    tell: Callable[[Check], None]
    launch_file: Path | None = None
    is_all: bool = False

    def __post_init__(self) -> None:
        self.checks: list[Check] = []
        self.figures: dict[str, float] = {}
        self.launch = Launch()
        self.tokenizer: Tokenizer | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong was found so far."""
        return all(check.status != "wrong" for check in self.checks)

    def run(self) -> None:
        """Every check. Building and running the model is left out where something before it is wrong."""
        self._try("settings", lambda: check_settings(self.config))
        if self.launch_file is not None:
            self._try("launch file", self._check_launch)
        self._try("tokenizer", self._build_tokenizer)
        self._try("shards", self._check_data)
        self._try("held-out shards", lambda: [check_held_out(self.config.data, self.config.evaluate)])
        if self.is_sound and self.tokenizer is not None:
            self._try("model", self._check_model)
            self._try("steps", self._check_steps)
        else:
            self._note(Check("model", "warning", "not looked at: mend what is wrong first, then run this again"))

    def _try(self, name: str, look: Callable[[], list[Check]]) -> None:
        """What a run would refuse with one clear line is a finding here."""
        try:
            found = look()
        except _FAULTS as error:
            found = [Check(name, "wrong", str(error))]
        for check in found:
            self._note(check)

    def _note(self, check: Check) -> None:
        self.checks.append(check)
        self.tell(check)

    def _check_launch(self) -> list[Check]:
        assert self.launch_file is not None
        self.launch = read_launch(self.launch_file)[0]
        return check_launch(self.launch_file, self.config)

    def _build_tokenizer(self) -> list[Check]:
        self.tokenizer = build_tokenizer(self.config.data.tokenizer.name)
        return []

    def _check_data(self) -> list[Check]:
        config = self.config
        facts = read_facts(config.data, self.tokenizer, is_all=self.is_all)
        contrasts = [objective for objective in config.objectives.values() if isinstance(objective, ContrastiveConfig)]
        self.figures["num_pairs"] = facts.num_estimated
        masks_duplicates = all(objective.mask_duplicates for objective in contrasts)
        found = check_shards(
            facts, config.data, num_processes=self.launch.num_processes, masks_duplicates=masks_duplicates
        )
        if self.tokenizer is not None:
            captions = list(islice(facts.captions, _NUM_CAPTIONS))
            found += check_tokenizer(self.tokenizer, captions, config.data.max_tokens)
        return found

    def _check_model(self) -> list[Check]:
        """In float32: what leaks shows as a difference that rounding cannot make."""
        assert self.tokenizer is not None
        run = self.config.run.model_copy(update={"precision": "fp32"})
        return check_masks(self._build(self.config.model_copy(update={"run": run})), vocab_size=self.tokenizer.vocab_size)

    def _check_steps(self) -> list[Check]:
        config = self.config
        assert self.tokenizer is not None
        accelerator = build_accelerator(config.optim.clip_norm, batch_size=config.data.batch_size)
        loader = build_train_loader(config.data, self.tokenizer, seed=config.run.seed, rank=0, world_size=1)
        task = self._build(config).to(accelerator.device)
        try:
            found, figures = check_budget(task, loader, config, accelerator, self.launch)
            self.figures |= figures
        except torch.OutOfMemoryError as error:
            mend = "lower data.batch_size, raise optim.num_chunks, or set model.recompute=true"
            return [Check("memory", "wrong", f"{error}; {mend}")]
        num_pairs = max(config.optim.num_chunks, TRIAL_PAIRS // config.optim.num_chunks * config.optim.num_chunks)
        batch = to_device(take_first(next(iter(loader)), num_pairs), accelerator.device)
        fresh = self._build(config).to(accelerator.device)
        return [*found, check_overfitting(fresh, batch, config.optim, accelerator)]

    def _build(self, config: PretrainConfig) -> Any:
        assert self.tokenizer is not None
        set_seed(config.run.seed)
        return build_task(config, self.tokenizer)
