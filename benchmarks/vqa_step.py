"""Training questions a second with an image encoded once for all its questions, against once for each of them.

    python benchmarks/vqa_step.py [--questions-per-image 5] [--batch-size 20] [--patch-size 16]

Forward and backward pass of AnswerClassifier on the same questions and images, 12 tokens a question, a ViT-S with 6 + 6 text
layers of width 384 and VQA v2's 3,129 answers, random weights. Both sides must give the same loss. They alternate in one
process after a warm-up; the ratio is the median over rounds of shared / own. The table goes to standard error; the last line
of standard output is JSON.
"""

import argparse
import json
from argparse import Namespace

import torch
from decoding import IMAGE_SIZE, MAX_TOKENS, build_config, compare
from torch import Tensor

from sycoca.data.tokenizer import build_tokenizer
from sycoca.finetune.head import build_answer_head
from sycoca.finetune.vqa_model import VQA_PARTS, AnswerClassifier, QuestionBatch
from sycoca.models.sycoca import SyCoCa

NUM_ANSWERS, QUESTION_TOKENS = 3129, 12


def main() -> None:
    args = _parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = build_config(args.patch_size, args.image_size)
    model = SyCoCa(config, vocab_size=build_tokenizer("clip").vocab_size, max_tokens=MAX_TOKENS, parts=VQA_PARTS)
    network = AnswerClassifier(model, build_answer_head(model, NUM_ANSWERS), [str(n) for n in range(NUM_ANSWERS)])
    shared = build_questions(args.batch_size, args.questions_per_image, args.image_size)
    own = QuestionBatch(**{**shared, "image": shared["image"][shared["image_row"]], "image_row": torch.arange(args.batch_size)})

    def step(batch: QuestionBatch) -> Tensor:
        loss, _ = network(batch)
        loss.backward()
        return loss.detach()

    result = compare(args, {"shared": lambda: step(shared), "own": lambda: step(own)}, "questions")
    print(json.dumps({"benchmark": "vqa_step", **vars(args), **result}), flush=True)


def build_questions(num: int, per_image: int, image_size: int) -> QuestionBatch:
    image_row = torch.arange(num) // per_image
    return QuestionBatch(
        image=torch.randn(int(image_row[-1]) + 1, 3, image_size, image_size), image_row=image_row,
        token=torch.randint(1, 1000, (num, QUESTION_TOKENS)), length=torch.full((num,), QUESTION_TOKENS),
        target=torch.rand(num, NUM_ANSWERS).gt(0.999).float(), key=[str(n) for n in range(num)], position={},
    )  # fmt: skip


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions-per-image", type=int, default=5, help="default 5; VQA v2 has 5.4")
    parser.add_argument("--batch-size", type=int, default=20, help="questions (default 20)")
    parser.add_argument("--patch-size", type=int, default=16, help="pixels (default 16)")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help=f"pixels (default {IMAGE_SIZE})")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    return parser.parse_args()


if __name__ == "__main__":
    main()
