"""The experiment's own numbers against each other."""

import torch

from sycoca.doctor.report import Check
from sycoca.train.pretrain import PretrainConfig, check
from sycoca.types import ConfigError


def check_settings(config: PretrainConfig) -> list[Check]:
    """What can be seen without reading data or building a model."""
    try:
        check(config)
    except ConfigError as error:
        return [Check("settings", "wrong", str(error))]
    wrong, warnings = [], []
    optim, run = config.optim, config.run
    if config.data.batch_size % optim.num_chunks:
        wrong.append(
            f"optim.num_chunks: a batch of {config.data.batch_size} does not divide into {optim.num_chunks} chunks; change one"
        )
    if all(objective.weight == 0 for objective in config.objectives.values()):
        wrong.append("objectives: every weight is 0, so nothing is learned; set one above 0")
    if optim.warmup_steps >= optim.num_steps:
        warnings.append(f"optim.warmup_steps = {optim.warmup_steps} is not below optim.num_steps = {optim.num_steps}: lower it")
    if optim.clip_norm <= 0:
        wrong.append(f"optim.clip_norm = {optim.clip_norm:g} leaves nothing of the gradient; 1.0 is usual")
    if not 0 < run.checkpoint_every < optim.num_steps:
        warnings.append(f"run.checkpoint_every = {run.checkpoint_every}: nothing is saved before the end; lower it")
    if run.is_bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.append("run.precision: this GPU has no bf16 of its own; fp32 is safer and may be faster")
    found = [Check("settings", "wrong", says) for says in wrong] + [Check("settings", "warning", says) for says in warnings]
    return found or [Check("settings", "ok", "the experiment's numbers go together")]
