"""Texts without their padding: rows of real tokens, so that a batch costs what it says and not what its longest one does."""

import torch
from torch import Tensor

ROUND_ROWS_TO = 64
"""Token counts differ from batch to batch; without rounding every batch makes (and keeps) matrix kernels of its own."""


class Packing:
    """Where the rows of packed tokens (N) stand in a padded batch (B, L).

    All real places are among them; a few of the padding fill the number of rows up to a multiple of ROUND_ROWS_TO.
    memory_row_B: the row of the memory that each text looks at, where several share one; None: its own.
    """

    def __init__(self, length_B: Tensor, num_places: int, memory_row_B: Tensor | None = None):
        self.memory_row_B = memory_row_B
        is_real_BL = torch.arange(num_places, device=length_B.device) < length_B[:, None]
        self.shape = is_real_BL.shape
        num_rows = num_packed(int(length_B.sum()), self.shape.numel())
        self.place_N = is_real_BL.flatten().byte().argsort(descending=True, stable=True)[:num_rows]

    def pack(self, x_BLD: Tensor) -> Tensor:
        """The rows, ND (or N of BL)."""
        return x_BLD.flatten(0, 1).index_select(0, self.place_N)

    def pad(self, x_ND: Tensor) -> Tensor:
        """BLD: the rows at their places, zeros at the others."""
        padded = x_ND.new_zeros(self.shape.numel(), x_ND.shape[1])
        return padded.index_copy(0, self.place_N, x_ND).unflatten(0, self.shape)


def num_packed(num_real: int, num_places: int) -> int:
    """Rows that so many real tokens in so many places of a padded batch are packed into."""
    return min(-(-num_real // ROUND_ROWS_TO) * ROUND_ROWS_TO, num_places)
