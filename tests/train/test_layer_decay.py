"""Layer-wise decay: every parameter's factor, counted from the output down, reaches the optimiser."""

import pytest
import torch
from builders import ABLATION_ROWS, build_task

from sycoca.train.layer_decay import layer_scales
from sycoca.train.optim import OptimConfig, build_optimizer, set_lr


def test_each_layer_learns_at_the_given_share_of_the_layer_above():
    model = build_task(ABLATION_ROWS["coca"]).model
    scales = {name: layer_scales(model, 0.5).get(parameter, 1.0) for name, parameter in model.named_parameters()}
    expected = {
        "vision.vit.patch_embed.proj.weight": 0.125, "vision.vit.pos_embed": 0.125, "vision.vit.blocks.0.mlp.fc1.weight": 0.25,
        "vision.vit.blocks.1.attn.qkv.bias": 0.5, "vision.vit.norm.weight": 1.0, "image_projection.weight": 1.0,
        "text.embedding.weight": 0.5**5, "text.summary_D": 0.5**5, "text.stack.blocks.0.mlp.fc.weight": 0.5**4,
        "text.stack.blocks.1.mlp.fc.weight": 0.5**3, "text_decoder.stack.blocks.0.mlp.fc.weight": 0.25,
        "text_decoder.stack.blocks.1.mlp.fc.weight": 0.5, "text_decoder.stack.norm.weight": 1.0,
        "text_decoder.vocabulary.weight": 1.0,
    }  # fmt: skip
    assert {name: scales[name] for name in expected} == pytest.approx(expected)


def test_without_a_decoder_the_text_tower_counts_its_own_layers():
    model = build_task(ABLATION_ROWS["itc"]).model
    scales = layer_scales(model, 0.5)
    assert model.text is not None
    assert scales[model.text.embedding.weight] == 0.125
    assert scales[model.text.stack.norm.weight] == 1.0


def test_no_decay_changes_nothing():
    assert layer_scales(build_task(ABLATION_ROWS["itc"]).model, 1.0) == {}


def test_the_optimiser_steps_by_the_scaled_rate():
    """Adam's first step is the learning rate in size, whatever the gradient."""
    task = build_task(ABLATION_ROWS["itc"])
    config = OptimConfig(lr=1e-3, num_steps=10, weight_decay=0.0, eps=1e-12)
    first, last = task.model.vision.vit.blocks[0].mlp.fc1.weight, task.model.vision.vit.blocks[1].mlp.fc1.weight
    before = first.detach().clone(), last.detach().clone()
    optimizer = build_optimizer(task, config, layer_scales(task.model, 0.5))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(task.parameters()))
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, 1e-3)
    optimizer.step()
    torch.testing.assert_close(before[0] - first, torch.full_like(first, 0.25e-3), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(before[1] - last, torch.full_like(last, 0.5e-3), rtol=1e-3, atol=1e-8)
