"""A world of plain colours: images of one colour, captions that name it, an encoder that sees it and a language model."""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from builders import shake
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sycoca.captioners.clip_towers import Towers
from sycoca.captioners.embeddings import EmbeddingStore, Reading, embed_shards
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.lm_loading import wrap_lm
from sycoca.captioners.prompt import TEMPLATES, pad_prompts
from sycoca.data.tokenizer import train_prompt_tokenizer
from sycoca.data.transforms import TransformConfig
from tests.data.shard_maker import make_json, save_image, write_shard

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NOUNS = ("dog", "cat", "bird", "car")
SIZE, NUM_IMAGES, WIDTH, MAX_POSITIONS = 4, 12, 32, 60


def colour_of(number: int) -> str:
    """Of an image."""
    return list(COLOURS)[number % len(COLOURS)]


def captions_of(number: int) -> list[str]:
    """Two captions that name the image's colour."""
    return [f"a {colour_of(number)} {NOUNS[number % len(NOUNS)]}", f"the thing is {colour_of(number)} {number}"]


def build_palette() -> FrozenEncoder:
    """An image is its mean colour, a text the colours that it names; patches are pixels."""

    def read(text: str) -> Tensor:
        named = [torch.tensor(COLOURS[word]) / 255 for word in text.split() if word in COLOURS]
        return torch.stack(named).sum(0) if named else torch.full((3,), 0.1)

    towers = Towers(
        module=torch.nn.Identity(), image=lambda image_BCHW: image_BCHW.mean((2, 3)),
        text=lambda texts: torch.stack([read(text) for text in texts]), patches=lambda image_BCHW: image_BCHW.flatten(2).mT,
        transform=TransformConfig(size=SIZE, eval="squash"), logit_scale=1.0,
    )  # fmt: skip
    return FrozenEncoder("palette", towers, "cpu")


def write_images(folder: Path, numbers: Sequence[int] = range(NUM_IMAGES)) -> Path:
    """Two shards of images with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        members = []
        for number in numbers[shard::2]:
            image = save_image(Image.new("RGB", (SIZE, SIZE), COLOURS[colour_of(number)]), "PNG")
            members += [(f"k{number}.png", image), (f"k{number}.json", make_json(captions=captions_of(number)))]
        write_shard(folder / f"{shard}.tar", members)
    return folder


def embed_images(folder: Path, split: str = "train") -> EmbeddingStore:
    """The palette's embeddings of those shards."""
    reading = Reading([str(write_images(folder / "shards"))], split, batch_size=5, num_workers=0)
    embed_shards(build_palette(), folder / "store", reading)
    return EmbeddingStore(folder / "store", split)


def pixels(numbers: Sequence[int]) -> Tensor:
    """The images as the encoder takes them."""
    encoder = build_palette()
    return torch.stack([encoder.transform(Image.new("RGB", (SIZE, SIZE), COLOURS[colour_of(n)])) for n in numbers])


@cache
def tokenizer_folder() -> Path:
    """Of every word of the captions and the prompts."""
    folder = Path(tempfile.mkdtemp())
    texts = [text for number in range(NUM_IMAGES) for text in captions_of(number)]
    train_prompt_tokenizer([*texts, *(template.fill([""]) for template in TEMPLATES.values())], folder)
    return folder


def build_lm(*, seed: int = 0, std: float = 0.1) -> CaptionLM:
    """A small GPT-2 with random weights; frozen."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder()))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=MAX_POSITIONS, n_embd=WIDTH, n_layer=2, n_head=2,
                   embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, pad_token_id=tokenizer.pad_token_id, **special)
    )  # fmt: skip
    shake(model, std=std)
    return wrap_lm(model, tokenizer)


def build_taught_lm() -> CaptionLM:
    """One that has read the captions, behind a prompt without items, and knows nothing of images; frozen."""
    lm = build_lm(std=0.02)
    lm.model.requires_grad_(True)
    texts = [text for number in range(NUM_IMAGES) for text in captions_of(number)]
    prompt = pad_prompts([lm.encode_prompt(TEMPLATES["smallcap"].fill([]))] * len(texts), lm.pad)
    token_NT, length_N = lm.pad_captions([lm.encode_caption(text, max_tokens=8) for text in texts])
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (-lm.log_probs(prompt, token_NT, length_N).sum() / length_N.sum()).backward()
        optimizer.step()
    lm.model.requires_grad_(False)
    return lm.eval()


def save_lm(folder: Path) -> Path:
    """The same as a folder of transformers."""
    lm = build_lm()
    model: Any = lm.model
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(str(folder))
    return folder
