"""A fitted linear map with the transforms on both sides of it and the names of the spaces it joins."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sycoca.captioners.storage import load_tensors, save_tensors
from sycoca.captioners.transform import EmbeddingTransform, from_tensors
from sycoca.types import DataError

KIND = "linear aligner"


@dataclass(frozen=True)
class LinearAligner:
    """Takes raw embeddings of one space to the transformed ones of another: T_target(y) is near T_source(x) W."""

    weight_EF: Tensor
    source_transform: EmbeddingTransform
    target_transform: EmbeddingTransform
    source_fingerprint: str
    """Of the encoder (or vocabulary) whose rows are mapped."""
    target_fingerprint: str
    method: str
    num_pairs: int

    @torch.no_grad()
    def apply(self, source_NE: Tensor) -> Tensor:
        """NF float32 of raw source rows, in the transformed target space; not normalised. Raises DataError."""
        if source_NE.shape[-1] != self.weight_EF.shape[0]:
            raise DataError(f"this aligner maps rows of {self.weight_EF.shape[0]} numbers, got {source_NE.shape[-1]}")
        return self.source_transform(source_NE.float()) @ self.weight_EF.to(source_NE.device, torch.float32)

    def embed_target(self, target_NF: Tensor) -> Tensor:
        """NF float32 of raw target rows, to be compared with what `apply` gives."""
        return self.target_transform(target_NF.float())

    def check_spaces(self, *, source: str, target: str) -> None:
        """Raises DataError unless these are the fingerprints of the spaces that it was fitted between."""
        for side, expected, found in (("from", self.source_fingerprint, source), ("to", self.target_fingerprint, target)):
            if expected != found:
                raise DataError(
                    f"this aligner was fitted {side} the space {expected} and is used with {found}: encoder and aligner do not "
                    "belong together. Load the encoder it was fitted with, or fit it again"
                )

    def save(self, path: Path) -> None:
        """Write one file, whole or not at all."""
        fitted = self.source_transform.tensors("source.") | self.target_transform.tensors("target.")
        facts = {
            "kind": KIND, "source_kinds": self.source_transform.kinds, "target_kinds": self.target_transform.kinds,
            "source_fingerprint": self.source_fingerprint, "target_fingerprint": self.target_fingerprint,
            "method": self.method, "num_pairs": self.num_pairs,
        }  # fmt: skip
        save_tensors(path, {"weight": self.weight_EF, **fitted}, facts)


def load_aligner(path: Path) -> LinearAligner:
    """What `LinearAligner.save` wrote. Raises DataError for another file."""
    tensors, facts = load_tensors(path, kind=KIND)
    return LinearAligner(
        weight_EF=tensors["weight"],
        source_transform=from_tensors(facts["source_kinds"], tensors, "source."),
        target_transform=from_tensors(facts["target_kinds"], tensors, "target."),
        source_fingerprint=facts["source_fingerprint"],
        target_fingerprint=facts["target_fingerprint"],
        method=facts["method"],
        num_pairs=facts["num_pairs"],
    )
