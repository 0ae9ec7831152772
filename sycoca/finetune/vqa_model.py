"""The networks of visual question answering: one chooses among known answers, one writes the answer token by token.

Both read the question with the text encoder and look at the image with the text decoder. The question's end token, which has
seen all of it, is where the answer begins: a classifier reads the state there, or the first answer token is predicted from it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.data.tokenizer import Tokenizer, pad_rows
from sycoca.distributed import sum_over_ranks, world_size
from sycoca.generation import GenerationConfig, decode
from sycoca.models.decoding import CaptionStep
from sycoca.models.packing import Packing
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.models.text import TextEncoder
from sycoca.models.text_decoder import TextDecoder
from sycoca.models.vocabulary import IGNORED
from sycoca.train.task import precision
from sycoca.types import Batch, ConfigError, Metrics

VQA_PARTS: frozenset[Part] = frozenset({"text", "text_decoder"})


class QuestionBatch(Batch):
    """Questions (`token`, `length`) on images, of which there may be fewer."""

    image_row: Tensor
    """B int64: the row of `image` that each question is about."""
    target: Tensor
    """(B, N) float32: in [0, 1], how right each of the N known answers is."""


class AnswerClassifier(nn.Module):
    """Binary cross-entropy with soft targets, summed over answers, mean over questions (Bottom-Up and Top-Down, section 3.3).

    The decoder's vocabulary is not used; it is frozen, and kept so that the checkpoint still writes captions.
    """

    def __init__(self, model: SyCoCa, head: nn.Module, answers: Sequence[str], *, is_bf16: bool = False):
        super().__init__()
        self.model, self.head, self.answers, self.is_bf16 = model, head, tuple(answers), is_bf16
        text_parts(model)[1].vocabulary.requires_grad_(False)

    def forward(self, batch: QuestionBatch) -> tuple[Tensor, Metrics]:
        """The loss of this rank's questions, and how right the most probable answers are (`score`, in [0, 1])."""
        target_BN = batch["target"]
        with precision(target_BN.device, is_bf16=self.is_bf16, is_recomputed=self.model.config.recompute):
            logit_BN = self.logits(batch["image"], batch["token"], batch["length"], batch["image_row"])
        loss = F.binary_cross_entropy_with_logits(logit_BN, target_BN, reduction="sum") / target_BN.shape[0]
        score = target_BN.gather(1, logit_BN.argmax(1, keepdim=True)).mean()
        return loss, {"loss": loss.detach(), "score": score.detach()}

    def logits(self, image_NCHW: Tensor, token_BL: Tensor, length_B: Tensor, image_row_B: Tensor) -> Tensor:
        """BN float32. Each image is encoded, and made keys and values of, once for all its questions."""
        text, decoder = text_parts(self.model)
        patch_NPD, _ = self.model.vision(image_NCHW)
        token_BLD, _ = text(token_BL, length_B)
        packing = Packing(length_B, token_BL.shape[1], image_row_B)
        state_BLD = packing.pad(decoder.stack(packing.pack(token_BLD), patch_NPD, packing=packing))
        last_B1D = (length_B - 1)[:, None, None].expand(-1, 1, state_BLD.shape[-1])
        return self.head(state_BLD.gather(1, last_B1D)[:, 0], patch_NPD, image_row_B).float()

    @torch.no_grad()
    def answer(self, image_NCHW: Tensor, token_BL: Tensor, length_B: Tensor, image_row_B: Tensor) -> list[str]:
        """The most probable known answers."""
        return [self.answers[place] for place in self.logits(image_NCHW, token_BL, length_B, image_row_B).argmax(1).tolist()]


class AnswerWriter(nn.Module):
    """Cross-entropy of an answer's tokens and its end token after the question, over the answer tokens of all ranks.

    Each time a question is seen, one of its answers is drawn in proportion to how right it is. `max_answer_tokens` counts the
    end token; longer answers lose their end. Questions without a known answer teach nothing.
    """

    answer_NT: Tensor
    answer_length_N: Tensor

    def __init__(
        self, model: SyCoCa, tokenizer: Tokenizer, answers: Sequence[str], *, max_answer_tokens: int, is_bf16: bool = False
    ):
        super().__init__()
        self.model, self.tokenizer, self.answers, self.is_bf16 = model, tokenizer, tuple(answers), is_bf16
        self.generation = GenerationConfig(max_tokens=max_answer_tokens)
        rows = [tokenizer.encode(answer, max_answer_tokens + 1)[1:] for answer in answers]  # without bos
        answer_NT, answer_length_N = pad_rows(rows, max(map(len, rows), default=1), tokenizer.pad)
        self.register_buffer("answer_NT", answer_NT, persistent=False)
        self.register_buffer("answer_length_N", answer_length_N, persistent=False)

    def forward(self, batch: QuestionBatch) -> tuple[Tensor, Metrics]:
        """The loss; its mean over ranks is that of the whole batch."""
        target_BN = batch["target"]
        chosen_B = draw_answers(target_BN)
        length_of_answer_B = self.answer_length_N[chosen_B] * (target_BN.sum(1) > 0)
        token_BL, label_BL = append_answers(batch["token"], batch["length"], self.answer_NT[chosen_B], length_of_answer_B)
        text, decoder = text_parts(self.model)
        with precision(token_BL.device, is_bf16=self.is_bf16, is_recomputed=self.model.config.recompute):
            patch_NPD, _ = self.model.vision(batch["image"])
            token_BLD, _ = text(token_BL, batch["length"] + length_of_answer_B)
            total = decoder(token_BLD, patch_NPD, label_BL, memory_row_B=batch["image_row"])
        loss = total * world_size() / sum_over_ranks((label_BL >= 0).sum()).clamp(min=1)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def answer(self, image_NCHW: Tensor, token_BL: Tensor, length_B: Tensor, image_row_B: Tensor) -> list[str]:
        """What the decoder writes after each question, greedily. Questions of one length are decoded together: no padding
        stands between a question and its answer, and no mask is needed."""
        patch_NPD, _ = self.model.vision(image_NCHW)
        written: dict[int, str] = {}
        for length in length_B.unique().tolist():
            row_N = (length_B == length).nonzero()[:, 0]
            step = CaptionStep(self.model, patch_NPD[image_row_B[row_N]])
            tokens = decode(step, token_BL[row_N, :length], self.generation, eos=self.tokenizer.eos).token_NJT[:, 0]
            written |= zip(row_N.tolist(), map(self.tokenizer.decode, tokens.tolist()), strict=True)
        return [written[row] for row in range(len(written))]


def text_parts(model: SyCoCa) -> tuple[TextEncoder, TextDecoder]:
    """What reads the question, and what looks at the image."""
    assert model.text is not None and model.text_decoder is not None, f"build the model with the parts {sorted(VQA_PARTS)}"
    return model.text, model.text_decoder


def draw_answers(target_BN: Tensor) -> Tensor:
    """B int64: one answer a question with probability in proportion to its target; any where all targets are 0."""
    has_none_B1 = target_BN.sum(1, keepdim=True) <= 0
    return torch.multinomial(target_BN.masked_fill(has_none_B1, 1.0), num_samples=1)[:, 0]


def append_answers(token_BL: Tensor, length_B: Tensor, answer_BT: Tensor, answer_length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Questions followed by their answers, L + T columns, and next-token labels of the answers' tokens only.

    The label at the question's last token is the answer's first token; all else is IGNORED.
    """
    num_columns = answer_BT.shape[1]
    place_BT = length_B[:, None] + torch.arange(num_columns, device=token_BL.device)
    is_real_BT = torch.arange(num_columns, device=token_BL.device) < answer_length_B[:, None]
    whole_BL = F.pad(token_BL, (0, num_columns)).scatter(1, place_BT, answer_BT)
    label_BL = torch.full_like(whole_BL, IGNORED).scatter(1, place_BT - 1, answer_BT.masked_fill(~is_real_BT, IGNORED))
    return whole_BL, label_BL


def check_room(model: SyCoCa, *, num_question_tokens: int, num_answer_tokens: int) -> None:
    """Raises ConfigError where question and answer together are longer than the model's positions."""
    total = num_question_tokens + num_answer_tokens
    if total > model.max_tokens:
        raise ConfigError(
            f"data.max_tokens: questions of {num_question_tokens} tokens"
            + (f" and answers of {num_answer_tokens} (answers.max_tokens)" if num_answer_tokens else "")
            + f" are longer than the {model.max_tokens} tokens that the checkpoint was trained for; lower data.max_tokens"
        )
