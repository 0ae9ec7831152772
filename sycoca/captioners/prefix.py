"""From an embedding to a prefix: vectors that stand before the prompt as if they were words."""

from einops import rearrange
from torch import Tensor, nn

NUM_PREFIX = 10
"""Vectors of a prefix (ClipCap, arXiv:2111.09734; CgT-GAN)."""


class PrefixMapper(nn.Module):
    """An MLP with one hidden tanh layer, half as wide as its output (ClipCap's MLP, used by CgT-GAN).

    Both take the raw embedding, not normalised.
    """

    def __init__(self, embed_width: int, lm_width: int, *, num_vectors: int = NUM_PREFIX):
        super().__init__()
        self.num_vectors = num_vectors
        hidden = lm_width * num_vectors // 2
        self.layers = nn.Sequential(nn.Linear(embed_width, hidden), nn.Tanh(), nn.Linear(hidden, lm_width * num_vectors))

    def forward(self, embedding_NE: Tensor) -> Tensor:
        """N, `num_vectors`, D."""
        return rearrange(self.layers(embedding_NE), "n (q d) -> n q d", q=self.num_vectors)
