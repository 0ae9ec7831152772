"""A trained model ready for use: with its tokenizer and image transform, which travel with the checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sycoca.config import Config, load_config
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.data.transforms import TransformConfig, build_eval_transform
from sycoca.distributed import split_like
from sycoca.generation import GenerationConfig, decode
from sycoca.models.decoding import CaptionStep
from sycoca.models.likelihood import token_log_probs
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import ModelConfig, Part, SyCoCa
from sycoca.types import Batch, CheckpointError, Features

Images = Sequence[Image.Image] | Tensor
MODEL_PREFIX = "model."
"""Keys of the network in a checkpoint's weights; the objectives' own parameters stand beside them."""


class PretrainedConfig(Config):
    """What a checkpoint must say of its model for it to be built again."""

    model: ModelConfig
    parts: list[Part]
    transform: TransformConfig
    relevance: RelevanceConfig
    max_tokens: int


class Pretrained:
    """Encodes, captions and explains images and texts. Satisfies DualEncoder and Captioner."""

    def __init__(self, model: SyCoCa, tokenizer: Tokenizer, config: PretrainedConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.max_tokens = config.max_tokens
        self.transform = build_eval_transform(config.transform)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Pretrained":
        """Move the weights; gives itself back."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode_image(self, images: Images) -> Tensor:
        """BE float32, raw. Images are PIL images, or a BCHW tensor that the transform made."""
        self._require("contrast", "encode images into the shared space")
        return self.model.encode_image(self._pixels(images))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """NE float32, raw. A text that is too long is cut at `max_tokens`."""
        self._require("contrast", "encode texts into the shared space")
        token_NL, length_N = self.tokenizer.tokenize(list(texts), self.max_tokens)
        return self.model.encode_text(token_NL.to(self.device), length_N.to(self.device))

    @torch.no_grad()
    def caption(
        self, images: Images, keys: Sequence[str] | None = None, *, generation: GenerationConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> list[str]:  # fmt: skip
        """One caption an image; `keys` is there for captioners that retrieve and is not read."""
        return [written[0] for written in self.captions(images, generation=generation, generator=generator)]

    @torch.no_grad()
    def captions(
        self, images: Images, *, generation: GenerationConfig | None = None, generator: torch.Generator | None = None
    ) -> list[list[str]]:
        """`generation.num_return` captions an image, the best first in beam search."""
        self._require("text_decoder", "write captions")
        patch_BPD, _ = self.model.vision(self._pixels(images))
        generation = generation or GenerationConfig(max_tokens=self.max_tokens - 1)
        room = self.max_tokens - 1
        generation = generation.model_copy(
            update={"max_tokens": min(generation.max_tokens, room), "min_tokens": min(generation.min_tokens, room)}
        )
        prompt_B1 = torch.full((patch_BPD.shape[0], 1), self.tokenizer.bos, device=patch_BPD.device)
        step = CaptionStep(self.model, patch_BPD)
        written = decode(step, prompt_B1, generation, eos=self.tokenizer.eos, generator=generator)
        return [[self.tokenizer.decode(row) for row in of_image] for of_image in written.token_NJT.tolist()]

    @torch.no_grad()
    def encode_patches(self, images: Images) -> Tensor:
        """BPD: the patch tokens that captions are written from."""
        return self.model.vision(self._pixels(images))[0]

    @torch.no_grad()
    def caption_log_prob(self, patch_NPD: Tensor, texts: Sequence[str]) -> Tensor:
        """N float32: the mean log-probability (nats) of each text's tokens, its end counted, given the patches of its row."""
        self._require("text_decoder", "rate captions")
        token_NL, length_N = (rows.to(self.device) for rows in self.tokenizer.tokenize(list(texts), self.max_tokens))
        return token_log_probs(self.model, patch_NPD, token_NL, length_N).sum(1) / (length_N - 1)

    @torch.no_grad()
    def relevance(self, images: Images, texts: Sequence[str]) -> Tensor:
        """BP float32 in [-1, 1]: how much each text speaks of each patch of its image (row by row from the top left)."""
        batch, features = self.encode(images, texts)
        return self.model.relevance(features, batch["length"], self.config.relevance)

    def encode(self, images: Images, texts: Sequence[str]) -> tuple[Batch, Features]:
        """Pairs as the objectives see them."""
        token, length = self.tokenizer.tokenize(list(texts), self.max_tokens)
        batch = Batch(
            image=self._pixels(images), token=token.to(self.device), length=length.to(self.device),
            key=[str(number) for number in range(len(texts))], position={},
        )  # fmt: skip
        return batch, self.model.encode(batch)

    def _pixels(self, images: Images) -> Tensor:
        if isinstance(images, Tensor):
            return images.to(self.device)
        return torch.stack([self.transform(image.convert("RGB")) for image in images]).to(self.device)

    def _require(self, part: Part, purpose: str) -> None:
        if part not in self.model.parts:
            raise CheckpointError(f"this checkpoint was trained without the part {part!r} and cannot {purpose}")


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Pretrained:
    """The model of a checkpoint folder, or of a run folder's best checkpoint (its last one where none was evaluated).

    Raises CheckpointError where a file, or a weight of the expected shape, is missing.
    """
    folder = find_checkpoint(Path(path))
    config = load_config(PretrainedConfig, folder / "model.yaml")
    tokenizer = build_tokenizer(folder / "tokenizer")
    offline = config.model.model_copy(update={"vision": config.model.vision.model_copy(update={"pretrained": False})})
    model = SyCoCa(offline, vocab_size=tokenizer.vocab_size, max_tokens=config.max_tokens, parts=set(config.parts))
    weights = load_file(folder / "model.safetensors")
    mine = {key.removeprefix(MODEL_PREFIX): value for key, value in weights.items() if key.startswith(MODEL_PREFIX)}
    load_weights(model, mine, source=str(folder))
    return Pretrained(model.eval().to(device), tokenizer, config)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or a run's `checkpoints/best` or `checkpoints/last`."""
    for folder in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (folder / "model.safetensors").is_file():
            return folder.resolve()
    raise CheckpointError(
        f"no checkpoint at {path}: expected a folder with model.safetensors, or a run folder with checkpoints/last in it"
    )


def load_weights(module: torch.nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """Load every weight; missing, unexpected and misshapen ones are an error that lists them, never passed over."""
    expected = module.state_dict()
    problems = [f"missing {key}" for key in expected.keys() - weights.keys()]
    problems += [f"unexpected {key}" for key in weights.keys() - expected.keys()]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source} holds the weights of another model: {'; '.join(sorted(problems)[:5])}{more}. "
            "Use the configuration it was trained with (config.yaml beside it), or init.strict=false to take what fits"
        )
    module.load_state_dict({key: split_like(value, expected[key]) for key, value in weights.items()})


def save_description(folder: Path, tokenizer: Tokenizer, config: PretrainedConfig) -> None:
    """Write what `load` needs beside the weights: model.yaml and the tokenizer."""
    # JSON is YAML; a model's description is for machines, the experiment's config.yaml beside it for people
    (folder / "model.yaml").write_text(json.dumps(config.model_dump(mode="json"), indent=1), encoding="utf-8")
    tokenizer.save(folder / "tokenizer")
