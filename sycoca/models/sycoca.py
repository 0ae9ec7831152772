"""The model: encoders, projections and decoders. It is built from the parts that its objectives need, and nothing else."""

from collections.abc import Set
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.config import Config
from sycoca.models.image_decoder import ImageDecoder, ImageDecoderConfig
from sycoca.models.init import initialise
from sycoca.models.masking import RelevanceConfig, is_word, patch_relevance
from sycoca.models.pooling import AttentionPool, Pool
from sycoca.models.text import TextConfig, TextEncoder
from sycoca.models.text_decoder import TextDecoder, TextDecoderConfig
from sycoca.models.vision import VisionConfig, VisionEncoder
from sycoca.types import Batch, ConfigError, Features

Part = Literal["text", "contrast", "text_decoder", "image_decoder", "text_guidance", "encoder_mask_token"]


class ModelConfig(Config):
    """The whole network. Parts that no objective needs are described here but not built."""

    vision: VisionConfig = VisionConfig()
    pool: Pool = "max"
    embed_width: int = 512
    text: TextConfig = TextConfig()
    text_decoder: TextDecoderConfig = TextDecoderConfig()
    image_decoder: ImageDecoderConfig = ImageDecoderConfig()
    recompute: bool = False
    """Gradient checkpointing: activations of every block are recomputed in the backward pass."""
    locked: list[Literal["vision", "text"]] = []
    """Towers that are not trained (LiT)."""


class SyCoCa(nn.Module):
    """A ViT, a causal text encoder, a text decoder and an image decoder (SyCoCa, figure 2)."""

    def __init__(self, config: ModelConfig, *, vocab_size: int, max_tokens: int, parts: Set[Part]):
        super().__init__()
        self.config, self.max_tokens, self.parts = config, max_tokens, frozenset(parts)
        self.vision = VisionEncoder(
            config.vision, has_mask_token="encoder_mask_token" in parts, recompute=config.recompute
        )
        width, has_contrast = self.vision.width, "contrast" in parts
        self.text = self._build_text(config, vocab_size) if "text" in parts else None
        self.image_pool = AttentionPool(width, config.text.num_heads) if has_contrast and config.pool == "attention" else None
        self.image_projection = nn.Linear(width, config.embed_width, bias=False) if has_contrast else None
        self.text_projection = nn.Linear(config.text.width, config.embed_width, bias=False) if has_contrast else None
        self.text_decoder = (
            TextDecoder(
                config.text_decoder, width=config.text.width, num_heads=config.text.num_heads, memory_width=width,
                vocab_size=vocab_size, recompute=config.recompute,
            )
            if "text_decoder" in parts
            else None
        )  # fmt: skip
        self.image_decoder = self._build_image_decoder(config) if "image_decoder" in parts else None
        initialise(self)
        self._lock(config)

    def _build_text(self, config: ModelConfig, vocab_size: int) -> TextEncoder:
        has_summary = bool(self.parts & {"contrast", "text_guidance"})
        return TextEncoder(
            config.text, vocab_size=vocab_size, max_tokens=self.max_tokens, has_summary=has_summary, recompute=config.recompute
        )

    def _build_image_decoder(self, config: ModelConfig) -> ImageDecoder:
        return ImageDecoder(
            config.image_decoder, patch_width=self.vision.width, num_patches=self.vision.num_patches,
            patch_size=self.vision.patch_size, memory_width=config.text.width if "text_guidance" in self.parts else None,
            has_mask_token="encoder_mask_token" not in self.parts, recompute=config.recompute,
        )  # fmt: skip

    def _lock(self, config: ModelConfig) -> None:
        for name in config.locked:
            tower = getattr(self, name)
            if tower is None:
                raise ConfigError(f"model.locked: there is no {name} tower with these objectives; remove it from the list")
            tower.requires_grad_(False)

    def encode(self, batch: Batch) -> Features:
        """Encode images and captions once, for every objective. Embeddings are float32 with unit norm."""
        patch_BPD, class_BD = self.vision(batch["image"])
        assert self.text is not None or "contrast" not in self.parts
        if self.text is None:
            nothing = patch_BPD.new_zeros(patch_BPD.shape[0], 0, 0)
            return Features(patch_BPD, nothing, None, None, None)
        token_BLD, summary_BD = self.text(batch["token"], batch["length"])
        if self.text_projection is None:
            return Features(patch_BPD, token_BLD, summary_BD, None, None)
        image_BE = self.project_image(patch_BPD, class_BD)
        text_BE = self.text_projection(summary_BD)
        return Features(patch_BPD, token_BLD, summary_BD, _unit(image_BE), _unit(text_BE))

    def project_image(self, patch_BPD: Tensor, class_BD: Tensor) -> Tensor:
        """BE, raw: the pooled image in the shared space."""
        assert self.image_projection is not None, "the contrastive projections were not built"
        if self.config.pool == "max":
            return self.image_projection(patch_BPD).amax(dim=1)
        if self.image_pool is not None:
            class_BD = self.image_pool(patch_BPD)
        elif self.config.pool == "mean":
            class_BD = patch_BPD.mean(dim=1)
        return self.image_projection(class_BD)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """BE float32, raw (not normalised)."""
        return self.project_image(*self.vision(image_BCHW)).float()

    def encode_text(self, token_BL: Tensor, length_B: Tensor) -> Tensor:
        """BE float32, raw (not normalised)."""
        assert self.text is not None and self.text_projection is not None, "the contrastive projections were not built"
        return self.text_projection(self.text(token_BL, length_B)[1]).float()

    @torch.no_grad()
    def relevance(self, features: Features, length_B: Tensor, config: RelevanceConfig) -> Tensor:
        """BP: how much the caption speaks of each patch (SyCoCa, section 3.2)."""
        patch, token = features.patch_BPD, features.token_BLD
        is_used = is_word(length_B, token.shape[1])
        if config.words != "tokens":
            assert features.summary_BD is not None, "there is no summary token without contrast or text guidance"
            token = torch.cat([token, features.summary_BD[:, None]], dim=1)
            is_used = F.pad(is_used if config.words == "both" else torch.zeros_like(is_used), (0, 1), value=True)
        if config.space == "itc":
            assert self.image_projection is not None and self.text_projection is not None
            patch, token = self.image_projection(patch), self.text_projection(token)
        return patch_relevance(patch, token, is_used)


def _unit(row_BE: Tensor) -> Tensor:
    return F.normalize(row_BE.float(), dim=-1)
