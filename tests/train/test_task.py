"""The task: gradients do not depend on how the batch is worked off, in one piece or in recomputed chunks."""

import pytest
import torch
from builders import (
    ABLATION_ROWS,
    IC,
    ITC,
    Objectives,
    assert_same_gradients,
    build_batch,
    build_task,
    run_backward,
    vision_options,
)

import sycoca.train.task as task_module
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import SyCoCa
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.task import PretrainTask, needed_parts, split_batch
from sycoca.types import ConfigError

NOISE = {"vision": {"drop_path": 0.3}, "text": {"width": 12, "num_layers": 2, "num_heads": 2, "dropout": 0.3},
         "text_decoder": {"num_layers": 2, "dropout": 0.3}}  # fmt: skip
ALL_RANDOM: Objectives = {
    "itc": ITC,
    "ic": CaptioningConfig(weight=2.0, drop_share=0.5, drop="random"),
    "tg_mim": MaskedImageConfig(mask="random"),
}
DETERMINISTIC = [name for name in ABLATION_ROWS if "random" not in name]


@pytest.mark.parametrize("row", DETERMINISTIC)
@pytest.mark.parametrize("num_chunks", [2, 4])
def test_chunks_give_the_gradients_of_the_whole_batch(row: str, num_chunks: int):
    """Temperature included; captions of unequal length, so a mean of the chunks' means would be wrong."""
    batch = build_batch()
    loss, expected = run_backward(build_task(ABLATION_ROWS[row]), batch)
    chunked_loss, actual = run_backward(build_task(ABLATION_ROWS[row], num_chunks=num_chunks), batch)
    torch.testing.assert_close(chunked_loss, loss)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("num_chunks", [2, 4])
def test_the_temperatures_gradient_is_counted_once(num_chunks: int):
    name = "objectives.itc.log_logit_scale"
    expected = run_backward(build_task({"itc": ITC}), build_batch())[1][name]
    actual = run_backward(build_task({"itc": ITC}, num_chunks=num_chunks), build_batch())[1][name]
    assert expected.abs() > 1e-3
    torch.testing.assert_close(actual, expected)


def keep_activations(function, *args, use_reentrant: bool):
    """What gradient caching must equal: the same chunks and random numbers, with nothing recomputed."""
    return function(*args)


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_recomputed_chunks_replay_dropout_and_random_masks(num_chunks: int, monkeypatch: pytest.MonkeyPatch):
    """Chunks draw other random numbers than the whole batch would; the exact claim is that recomputing draws them again."""
    batch = build_batch()
    loss, actual = run_backward(build_task(ALL_RANDOM, num_chunks=num_chunks, **NOISE), batch)
    monkeypatch.setattr(task_module, "checkpoint", keep_activations)
    expected_loss, expected = run_backward(build_task(ALL_RANDOM, num_chunks=num_chunks, **NOISE), batch)
    assert loss.equal(expected_loss)
    assert_same_gradients(actual, expected, tolerance=1e-6)
    other_loss, _ = run_backward(build_task(ALL_RANDOM, num_chunks=num_chunks, **NOISE), batch, seed=3)
    assert not torch.isclose(loss, other_loss), "the random numbers matter"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_recomputed_chunks_replay_the_masks_around_the_end_of_the_random_steps(step: int, monkeypatch: pytest.MonkeyPatch):
    """The recomputation runs when the step is already counted."""
    relevance = RelevanceConfig(random_until_step=2)

    def run():
        task = build_task(ABLATION_ROWS["sycoca"], num_chunks=2, relevance=relevance)
        task.step.fill_(step)
        return run_backward(task, build_batch())[1]

    actual = run()
    monkeypatch.setattr(task_module, "checkpoint", keep_activations)
    assert_same_gradients(actual, run(), tolerance=1e-6)


def test_recomputing_blocks_replays_dropout():
    batch = build_batch()
    loss, expected = run_backward(build_task(ALL_RANDOM, **NOISE), batch)
    recomputed_loss, actual = run_backward(build_task(ALL_RANDOM, recompute=True, **NOISE), batch)
    assert recomputed_loss.equal(loss)
    assert_same_gradients(actual, expected, tolerance=1e-6)


@pytest.mark.parametrize(("num_chunks", "recompute"), [(2, False), (1, True), (2, True)])
def test_recomputation_works_in_bf16(num_chunks: int, recompute: bool):
    exact, expected = run_backward(build_task(ABLATION_ROWS["sycoca"]), build_batch())
    task = build_task(ABLATION_ROWS["sycoca"], num_chunks=num_chunks, recompute=recompute, is_bf16=True)
    loss, actual = run_backward(task, build_batch())
    torch.testing.assert_close(loss, exact, rtol=5e-2, atol=0)
    whole, error = (torch.cat([x.flatten() for x in grads]) for grads in (
        expected.values(), [actual[name] - grad for name, grad in expected.items()]
    ))  # fmt: skip
    assert error.norm() < 0.2 * whole.norm()


def test_a_batch_that_does_not_divide_into_chunks_is_refused():
    with pytest.raises(ConfigError, match="num_chunks: a batch of 4 does not divide into 3"):
        split_batch(build_batch(), 3)


def test_chunks_are_the_batch_in_order():
    batch = build_batch()
    first, second = split_batch(batch, 2)
    assert torch.cat([first["image"], second["image"]]).equal(batch["image"])
    assert torch.cat([first["token"], second["token"]]).equal(batch["token"])
    assert first["key"] + second["key"] == batch["key"] and second["length"].equal(batch["length"][2:])


def is_scored(task: PretrainTask, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether one call of the task asks the model for relevance."""
    asked = []
    monkeypatch.setattr(task.model, "relevance", lambda *args: asked.append(1) or SyCoCa.relevance(task.model, *args))
    task(build_batch())
    return bool(asked)


def test_scores_are_random_until_the_step_and_true_from_it_on(monkeypatch: pytest.MonkeyPatch):
    task = build_task(ABLATION_ROWS["sycoca"], relevance=RelevanceConfig(random_until_step=2))
    assert [is_scored(task, monkeypatch) for _ in range(4)] == [False, False, True, True]


def test_evaluation_never_scores_at_random_and_counts_no_steps(monkeypatch: pytest.MonkeyPatch):
    task = build_task(ABLATION_ROWS["sycoca"], relevance=RelevanceConfig(random_until_step=2)).eval()
    assert is_scored(task, monkeypatch) and int(task.step) == 0


def test_the_step_is_saved_with_the_weights():
    task = build_task({"itc": ITC})
    task(build_batch())
    assert int(task.state_dict()["step"]) == 1


def test_no_relevance_is_computed_where_nothing_masks_by_it():
    for row, configs in ABLATION_ROWS.items():
        features = build_task(configs).encode(build_batch())
        assert (features.relevance_BP is not None) == (row in ("masked_ic", "mim_attentive", "sycoca"))


def test_the_model_is_built_from_what_its_objectives_need():
    assert needed_parts({"itc": ITC}) == {"text", "contrast"}
    assert needed_parts({"ic": IC}) == {"text", "text_decoder"}
    assert needed_parts(ABLATION_ROWS["sycoca"]) == {"text", "contrast", "text_decoder", "image_decoder", "text_guidance"}


ONLY_IC: Objectives = {"ic": CaptioningConfig(drop_share=0.5)}


@pytest.mark.parametrize(
    ("configs", "relevance", "width", "message"),
    [
        (ONLY_IC, RelevanceConfig(), 8, "'itc' needs an objective"),
        (ONLY_IC, RelevanceConfig(space="encoder", words="tokens"), 8, "found 8 and 12"),
        (ONLY_IC, RelevanceConfig(space="encoder", words="both"), 12, "summary token"),
        ({"mim": MaskedImageConfig(text_guided=False)}, RelevanceConfig(space="encoder"), 12, "nothing reads the caption"),
    ],
    ids=["no_shared_space", "two_widths", "no_summary", "no_text"],
)
def test_a_relevance_that_cannot_be_computed_is_refused_at_the_start(
    configs: Objectives, relevance: RelevanceConfig, width: int, message: str
):
    with pytest.raises(ConfigError, match=message):
        build_task(configs, relevance=relevance, vision=vision_options(embed_dim=width))


def test_captioning_alone_can_mask_by_relevance_in_the_encoders_space():
    relevance = RelevanceConfig(space="encoder", words="tokens")
    task = build_task(ONLY_IC, relevance=relevance, vision=vision_options(embed_dim=12))
    assert run_backward(task, build_batch())[0].isfinite()
