"""The vocabulary projection, with a cross-entropy that never holds the logits of all tokens at once."""

from typing import Any

import torch
from torch import Tensor, nn

from sycoca.models.packing import ROUND_ROWS_TO

IGNORED = -100
"""The label of a place that has nothing to predict."""
ROWS_A_CHUNK = 512
"""Rows of logits alive at a time: 512 x 49,408 float32 are 101 MB."""


class Vocabulary(nn.Module):
    """Linear map from decoder states to logits."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.width, self.vocab_size = width, vocab_size  # ZeRO-3 leaves the weight without a shape between its uses
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, state_ND: Tensor, label_N: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Without labels the logits (..., V); with labels the summed cross-entropy in nats, a float32 scalar.

        smoothing: the share of each target that is spread over all V alike (Szegedy et al., arXiv:1512.00567, section 7).
        """
        if label_N is None and state_ND.ndim == 2:
            return (self.weight @ state_ND.T).T  # a few rows, one step of decoding: twice as fast this way round on a CPU
        if label_N is None:
            return nn.functional.linear(state_ND, self.weight)
        return linear_cross_entropy(state_ND, self.weight, label_N, smoothing=smoothing)


def linear_cross_entropy(
    state_ND: Tensor, weight_VD: Tensor, label_N: Tensor, rows: int = ROWS_A_CHUNK, *, smoothing: float = 0.0
) -> Tensor:
    """Sum over rows of -log softmax(state @ weight.T)[label], gradients made chunk by chunk in the forward pass.

    With smoothing s it is the cross-entropy against (1 - s) of the label and s of all V alike.
    """
    return _LinearCrossEntropy.apply(state_ND, weight_VD, label_N, rows, smoothing)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the sum needs only the chunk's own probabilities, so three matrix products do where a recomputed
    backward needs four."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor, label: Tensor, rows: int, smoothing: float) -> Tensor:
        loss = state.new_zeros((), dtype=torch.promote_types(torch.float32, state.dtype))
        num_rows = state.shape[0]
        state, label = _round_up(state), _round_up(label)
        grad_state = torch.empty_like(state) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for start in range(0, state.shape[0], rows):
            part, target = state[start : start + rows], label[start : start + rows]
            num_real = min(max(num_rows - start, 0), rows)
            prob = (part @ weight.T).to(loss.dtype)
            chosen = prob.gather(1, target[:, None])
            if smoothing:
                chosen = (1 - smoothing) * chosen + smoothing * prob.mean(dim=1, keepdim=True)
            top = prob.amax(dim=1, keepdim=True)
            prob.sub_(top).exp_()
            total = prob.sum(dim=1, keepdim=True)
            loss += (total.log() + top - chosen)[:num_real].sum()
            prob.div_(total).scatter_add_(1, target[:, None], torch.full_like(total, smoothing - 1))
            if smoothing:
                prob.sub_(smoothing / prob.shape[1])
            prob[num_real:] = 0
            prob = prob.to(torch.get_autocast_dtype(part.device.type) if _autocasts(part) else part.dtype)
            if grad_state is not None:
                grad_state[start : start + rows] = prob @ weight.to(prob.dtype)
            if ctx.needs_input_grad[1]:
                grad_part = (prob.T @ part.to(prob.dtype)).to(weight.dtype)
                grad_weight = grad_part if grad_weight is None else grad_weight.add_(grad_part)
        ctx.save_for_backward(None if grad_state is None else grad_state[:num_rows], grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_state, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_state is None else grad_state * scale.to(grad_state.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def _round_up(rows_N: Tensor) -> Tensor:
    """The rows followed by zeros, up to a whole multiple of ROUND_ROWS_TO and at least one."""
    num_missing = max(1, -(-rows_N.shape[0] // ROUND_ROWS_TO)) * ROUND_ROWS_TO - rows_N.shape[0]
    return nn.functional.pad(rows_N, (0, 0) * (rows_N.ndim - 1) + (0, num_missing))


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)
