"""The learning rate by hand, and which parameters decay."""

import math

import pytest
import torch
from builders import ABLATION_ROWS, build_batch, build_task, run_backward, vision_options

from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.optim import OptimConfig, build_optimizer, group_parameters, set_lr

PLAN = OptimConfig(lr=0.8, num_steps=10, warmup_steps=4, final_lr_share=0.25)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.2), (1, 0.4), (3, 0.8), (4, 0.8), (7, 0.8 * (0.25 + 0.75 / 2)),
        (5, 0.8 * (0.25 + 0.75 * (1 + math.cos(math.pi / 6)) / 2)), (10, 0.2), (1000, 0.2),
    ],
)  # fmt: skip
def test_the_rate_rises_to_its_peak_and_falls_by_a_cosine(step: int, lr: float):
    assert PLAN.lr_at(step) == pytest.approx(lr)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert OptimConfig(lr=0.8, num_steps=10, warmup_steps=0).lr_at(0) == 0.8


def test_a_run_of_warm_up_only_has_no_division_by_zero():
    plan = OptimConfig(lr=0.8, num_steps=4, warmup_steps=4)
    assert [plan.lr_at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


EVERYTHING = ABLATION_ROWS["sycoca"] | {"mask_tokens": MaskedImageConfig(encode="mask_tokens")}


@pytest.mark.parametrize("configs", [*ABLATION_ROWS.values(), EVERYTHING], ids=[*ABLATION_ROWS, "everything"])
def test_every_trainable_parameter_is_in_one_group_once(configs: dict):
    task = build_task(configs, pool="attention", locked=["vision"] if "mim_random" in configs else [])
    grouped = [parameter for group in group_parameters(task, 0.2) for parameter in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in task.parameters() if p.requires_grad}


def test_locked_parameters_are_left_out():
    task = build_task(ABLATION_ROWS["sycoca"], locked=["vision"])
    grouped = {id(p) for group in group_parameters(task, 0.2) for p in group["params"]}
    assert not grouped & {id(p) for p in task.model.vision.parameters()}


def test_matrices_decay_and_nothing_else():
    options = vision_options(reg_tokens=2, init_values=0.1)
    task = build_task(EVERYTHING, pool="attention", vision=options)
    decay = {id(p): group["weight_decay"] for group in group_parameters(task, 0.2) for p in group["params"]}
    matrices = (
        ".qkv.weight", ".out.weight", ".fc.weight", ".fc1.weight", ".fc2.weight", ".proj.weight", ".query.weight",
        ".key_value.weight", "_projection.weight", ".embed.weight", ".embed_caption.weight", ".to_pixels.weight",
        ".vocabulary.weight",
    )  # fmt: skip
    for name, parameter in task.named_parameters():
        assert decay[id(parameter)] == (0.2 if name.endswith(matrices) else 0.0), name
    names = {name for name, _ in task.named_parameters()}
    plain = (
        "text.summary_D", "text.embedding.weight", "text.position.weight", "vision.vit.cls_token", "vision.vit.reg_token",
        "vision.vit.pos_embed", "image_decoder.position_PD", "image_pool.query_QD",
    )  # fmt: skip
    assert {f"model.{name}" for name in plain} <= names
    assert "objectives.itc.log_logit_scale" in names


def test_a_first_step_is_that_of_adamw_with_each_groups_decay():
    """Loshchilov and Hutter, algorithm 2, at step 1: both moments are unbiased, so the update is g / (|g| + eps)."""
    config = OptimConfig(lr=0.01, num_steps=10, weight_decay=0.3)
    task = build_task(ABLATION_ROWS["sycoca"])
    optimizer = build_optimizer(task, config)
    before = {name: p.detach().double() for name, p in task.named_parameters()}
    decay = {id(p): group["weight_decay"] for group in group_parameters(task, 0.3) for p in group["params"]}
    _, grads = run_backward(task, build_batch())
    optimizer.step()
    for name, parameter in task.named_parameters():
        grad = grads[name].double()
        expected = before[name] * (1 - 0.01 * decay[id(parameter)]) - 0.01 * grad / (grad.abs() + config.eps)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_rate_reaches_every_group():
    optimizer = build_optimizer(build_task(ABLATION_ROWS["sycoca"]), PLAN)
    set_lr(optimizer, 0.123)
    assert len(optimizer.param_groups) == 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.123] * 3
