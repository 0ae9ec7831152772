"""Captioning: its labels by hand, its loss against PyTorch in float64, and what the decoder may see."""

from typing import Literal

import pytest
import torch
from builders import BOS, EOS, NUM_PATCHES, build_batch, build_model
from torch import Tensor
from torch.nn import functional as F

from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import SyCoCa
from sycoca.models.vocabulary import IGNORED
from sycoca.objectives.captioning import CaptioningConfig, next_token_labels
from sycoca.types import Batch, Features

X = IGNORED


def test_labels_of_a_two_token_example():
    """bos cat eos | bos eos pad: the end token is a target, padding and what would follow the end are not."""
    token_BL = torch.tensor([[BOS, 5, EOS], [BOS, EOS, 0]])
    assert next_token_labels(token_BL, torch.tensor([3, 2])).tolist() == [[5, EOS, X], [EOS, X, X]]


def test_id_zero_is_a_target_where_it_is_a_word_and_not_where_it_is_padding():
    """In CLIP's vocabulary 0 is an exclamation mark."""
    token_BL = torch.tensor([[BOS, 0, EOS, 0, 0]])
    assert next_token_labels(token_BL, torch.tensor([3])).tolist() == [[0, EOS, X, X, X]]
    assert CaptioningConfig().build().mass({"token": token_BL, "length": torch.tensor([3])}) == 2


def test_an_end_token_that_pads_is_a_target_once():
    token_BL = torch.tensor([[BOS, 5, EOS, EOS, EOS]])
    assert next_token_labels(token_BL, torch.tensor([3])).tolist() == [[5, EOS, X, X, X]]


def test_a_caption_that_fills_its_row_has_every_target():
    token_BL = torch.tensor([[BOS, 5, 6, EOS]])
    assert next_token_labels(token_BL, torch.tensor([4])).tolist() == [[5, 6, EOS, X]]


def prepare(**changes) -> tuple[SyCoCa, Batch, Features]:
    """Features whose relevance is random."""
    model, batch = build_model(**changes), build_batch()
    features = model.encode(batch)
    score_BP = torch.randn(features.patch_BPD.shape[:2])
    return model, batch, Features(
        features.patch_BPD, features.token_BLD, features.summary_BD, features.image_BE, features.text_BE, score_BP
    )  # fmt: skip


def expected_loss(model: SyCoCa, batch: Batch, token_BLD: Tensor, memory_BMD: Tensor) -> float:
    """The mean over the real targets of all pairs, token by token in float64."""
    logit_BLV = model.text_decoder(token_BLD, memory_BMD).double()
    losses = []
    for b, length in enumerate(batch["length"].tolist()):
        for place in range(length - 1):
            target = int(batch["token"][b, place + 1])
            losses.append(-float(logit_BLV[b, place].log_softmax(-1)[target]))
    return sum(losses) / len(losses)


@torch.no_grad()
def test_the_loss_is_the_mean_over_all_real_tokens():
    model, batch, features = prepare()
    loss, _ = CaptioningConfig().build()(model, batch, features)
    assert float(loss) == pytest.approx(expected_loss(model, batch, features.token_BLD, features.patch_BPD), rel=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("drop", ["bottom", "top"])
@torch.no_grad()
def test_the_decoder_attends_to_the_kept_patches_only(share: float, drop: Literal["top", "bottom"]):
    model, batch, features = prepare()
    num_dropped = round(NUM_PATCHES * share)
    rows = []
    for patch_PD, score_P in zip(features.patch_BPD, features.relevance_BP.tolist(), strict=True):
        order = sorted(range(NUM_PATCHES), key=lambda place: score_P[place], reverse=drop == "top")
        rows.append(patch_PD[sorted(order[num_dropped:])])
    loss, _ = CaptioningConfig(drop_share=share, drop=drop).build()(model, batch, features)
    assert float(loss) == pytest.approx(expected_loss(model, batch, features.token_BLD, torch.stack(rows)), rel=1e-5)


@torch.no_grad()
def test_dropped_patches_cannot_influence_the_loss():
    model, batch, features = prepare()
    objective = CaptioningConfig(drop_share=0.5).build()
    before = objective(model, batch, features)[0]
    is_low_BP = features.relevance_BP.argsort(dim=1).argsort(dim=1) < round(NUM_PATCHES * 0.5)
    features.patch_BPD[is_low_BP] = torch.nan
    assert objective(model, batch, features)[0].equal(before)


@torch.no_grad()
def test_with_a_probability_some_batches_keep_all_patches_and_evaluation_drops_always():
    model, batch, features = prepare()
    whole, dropped = (float(CaptioningConfig(drop_share=s).build()(model, batch, features)[0]) for s in (0.0, 0.5))
    objective = CaptioningConfig(drop_share=0.5, drop_prob=0.25).build()
    torch.manual_seed(0)
    found = [float(objective(model, batch, features)[0]) for _ in range(100)]
    assert set(found) == {whole, dropped}
    assert 15 <= found.count(dropped) <= 35
    assert {float(objective.eval()(model, batch, features)[0]) for _ in range(20)} == {dropped}


@torch.no_grad()
def test_a_random_drop_needs_no_relevance_and_changes_from_call_to_call():
    model, batch, _ = prepare()
    objective = CaptioningConfig(drop_share=0.5, drop="random").build()
    assert not objective.needs_relevance
    losses = {float(objective(model, batch, model.encode(batch))[0]) for _ in range(4)}
    assert len(losses) == 4


def test_only_an_attentive_drop_needs_relevance():
    configs = [CaptioningConfig(), CaptioningConfig(drop_share=0.5), CaptioningConfig(drop="random", drop_share=0.5)]
    assert [config.build().needs_relevance for config in configs] == [False, True, False]


def test_no_gradient_flows_through_the_choice_of_patches():
    model, batch = build_model(), build_batch()
    features = model.encode(batch)
    score_BP = model.relevance(features, batch["length"], RelevanceConfig()).requires_grad_()
    whole = Features(features.patch_BPD, features.token_BLD, None, None, None, score_BP)
    CaptioningConfig(drop_share=0.5).build()(model, batch, whole)[0].backward()
    assert score_BP.grad is None


def test_gradients_equal_those_of_the_plain_cross_entropy():
    model, batch = build_model(), build_batch()
    weight = model.text_decoder.vocabulary.weight
    features = model.encode(batch)
    loss, _ = CaptioningConfig().build()(model, batch, features)
    logit_BLV = model.text_decoder(features.token_BLD, features.patch_BPD)
    label_BL = next_token_labels(batch["token"], batch["length"])
    expected = F.cross_entropy(logit_BLV.flatten(0, 1), label_BL.flatten(), ignore_index=IGNORED)
    wanted = [weight, model.text.embedding.weight, model.vision.vit.patch_embed.proj.weight]
    actual = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, wanted), rtol=1e-4, atol=1e-7)
