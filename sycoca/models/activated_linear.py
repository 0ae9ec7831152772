"""A linear layer behind an activation that keeps one large tensor for the backward pass instead of two."""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ActivatedLinear(nn.Linear):
    """linear(activation(x)). The activation is computed again in the backward pass, an element-wise pass over it, since what it
    gives is as large as x, and with the hidden width of an MLP a quarter of all that a transformer block would keep."""

    def __init__(self, in_features: int, out_features: int, activation: nn.Module | None = None):
        super().__init__(in_features, out_features)
        self.activation = activation or nn.GELU()

    @classmethod
    def wrap(cls, linear: nn.Linear, activation: nn.Module) -> "ActivatedLinear":
        """The same parameters under the same names."""
        with torch.device("meta"):  # no random number is drawn
            found = cls(linear.in_features, linear.out_features, activation)
        found.weight, found.bias = linear.weight, linear.bias
        return found

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return checkpoint(self._run, input, use_reentrant=False, preserve_rng_state=False, determinism_check="none")  # pyright: ignore
        return self._run(input)

    def _run(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(x), self.weight, self.bias)


def keep_less_of_mlps(vit: VisionTransformer) -> None:
    """Let the MLPs of a timm ViT keep one hidden tensor instead of two; not where it is gated or has dropout inside."""
    for block in vit.blocks:
        mlp = getattr(block, "mlp", None)
        if type(mlp) is Mlp and isinstance(mlp.fc2, nn.Linear) and isinstance(mlp.norm, nn.Identity) and not mlp.drop1.p:
            mlp.fc2 = ActivatedLinear.wrap(mlp.fc2, mlp.act)
            mlp.act = nn.Identity()
