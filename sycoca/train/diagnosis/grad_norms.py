"""How hard each objective pulls at what the objectives share: the norm of its weighted gradient over the shared parameters."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sycoca.distributed import mean_over_ranks
from sycoca.log import Tracker, logger
from sycoca.train.engine import name_engine
from sycoca.train.loop import StepReport
from sycoca.train.task import PretrainTask
from sycoca.types import Batch, ConfigError


class GradNormHook:
    """Writes `grad_norm/OBJECTIVE` every so many steps: of the step's batch, at the weights that the step left behind."""

    def __init__(self, every: int, task: PretrainTask, trackers: list[Tracker]):
        self.every, self.task, self.trackers = every, task, trackers

    def __call__(self, report: StepReport) -> None:
        if report.step % self.every or not report.is_finite:
            return
        norms = {name: value.item() for name, value in objective_grad_norms(self.task, report.batch).items()}
        logger.info("gradient norms at step %d: %s", report.step, "  ".join(f"{name} {v:.3g}" for name, v in norms.items()))
        for tracker in self.trackers:
            tracker.write(report.step, {f"grad_norm/{name}": value for name, value in norms.items()})


def check_grad_norms(every: int, task: nn.Module, accelerator: Accelerator) -> None:
    """Raises ConfigError where the gradients of single objectives cannot be had."""
    if every == 0:
        return
    if type(task) is not PretrainTask or len(task.members()) < 2:
        raise ConfigError("run.grad_norms_every: there are not several objectives to compare here; set it to 0")
    engine = name_engine(accelerator)
    if engine.startswith(("ZeRO-3", "FSDP2")):
        raise ConfigError(
            f"run.grad_norms_every: {engine} has no whole weights on a rank, so the gradient of one objective cannot be taken "
            "beside the engine's; launch ZeRO-1, ZeRO-2 or DDP, or set it to 0"
        )


def objective_grad_norms(task: PretrainTask, batch: Batch) -> dict[str, Tensor]:
    """Of every objective, times its weight, over the parameters that more than one objective reaches: 0-d float32 tensors.

    The gradient is that of the whole batch: averaged over ranks, as DDP averages it. Neither the parameters' own gradients nor
    the run's random state are touched. Every rank must call it.
    """
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    device = batch["image"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=True):
        losses = {name: task.weights[name] * result[0] for name, result in task.results(batch).items()}
        found = {
            name: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for name, loss in losses.items()
        }
    num_reached = [sum(grads[place] is not None for grads in found.values()) for place in range(len(parameters))]
    norms = {}
    for name, grads in found.items():
        shared = [grad for grad, num in zip(grads, num_reached, strict=True) if num > 1 and grad is not None]
        whole = mean_over_ranks(torch.cat([grad.flatten().float() for grad in shared]))
        norms[name] = whole.norm()
    return norms
