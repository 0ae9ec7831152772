"""The vocabulary projection, with a cross-entropy that never holds the logits of all tokens at once."""

from typing import Any

import torch
from torch import Tensor, nn

ROWS_A_CHUNK = 512
"""Rows of logits alive at a time: 512 x 49,408 float32 are 101 MB."""


class Vocabulary(nn.Module):
    """Linear map from decoder states to logits."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, state_ND: Tensor, label_N: Tensor | None = None) -> Tensor:
        """Without labels the logits (..., V); with labels the summed cross-entropy in nats, a float32 scalar."""
        if label_N is None:
            return nn.functional.linear(state_ND, self.weight)
        return linear_cross_entropy(state_ND, self.weight, label_N)


def linear_cross_entropy(state_ND: Tensor, weight_VD: Tensor, label_N: Tensor, rows: int = ROWS_A_CHUNK) -> Tensor:
    """Sum over rows of -log softmax(state @ weight.T)[label], gradients made chunk by chunk in the forward pass."""
    return _LinearCrossEntropy.apply(state_ND, weight_VD, label_N, rows)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the sum needs only the chunk's own probabilities, so three matrix products do where a recomputed
    backward needs four."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor, label: Tensor, rows: int) -> Tensor:
        loss = state.new_zeros((), dtype=torch.promote_types(torch.float32, state.dtype))
        grad_state = torch.empty_like(state) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for start in range(0, max(1, state.shape[0]), rows):  # once for no rows too: the weight then has a gradient of 0
            part, target = state[start : start + rows], label[start : start + rows]
            prob = (part @ weight.T).to(loss.dtype)
            chosen = prob.gather(1, target[:, None])
            top = prob.amax(dim=1, keepdim=True)
            prob.sub_(top).exp_()
            total = prob.sum(dim=1, keepdim=True)
            loss += (total.log() + top - chosen).sum()
            prob.div_(total).scatter_add_(1, target[:, None], -torch.ones_like(total))
            prob = prob.to(torch.get_autocast_dtype(part.device.type) if _autocasts(part) else part.dtype)
            if grad_state is not None:
                grad_state[start : start + rows] = prob @ weight.to(prob.dtype)
            if ctx.needs_input_grad[1]:
                grad_part = (prob.T @ part.to(prob.dtype)).to(weight.dtype)
                grad_weight = grad_part if grad_weight is None else grad_weight.add_(grad_part)
        ctx.save_for_backward(grad_state, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_state, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_state is None else grad_state * scale.to(grad_state.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            None,
            None,
        )


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)
