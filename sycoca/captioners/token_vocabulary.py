"""A language model's vocabulary as SITTA searches it: clean words with their input embeddings, standardised over them."""

import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.transform import Kind, fit_transform
from sycoca.types import DataError


class TokenVocabulary:
    """The tokens whose text has a letter, N of them; several may be one word (with and without a blank before it).

    With `allowed`, only tokens that are one of these words. Raises DataError where that leaves none.
    """

    def __init__(self, lm: CaptionLM, *, allowed: Collection[str] | None = None, kinds: Sequence[Kind] = ("zscore",)):
        self.lm, self.allowed = lm, None if allowed is None else sorted(allowed)
        self._tokenizer: Any = lm.tokenizer
        texts = [text.lower() for text in lm.token_texts()]
        known = set(texts if allowed is None else allowed)
        self.ids = [token for token, text in enumerate(texts) if text in known and any(map(str.isalpha, text))]
        if not self.ids:
            raise DataError("none of the language model's tokens is one of these words; say token_map.words: vocabulary")
        self.words = [texts[token] for token in self.ids]
        self._row_of_id = {token: row for row, token in enumerate(self.ids)}
        raw_NF = lm.input_embeddings()[self.ids].float().cpu()
        self.transform = fit_transform(kinds, lambda: [raw_NF])
        self.embedding_NF = self.transform(raw_NF)
        digest = hashlib.sha256("\n".join([*self.words, *kinds]).encode())
        digest.update(raw_NF.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    @cached_property
    def different_words(self) -> list[str]:
        """Each word once, in the order of the tokens."""
        return list(dict.fromkeys(self.words))

    @cached_property
    def word_of_row_N(self) -> Tensor:
        """int64: each row's place among the different words."""
        places = {word: place for place, word in enumerate(self.different_words)}
        return torch.tensor([places[word] for word in self.words])

    @cached_property
    def _unit_NF(self) -> Tensor:
        return F.normalize(self.embedding_NF, dim=-1)

    def rows_of(self, word: str) -> list[int]:
        """Rows of the tokens that spell the word within a sentence."""
        ids = self._tokenizer.encode(f" {word}", add_special_tokens=False)
        return [self._row_of_id[token] for token in ids if token in self._row_of_id]

    def rank_rows(self, query_BF: Tensor) -> Tensor:
        """BN: every row by cosine, best first."""
        query_BF = F.normalize(query_BF.to(self._unit_NF), dim=-1)
        return (query_BF @ self._unit_NF.T).argsort(dim=1, descending=True, stable=True)

    def search(self, query_BF: Tensor, k: int) -> list[list[str]]:
        """The k different words nearest to each query, best first. Raises DataError where the vocabulary has fewer."""
        if k > len(self.different_words):
            raise DataError(
                f"{k} words asked of a language model that has {len(self.different_words)}; ask for fewer "
                "(captioner.prompt.num_items)"
            )
        found = []
        for row_N in self.rank_rows(query_BF).tolist():
            best: dict[str, None] = {}
            for row in row_N:
                if len(best) == k:
                    break
                best.setdefault(self.words[row])
            found.append(list(best))
        return found
