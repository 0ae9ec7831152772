"""CgT-GAN's two players: the policy gradient against the exact one, who learns from what, and what a reward is made of."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sycoca.captioners.cgtgan import CgTGan, CgTGanConfig, Generator
from sycoca.captioners.datastore import build_datastore
from sycoca.captioners.datastore_files import rows_of_texts
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.lm_loading import LMConfig
from sycoca.captioners.score import AggregateScorer, AlignedAggregateScorer, CosineScorer
from sycoca.captioners.text_rows import Row
from sycoca.captioners.transform import EmbeddingTransform, Step, fit_transform
from sycoca.config import parse_config
from sycoca.finetune.corpus import Corpus, CorpusConfig
from sycoca.finetune.corpus_fluency import Unpaired, report_selections
from sycoca.finetune.discriminator import DiscriminatorConfig, build_discriminator
from sycoca.finetune.text_gan import AdversarialTask, PolicyConfig, ReconstructionTask
from sycoca.finetune.text_rewards import AggregateReward, RewardConfig, build_semantic
from sycoca.generation import GenerationConfig
from sycoca.types import ConfigError
from tests.captioners import palette
from tests.captioners.palette import build_lm, build_palette

EMBED_WIDTH = 3
SMALL: dict[str, Any] = {"small": {"width": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0}, "hidden": 6}
ALL_SEMANTIC = {"num_natural_steps": 0, "full_step": 1, "rho": 1.0}


def rate_letters(keys: Any, image_BE: Tensor, candidates: Any) -> Tensor:
    """A reward that anybody can compute: the share of the letter e, and of the letter a."""
    return torch.tensor([[text.count("e") - 0.5 * text.count("a") for text in texts] for texts in candidates])


def build_task(*, std: float = 0.1, rate: Any = rate_letters, reward: dict | None = None, **policy: Any) -> AdversarialTask:
    generator = Generator(build_lm(std=std), EMBED_WIDTH, num_prefix=2)
    palette.shake(generator.prefix)
    discriminator = build_discriminator(parse_config(DiscriminatorConfig, SMALL, source="tests"), generator.lm)
    plan = RewardConfig(semantic="CLIP-cos", **(ALL_SEMANTIC if reward is None else reward))
    return AdversarialTask(generator, discriminator, rate, reward=plan, policy=PolicyConfig(**policy)).train()


def build_batch(num: int = 1) -> dict[str, Any]:
    embedding_BE = torch.randn(num, EMBED_WIDTH, generator=torch.Generator().manual_seed(3))
    keys, texts = [f"k{n}" for n in range(num)], ["a red dog", "the thing is blue"][:num]
    return {"image": 3 * embedding_BE + 1, "embedding": embedding_BE, "key": keys, "text": texts}


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()])


def exact_gradient(generator: Generator, embedding_1E: Tensor, baseline: Literal["greedy", "mean"]) -> Tensor:
    """Of the expected loss -(r - b) mean log p over every caption of at most two tokens, each by its probability."""
    lm = generator.lm
    num_tokens = lm.input_embeddings().shape[0]
    others = [token for token in range(num_tokens) if token != lm.eos]
    rows = [[lm.eos, lm.eos], *([first, second] for first in others for second in range(num_tokens))]
    token_NT, length_N = torch.tensor(rows), torch.tensor([1] + [2] * (len(rows) - 1))
    log_prob_NT = generator.log_probs(embedding_1E.expand(len(rows), -1), token_NT, length_N)
    prob_N = log_prob_NT.sum(1).exp().detach()
    assert prob_N.sum().item() == pytest.approx(1, abs=1e-4), "these are all captions"
    reward_N = rate_letters(None, embedding_1E, [[lm.decode_caption(row) for row in rows]])[0]
    greedy = lm.decode_texts(generator.write(embedding_1E, GenerationConfig(max_tokens=2)))
    base = (prob_N * reward_N).sum() if baseline == "mean" else rate_letters(None, embedding_1E, greedy)[0, 0]
    loss = -(prob_N * (reward_N - base) * log_prob_NT.sum(1) / length_N).sum()
    generator.zero_grad()
    loss.backward()
    return flat_gradient(generator)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["greedy", "mean"])
def test_the_policy_gradient_is_the_exact_one_over_all_captions(baseline: Literal["greedy", "mean"]):
    task = build_task(std=0.3, baseline=baseline, num_samples=6000, max_tokens=2)
    batch = build_batch()
    expected = exact_gradient(task.generator, batch["embedding"], baseline)
    task.generator.zero_grad()
    loss, figures = task(batch)
    loss.backward()
    estimate = flat_gradient(task.generator)
    assert torch.cosine_similarity(estimate, expected, dim=0) > 0.97
    assert estimate.norm() / expected.norm() == pytest.approx(1, abs=0.1)
    assert 0 < figures["ended_share"] < 1


@pytest.mark.parametrize("baseline", ["greedy", "mean"])
def test_a_caption_is_rated_against_the_greedy_one_or_the_mean_of_the_others(baseline: Literal["greedy", "mean"]):
    task, batch = build_task(std=0.3, baseline=baseline, num_samples=3, max_tokens=4), build_batch(2)
    torch.manual_seed(4)
    _, figures = task(batch)
    torch.manual_seed(4)
    drawn, log_prob_BJ = task._draw(batch["embedding"])
    lm = task.generator.lm
    reward_BJ = rate_letters(None, batch["embedding"], lm.decode_texts(drawn))
    greedy = lm.decode_texts(task.generator.write(batch["embedding"], GenerationConfig(max_tokens=4)))
    others = [[(sum(row) - row[j]) / 2 for j in range(3)] for row in reward_BJ.tolist()]
    base_BJ = rate_letters(None, batch["embedding"], greedy) if baseline == "greedy" else torch.tensor(others)
    expected = -((reward_BJ - base_BJ) * log_prob_BJ).mean()
    assert figures["policy_loss"].item() == pytest.approx(expected.item(), abs=1e-5) and abs(expected) > 1e-3
    have_ended = [lm.eos in row for of_image in drawn.token_NJT.tolist() for row in of_image]
    assert figures["ended_share"].item() == pytest.approx(sum(have_ended) / len(have_ended))
    assert reward_BJ.std() > 0.1


@pytest.mark.parametrize("baseline", ["greedy", "mean"])
def test_rewards_read_raw_images_and_the_generator_transformed_ones(baseline: Literal["greedy", "mean"]):
    rated: list[Tensor] = []
    written: list[Tensor] = []
    task = build_task(rate=lambda *args: (rated.append(args[1]), rate_letters(*args))[1], baseline=baseline, num_samples=2)
    task.generator.prefix.register_forward_pre_hook(lambda module, args: written.append(args[0]))
    batch = build_batch(2)
    task(batch)
    assert len(rated) == (2 if baseline == "greedy" else 1) and all(torch.equal(image, batch["image"]) for image in rated)
    assert len(written) >= 2 and all(torch.equal(row_NE.unique(dim=0), batch["embedding"].unique(dim=0)) for row_NE in written)


def test_no_player_learns_from_the_other_s_loss():
    task = build_task(num_samples=3, max_tokens=4)
    _, figures = task(build_batch(2))
    drawn, log_prob_BJ = task._draw(build_batch(2)["embedding"])
    texts = [text for of_image in task.generator.lm.decode_texts(drawn) for text in of_image]
    task.zero_grad()
    log_prob_BJ.mean().backward()
    assert flat_gradient(task.generator).norm() > 0 and flat_gradient(task.discriminator).norm() == 0
    task.zero_grad()
    task._discriminate(["a red dog"], texts)[1].backward()
    assert flat_gradient(task.generator).norm() == 0 and flat_gradient(task.discriminator).norm() > 0
    assert not any(value.requires_grad for value in figures.values())


def test_the_discriminator_learns_who_wrote_what_half_of_it_from_each():
    """Against the cross-entropy by hand; no dropout in this one."""
    task, real, written = build_task(), ["a red dog", "the thing is blue"], ["red", "dog dog red", "a a"]
    figures, loss = task._discriminate(real, written)
    of_real, of_written = (task.discriminator(texts).sigmoid().tolist() for texts in (real, written))
    by_hand = -sum(map(math.log, of_real)) / 4 - sum(math.log(1 - prob) for prob in of_written) / 6
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    assert figures["real_prob"].item() == pytest.approx(sum(of_real) / 2)
    assert figures["written_prob"].item() == pytest.approx(sum(of_written) / 3)


def test_the_initialisation_s_loss_is_nats_a_token():
    task = ReconstructionTask(Generator(build_lm(std=0.3), EMBED_WIDTH, num_prefix=2), is_bf16=False)
    rows = {"token": torch.tensor([[3, 4, 2], [5, 2, 0]]), "length": torch.tensor([3, 2])}
    batch = {"embedding": torch.randn(2, EMBED_WIDTH), **rows}
    log_prob_NT = task.generator.log_probs(batch["embedding"], batch["token"], batch["length"])
    assert task(batch)[0].item() == pytest.approx(-(log_prob_NT[0].sum() + log_prob_NT[1, :2].sum()).item() / 5, abs=1e-6)


def test_the_reward_is_its_terms_by_the_step_s_rho_and_each_is_logged():
    plan = RewardConfig(semantic="CLIP-cos", num_natural_steps=150, full_step=2500, rho=0.5)
    assert [plan.rho_at(step) for step in (1, 150, 1325, 2500, 9999)] == [0, 0, 0.25, 0.5, 0.5]
    reward = {"num_natural_steps": 1, "full_step": 3, "rho": 0.5, "semantic_scale": 10.0}
    task = build_task(reward=reward, num_samples=2, max_tokens=3, baseline="mean")
    for rho in (0.0, 0.25, 0.5, 0.5):
        _, figures = task(build_batch(2))
        found = {name: value.item() for name, value in figures.items()}
        assert found["rho"] == rho
        assert found["reward"] == pytest.approx(rho * 10 * found["semantic"] + (1 - rho) * found["natural"], abs=1e-5)
        assert found["loss"] == pytest.approx(found["policy_loss"] + found["discriminator_loss"], abs=1e-5)
    assert int(task.state_dict()["step"]) == 4, "the schedule is resumed"


def test_an_image_s_target_is_made_once():
    encoder = build_palette()
    rows = rows_of_texts([Row(f"a {colour} dog", "") for colour in palette.COLOURS], encoder)
    scorer = AggregateScorer(encoder, build_datastore(rows, EmbeddingTransform()), temperature=100)
    asked: list[int] = []
    make = scorer.targets
    scorer.targets = lambda image_BE: (asked.append(len(image_BE)), make(image_BE))[1]  # pyright: ignore
    rate, image_BE = AggregateReward(scorer), encoder.encode_image(palette.pixels([0, 1]))
    candidates = [["red", "blue"], ["red", "green"]]
    first = rate(["k0", "k1"], image_BE, candidates)
    torch.testing.assert_close(rate(["k1", "k0"], image_BE.flip(0), candidates[::-1]), first.flip(0))
    assert asked == [2]
    torch.testing.assert_close(first, scorer(image_BE, candidates))
    assert first[0, 0] > first[0, 1] and first[1, 1] > first[1, 0]


def test_the_aggregate_of_an_aligned_space_is_sought_through_the_aligner():
    """The map turns red into green, so a red image wants green texts."""
    encoder = build_palette()
    turn = torch.eye(3)[[1, 2, 0]]
    l2 = EmbeddingTransform([Step("l2")])
    aligner = LinearAligner(turn, l2, l2, encoder.fingerprint, encoder.fingerprint, "hand", 0)
    rows = rows_of_texts([Row(f"a {colour} dog", "") for colour in palette.COLOURS], encoder)
    scorer = AlignedAggregateScorer(encoder, build_datastore(rows, l2), aligner, temperature=100)
    assert scorer(encoder.encode_image(palette.pixels([0])), [["red", "green", "blue"]]).argmax().item() == 1


def test_every_semantic_reward_prefers_the_text_of_the_image(tmp_path: Path):
    encoder = build_palette()
    rows = rows_of_texts([Row(f"a {colour} dog", "") for colour in palette.COLOURS], encoder)
    l2 = EmbeddingTransform([Step("l2")])
    LinearAligner(torch.eye(3), l2, l2, encoder.fingerprint, encoder.fingerprint, "hand", 0).save(tmp_path / "aligner")
    image_BE = encoder.encode_image(palette.pixels([1]))
    for name in ("CLIP-cos", "CLIP-S", "CLIP-agg", "aCLIP-S", "aCLIP-agg"):
        aligner = str(tmp_path / "aligner") if name.startswith("a") else None
        rate = build_semantic(RewardConfig(semantic=name, aligner=aligner), encoder, rows)
        score_BJ = rate(["k1"], image_BE, [["a red dog", "a green dog"]])
        assert score_BJ.shape == (1, 2) and score_BJ[0, 1] > score_BJ[0, 0], name
    cosine = CosineScorer(encoder)(image_BE, [["green"]])
    torch.testing.assert_close(cosine[0], torch.cosine_similarity(image_BE, encoder.encode_text(["green"])))


def test_the_discriminator_reads_a_text_alone_as_among_longer_ones():
    """It judges the mean of the words' states."""
    task = build_task()
    task.discriminator.eval()
    texts = ["a red dog", "the thing is blue the thing is red", ""]
    together = task.discriminator(texts)
    rows = [torch.tensor([task.generator.lm.tokenizer.encode(text)]) for text in texts]
    encoder: Any = task.discriminator.encoder
    alone = [task.discriminator.head(encoder(input_ids=row).last_hidden_state[0].mean(0)) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.unique().numel() == 3


@pytest.mark.slow
def test_text_alone_is_reconstructed_from_its_own_embedding():
    generator = Generator(build_lm(), EMBED_WIDTH, num_prefix=2)
    task, encoder = ReconstructionTask(generator, is_bf16=False), build_palette()
    texts = ["a red dog", "a green cat", "a blue bird"]
    token_NT, length_N = generator.lm.pad_captions([generator.lm.encode_caption(text, max_tokens=8) for text in texts])
    batch = {"embedding": encoder.encode_text(texts), "token": token_NT, "length": length_N}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for _ in range(40):
        loss, _ = task(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    written = generator.write(batch["embedding"], GenerationConfig(max_tokens=6))
    assert [row[0] for row in generator.lm.decode_texts(written)] == texts


@pytest.mark.slow
def test_what_sentences_taught_holds_for_images_that_lie_elsewhere_where_both_are_transformed(tmp_path: Path):
    """No image is read in training, and the encoder has its images far from its texts."""
    store, encoder = palette.embed_images(tmp_path), build_palette()
    contents = CorpusConfig().read(encoder, store)
    moved_NE = 0.2 * store.image_rows(range(len(store))) - 3
    num_right = {}
    for kinds in ((), ("zscore",)):
        torch.manual_seed(0)
        generator = Generator(build_lm(), EMBED_WIDTH, num_prefix=2)
        of_texts = fit_transform(kinds, lambda: [torch.from_numpy(contents.embedding_SE)])
        of_images = fit_transform(kinds, lambda: [moved_NE])
        corpus = Corpus(contents, generator.lm, max_tokens=8, transform=of_texts)
        batch, task = corpus.collate(range(len(corpus)), []), ReconstructionTask(generator, is_bf16=False)
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            task(batch)[0].backward()
            optimizer.step()
        captioner = CgTGan(encoder, generator, CgTGanConfig(lm=LMConfig(name="-"), transform=list(kinds)), of_images)
        captions = [written.caption.split() for written in captioner.write(moved_NE)]
        colours = [palette.colour_of(int(key[1:])) for key in store.keys]
        num_right[kinds] = sum(colour in words for colour, words in zip(colours, captions, strict=True))
    assert num_right["zscore",] == len(store) and num_right[()] <= len(store) / 2


def test_word_pairs_that_nobody_writes_cost_an_unpaired_checkpoint():
    unpaired = Unpaired(rate_letters, ["a red dog", "the red car"])
    assert unpaired.seen_share(["a red car"]) == 1
    assert unpaired.seen_share(["a red red dog"]) == pytest.approx(4 / 5)
    asked: list[str] = []
    unpaired = Unpaired(lambda keys, *rest: (asked.extend(keys), rate_letters(keys, *rest))[1], ["a red dog", "the red car"])
    figures = unpaired.measure(["k0"], torch.zeros(1, 3), ["the the car"])
    assert asked == ["held out/k0"], "no training image of that name is meant"
    assert figures["unpaired"] == pytest.approx(figures["semantic"] * 2 / 4)


def test_settings_that_contradict_each_other_are_refused():
    for tree, message in (
        ({"semantic": "aCLIP-S"}, "aligner belongs to aCLIP-S and aCLIP-agg"),
        ({"semantic": "CLIP-S", "aligner": "x"}, "aligner belongs to"),
        ({"num_natural_steps": 9, "full_step": 9}, "expected more than num_natural_steps = 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(RewardConfig, tree, source="tests")
    with pytest.raises(ConfigError, match="expected either name"):
        parse_config(DiscriminatorConfig, {}, source="tests")
    with pytest.raises(ConfigError, match="set num_samples to 2 or more"):
        parse_config(PolicyConfig, {"baseline": "mean", "num_samples": 1}, source="tests")


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        ([(2, None), (2, 5), (4, None), (4, 9), (6, None), (6, 7)], 4),
        ([(2, None), (2, 5), (4, None), (4, 9), (4, None), (4, 3), (6, 4)], 2),
        ([(2, 5), (4, 9), (1, None), (3, 1)], 3),
        ([(2, None)], None),
        ([], None),
    ],
    ids=["on", "resumed", "from_the_start", "not_evaluated", "no_log"],
)
def test_only_the_run_that_stands_is_chosen_from(tmp_path: Path, steps: list, chosen: int | None):
    """Steps with a figure, or with none for a line of training."""
    lines = [{"step": step, "loss": 1.0} if best is None else {"step": step, "eval/cider": best} for step, best in steps]
    if lines:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report_selections(tmp_path / "log.jsonl", {"paired": "cider"})
    assert found.get("paired", {}).get("step") == chosen
