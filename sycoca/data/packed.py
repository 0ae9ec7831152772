"""Many short texts in two arrays: forked loader workers share them, where a list would be copied by counting references."""

from collections.abc import Iterable
from itertools import accumulate

import numpy as np


class PackedTexts:
    """Texts by number."""

    def __init__(self, texts: Iterable[str]):
        encoded = [text.encode() for text in texts]
        self._bytes = b"".join(encoded)
        self._end_N = np.array(list(accumulate(map(len, encoded), initial=0)), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._end_N) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._end_N[index] : self._end_N[index + 1]].decode()
