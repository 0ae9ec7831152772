"""Whether the model learns at all: a few pairs, again and again."""

from itertools import repeat

from accelerate import Accelerator

from sycoca.doctor.report import Check
from sycoca.train.loop import StepReport, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.train.task import PretrainTask
from sycoca.types import Batch

NUM_STEPS = 40
FALL_SHARE = 0.15
"""Share of the first loss that must be gone in the end."""
_NUM_LAST = 5


def check_overfitting(task: PretrainTask, batch: Batch, optim: OptimConfig, accelerator: Accelerator) -> Check:
    """Trains `task` on one small batch at the experiment's peak learning rate."""
    plan = optim.model_copy(update={"num_steps": NUM_STEPS, "warmup_steps": NUM_STEPS // 10, "final_lr_share": 1.0})
    losses: list[float] = []

    def note(report: StepReport) -> None:
        losses.append(report.metrics["loss"].item())

    optimizer = build_optimizer(task, plan)
    train(task, repeat(batch), optimizer, accelerator=accelerator, plan=plan, state=TrainState(), hooks=[note])
    last = sum(losses[-_NUM_LAST:]) / _NUM_LAST
    says = f"the loss of {len(batch['key'])} pairs goes from {losses[0]:.3f} to {last:.3f} in {NUM_STEPS} steps"
    says += f" at optim.lr = {optim.lr:g}"
    if last <= (1 - FALL_SHARE) * losses[0]:
        return Check("overfitting", "ok", says)
    return Check(
        "overfitting", "wrong", f"{says}, a fall of less than {FALL_SHARE:.0%}: nothing is learned; look at optim.lr (too low, "
        "or far too high?), model.locked and the objectives' weights"
    )  # fmt: skip
