"""InfoNCE whose memory grows with the global batch and not with its square: a few rows of similarities at a time.

Whole, B rows against G columns are several times B G numbers; here they are `rows` G, and G times E for features.
"""

from typing import Any

import torch
from torch import Tensor

from sycoca.distributed import rank

Names = tuple[Tensor, Tensor]
"""Of pairs, by which duplicates are found: this rank's (B2) and all ranks' (G2)."""


def chunked_info_nce(
    row_BE: Tensor, column_GE: Tensor, scale: Tensor, *, rows: int, names: Names | None
) -> tuple[Tensor, Tensor]:
    """One direction of the loss: mean cross-entropy of scale * row @ column.T, and the share of rows whose best is right.

    This rank's rows are columns rank * B and on. With names, columns that share a name with the row are no negatives.
    """
    loss, num_right = _ChunkedInfoNce.apply(row_BE, column_GE, scale, rows, names)  # pyright: ignore
    return loss / row_BE.shape[0], num_right / row_BE.shape[0]


def is_same_name(name_B2: Tensor, name_G2: Tensor) -> Tensor:
    """BG: True where any of a pair's names is the other's."""
    return (name_B2[:, None] == name_G2[None]).any(dim=-1)


class _ChunkedInfoNce(torch.autograd.Function):
    """Makes the gradients in the forward pass, chunk by chunk: a row's gradient needs its own probabilities only, so three
    matrix products do where recomputing in the backward pass needs four."""

    @staticmethod
    def forward(
        ctx: Any, row_BE: Tensor, column_GE: Tensor, scale: Tensor, rows: int, names: Names | None
    ) -> tuple[Tensor, Tensor]:
        num_rows = row_BE.shape[0]
        has_gradient = any(ctx.needs_input_grad)
        grad_row, grad_column = (torch.zeros_like(x) if has_gradient else None for x in (row_BE, column_GE))
        grad_scale, loss, num_right = row_BE.new_zeros(()), row_BE.new_zeros(()), scale.new_zeros((), dtype=torch.float32)
        for start in range(0, num_rows, rows):
            part = row_BE[start : start + rows]
            target = torch.arange(len(part), device=part.device) + rank() * num_rows + start
            is_same = None if names is None else is_same_name(names[0][start : start + rows], names[1])
            part_loss, hits, slope = _cross_entropy((scale * part) @ column_GE.T, target, is_same)
            loss += part_loss
            num_right += hits
            if grad_row is not None and grad_column is not None:
                pull = slope @ column_GE
                grad_row[start : start + rows] = scale * pull
                grad_scale += (pull * part).sum()
                grad_column.addmm_(slope.T, (scale * part).to(grad_column.dtype))
        ctx.save_for_backward(grad_row, grad_column, grad_scale.to(scale.dtype))
        ctx.mark_non_differentiable(num_right)
        return loss, num_right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(grads[0].to(own.dtype) * own for own in ctx.saved_tensors), None, None


def _cross_entropy(logit: Tensor, target: Tensor, is_same: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows, number of rows whose best is right, and the sum's gradient by the logits, made in their place."""
    if is_same is not None:
        logit.masked_fill_(is_same.scatter_(1, target[:, None], False), -torch.inf)
    num_right = (logit.argmax(dim=1) == target).sum()
    right = logit.gather(1, target[:, None])
    top = logit.amax(dim=1, keepdim=True)
    slope = logit.sub_(top).exp_()
    total = slope.sum(dim=1, keepdim=True)
    loss = (total.log() + top - right).sum()
    slope.div_(total).scatter_add_(1, target[:, None], torch.full_like(total, -1.0))
    return loss, num_right, slope
