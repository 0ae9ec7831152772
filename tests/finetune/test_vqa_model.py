"""The VQA networks' losses against plain loops over single questions, and what they answer."""

import pytest
import torch
from builders import (
    EOS,
    TEXT_WIDTH,
    VOCAB_SIZE,
    assert_same_gradients,
    build_batch,
    build_model,
    gradients,
    shake,
    take_rows,
)
from builders import MAX_TOKENS as MODEL_TOKENS
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.data.tokenizer import Tokenizer
from sycoca.finetune.head import AnswerHead, build_answer_head, fine_tuning_scales
from sycoca.finetune.vqa_model import (
    VQA_PARTS,
    AnswerClassifier,
    AnswerWriter,
    QuestionBatch,
    append_answers,
    check_room,
    draw_answers,
    text_parts,
)
from sycoca.train.optim import OptimConfig, build_optimizer, set_lr
from sycoca.types import ConfigError

ANSWERS = ("3", "4 5", "6 7 8")
NUM_ANSWERS = len(ANSWERS)
QUESTION_TOKENS, ANSWER_TOKENS = 9, 4
TARGET_BN = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 0.6], [0.0, 0.0, 0.0], [0.9, 0.0, 1.0]])


class NumberTokenizer(Tokenizer):
    """Words are token ids."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE, bos=27, eos=EOS, pad=0)

    def _pieces(self, text: str, limit: int) -> list[int]:
        return [int(word) for word in text.split()][:limit]

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def save(self, folder) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _long_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MODEL_TOKENS < QUESTION_TOKENS + ANSWER_TOKENS
    monkeypatch.setattr("builders.MAX_TOKENS", QUESTION_TOKENS + ANSWER_TOKENS)


def build_questions(target_BN: Tensor = TARGET_BN) -> QuestionBatch:
    batch = build_batch(len(target_BN), num_tokens=QUESTION_TOKENS)
    return QuestionBatch(**batch, target=target_BN, image_row=torch.arange(len(target_BN)))


def about_images(batch: QuestionBatch, image_row: list[int]) -> tuple[QuestionBatch, QuestionBatch]:
    """The questions about these images of the batch: once with a row for each image, once with one for each question."""
    row_B = torch.tensor(image_row)
    shared = QuestionBatch(**{**batch, "image": batch["image"][: row_B.max() + 1], "image_row": row_B})
    return shared, QuestionBatch(**{**batch, "image": batch["image"][row_B]})


def build_classifier() -> AnswerClassifier:
    model = build_model(VQA_PARTS)
    head = build_answer_head(model, NUM_ANSWERS)
    shake(head)
    return AnswerClassifier(model, head, ANSWERS)


def build_writer() -> AnswerWriter:
    return AnswerWriter(build_model(VQA_PARTS), NumberTokenizer(), ANSWERS, max_answer_tokens=ANSWER_TOKENS)


def answer_logits(head: nn.Module, state_D: Tensor, patch_PD: Tensor) -> Tensor:
    """What the head says of one question, number by number."""
    assert isinstance(head, AnswerHead)
    value_PD = head.value(patch_PD)
    largest_D = [max(value_PD[:, d]) for d in range(value_PD.shape[1])]
    asked_D = head.question(state_D)
    return head.classify(torch.stack([state_D[d] + largest_D[d] + largest_D[d] * asked_D[d] for d in range(len(state_D))]))


def test_the_classifier_s_loss_and_gradient_are_those_of_a_loop_over_unpadded_questions():
    network, batch = build_classifier(), build_questions()
    loss, metrics = network(batch)
    loss.backward()
    found = gradients(network)
    network.zero_grad()
    text, decoder = text_parts(network.model)
    total, score = torch.zeros(()), 0.0
    for row, length in enumerate(batch["length"].tolist()):
        patch_BPD, _ = network.model.vision(batch["image"][row : row + 1])
        token_BLD, _ = text(batch["token"][row : row + 1, :length], torch.tensor([length]))
        logit_N = answer_logits(network.head, decoder.stack(token_BLD, patch_BPD)[0, -1], patch_BPD[0])
        for place in range(NUM_ANSWERS):
            prob, target = logit_N[place].sigmoid(), batch["target"][row, place]
            total = total - target * prob.log() - (1 - target) * (1 - prob).log()
        score += float(batch["target"][row, logit_N.argmax()])
    total = total / len(batch["length"])
    total.backward()
    torch.testing.assert_close(loss, total)
    assert_same_gradients(found, gradients(network))
    assert float(metrics["score"]) == pytest.approx(score / len(batch["length"]))


@pytest.mark.parametrize("build", [build_classifier, build_writer])
def test_questions_that_share_an_image_give_the_loss_gradient_and_answers_of_questions_with_their_own(build):
    network = build().double()
    shared, own = about_images(build_questions(torch.eye(NUM_ANSWERS)[[1, 2, 0, 2]]), [0, 1, 1, 2])
    found = []
    for batch in (shared, own):
        batch["image"] = batch["image"].double()
        network.zero_grad()
        loss, _ = network(batch)
        loss.backward()
        found.append((loss, gradients(network), network.answer(*(batch[k] for k in ("image", "token", "length", "image_row")))))
    (loss, grads, answers), (expected_loss, expected_grads, expected_answers) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-12)
    assert answers == expected_answers
    other, _ = about_images(own | {"image_row": torch.arange(4)}, [0, 1, 0, 2])
    assert not torch.equal(network(other)[0], loss)  # and it matters which image


def test_the_unused_vocabulary_is_frozen_and_everything_else_of_the_classifier_learns():
    network = build_classifier()
    network(build_questions())[0].backward()
    gradients(network)  # fails where a trainable parameter has none, which DDP would refuse
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["model.text_decoder.vocabulary.weight"]
    assert "model.text_decoder.vocabulary.weight" in network.state_dict()


def test_a_new_head_gives_every_answer_its_even_share():
    model = build_model(VQA_PARTS)
    head = build_answer_head(model, 500)
    prob_BN = head(torch.randn(6, TEXT_WIDTH), torch.randn(2, 3, model.vision.width), torch.arange(6) // 3).sigmoid()
    torch.testing.assert_close(prob_BN.mean(), torch.tensor(1 / 500), rtol=0.1, atol=0)


def test_the_head_learns_at_its_own_rate_and_lower_layers_more_slowly():
    network, optim = build_classifier(), OptimConfig(lr=0.5, num_steps=10, layer_decay=0.5, head_lr_scale=20.0)
    optimizer = build_optimizer(network, optim, fine_tuning_scales(network.model, network.head, optim))
    set_lr(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in network.head.parameters()} == {10.0}
    assert rates[id(text_parts(network.model)[1].stack.norm.weight)] == 0.5
    first = network.model.vision.vit.blocks[0].get_parameter("norm1.weight")
    assert rates[id(first)] == 0.125


def test_the_writer_s_loss_and_gradient_are_those_of_a_loop_over_unpadded_questions():
    network = build_writer()
    batch = build_questions(torch.eye(NUM_ANSWERS)[[1, 2, 0, 2]])  # one answer each: nothing is drawn
    loss, _ = network(batch)
    loss.backward()
    found = gradients(network)
    network.zero_grad()
    text, decoder = text_parts(network.model)
    total, num_tokens = torch.zeros(()), 0
    for row, (length, chosen) in enumerate(zip(batch["length"].tolist(), [1, 2, 0, 2])):
        answer = [*map(int, ANSWERS[chosen].split()), EOS]
        token_BL = torch.tensor([[*batch["token"][row, :length].tolist(), *answer]])
        patch_BPD, _ = network.model.vision(batch["image"][row : row + 1])
        logit_LV = decoder(text(token_BL, torch.tensor([token_BL.shape[1]]))[0], patch_BPD)[0]
        total = total + F.cross_entropy(logit_LV[length - 1 : -1], torch.tensor(answer), reduction="sum")
        num_tokens += len(answer)
    total = total / num_tokens
    total.backward()
    torch.testing.assert_close(loss, total)
    assert_same_gradients(found, gradients(network))


def test_a_question_without_a_known_answer_teaches_the_writer_nothing():
    network = build_writer()
    target_BN = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    batch = build_questions(target_BN)
    kept = QuestionBatch(**take_rows(batch, [0, 2]), target=target_BN[[0, 2]], image_row=torch.arange(2))
    torch.testing.assert_close(network(batch)[0], network(kept)[0])
    assert network(build_questions(torch.zeros(2, NUM_ANSWERS)))[0].item() == 0.0


def test_answers_are_drawn_in_proportion_to_how_right_they_are():
    assert draw_answers(torch.eye(3)[[2, 0, 1]]).tolist() == [2, 0, 1]
    drawn_B = draw_answers(torch.tensor([[0.9, 0.0, 0.3]]).repeat(4000, 1))
    assert float((drawn_B == 0).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert not (drawn_B == 1).any()


def test_the_answer_s_tokens_are_the_only_targets():
    token_BL = torch.tensor([[27, 5, 28, 0], [27, 5, 6, 28]])
    answer_BT = torch.tensor([[3, 28, 0], [6, 7, 28]])
    whole_BL, label_BL = append_answers(token_BL, torch.tensor([3, 4]), answer_BT, torch.tensor([2, 3]))
    assert whole_BL.tolist() == [[27, 5, 28, 3, 28, 0, 0], [27, 5, 6, 28, 6, 7, 28]]
    assert label_BL.tolist() == [[-100, -100, 3, 28, -100, -100, -100], [-100, -100, -100, 6, 7, 28, -100]]


def test_a_long_answer_loses_its_end_and_never_its_end_token():
    network = AnswerWriter(build_model(VQA_PARTS), NumberTokenizer(), ["3 4 5 6 7", "8"], max_answer_tokens=3)
    assert network.answer_NT.tolist() == [[3, 4, EOS], [8, EOS, 0]]
    assert network.answer_length_N.tolist() == [3, 2]


@pytest.mark.parametrize("build", [build_classifier, build_writer])
def test_answers_in_a_batch_are_those_of_each_question_alone(build):
    network, batch = build(), build_questions(torch.zeros(12, NUM_ANSWERS))
    assert len(set(batch["length"].tolist())) > 2
    if isinstance(network, AnswerClassifier):  # an untrained model tells questions apart a little: only that shall decide
        logit_BN = network.logits(batch["image"], batch["token"], batch["length"], batch["image_row"])
        last = [module for module in network.head.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.bias.data -= logit_BN.mean(dim=0)
    together = network.answer(batch["image"], batch["token"], batch["length"], batch["image_row"])
    alone = []
    for row, length in enumerate(batch["length"].tolist()):
        token_1L, length_1 = batch["token"][row : row + 1, :length], torch.tensor([length])
        alone += network.answer(batch["image"][row : row + 1], token_1L, length_1, torch.tensor([0]))
    assert together == alone
    assert len(set(together)) > 1


def test_written_answers_are_the_uncached_argmax():
    network, batch = build_writer(), build_questions(torch.zeros(4, NUM_ANSWERS))
    text, decoder = text_parts(network.model)
    expected = []
    for row, length in enumerate(batch["length"].tolist()):
        tokens = batch["token"][row, :length].tolist()
        for _ in range(ANSWER_TOKENS):
            token_BL = torch.tensor([tokens])
            patch_BPD, _ = network.model.vision(batch["image"][row : row + 1])
            tokens.append(int(decoder(text(token_BL, torch.tensor([len(tokens)]))[0], patch_BPD)[0, -1].argmax()))
            if tokens[-1] == EOS:
                break
        expected.append(network.tokenizer.decode(tokens[length:]))
    assert network.answer(batch["image"], batch["token"], batch["length"], batch["image_row"]) == expected


def test_a_question_and_an_answer_longer_than_the_model_s_positions_are_refused():
    model = build_model(VQA_PARTS)
    check_room(model, num_question_tokens=QUESTION_TOKENS, num_answer_tokens=ANSWER_TOKENS)
    with pytest.raises(ConfigError, match=r"data\.max_tokens.*9 tokens and answers of 5"):
        check_room(model, num_question_tokens=QUESTION_TOKENS, num_answer_tokens=ANSWER_TOKENS + 1)
