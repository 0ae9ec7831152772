"""Activations that are computed again in the backward pass: the same numbers, and less kept."""

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sycoca.models.activated_linear import ActivatedLinear, keep_less_of_mlps


def build_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_classes=0, **options)
    assert isinstance(vit, VisionTransformer)
    return vit.double()


def gradients(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model(image).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def kept_bytes(model: nn.Module, image: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(image).sum()
    return sum(kept.values())


def test_a_vit_keeps_its_names_its_output_and_its_gradients_and_keeps_less_for_them():
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain, lean = build_vit(), build_vit()
    keep_less_of_mlps(lean)
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert lean(image).equal(plain(image))
    torch.testing.assert_close(gradients(lean, image), gradients(plain, image))
    hidden = 3 * 5 * 48 * 8  # of one block: images, tokens with the class token, hidden width, bytes of a float64
    assert kept_bytes(plain, image) - kept_bytes(lean, image) >= 2 * hidden


def test_nothing_random_is_drawn_in_wrapping():
    linear, before = nn.Linear(1, 1), torch.get_rng_state()
    ActivatedLinear.wrap(linear, nn.GELU())
    assert torch.get_rng_state().equal(before)


def test_mlps_with_dropout_inside_stay_as_they_are():
    vit = build_vit(proj_drop_rate=0.1)
    keep_less_of_mlps(vit)
    assert not any(isinstance(module, ActivatedLinear) for module in vit.modules())


def test_the_activation_follows_the_autocast_of_the_forward_pass():
    layer = ActivatedLinear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    plain = nn.functional.linear(nn.functional.gelu(x.bfloat16()), layer.weight.bfloat16())
    (expected,) = torch.autograd.grad(plain.float().sum(), x)
    assert y.dtype == torch.bfloat16 and x.grad is not None
    torch.testing.assert_close(x.grad, expected, atol=2e-2, rtol=2e-2)
