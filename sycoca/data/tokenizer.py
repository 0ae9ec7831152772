"""Text to token ids and back, with bos, eos and pad always explicit."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as WordTokenizer
from torch import Tensor

from sycoca.config import Config
from sycoca.types import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CLIP = "clip"
_CLIP_FILE = "sycoca_tokenizer.json"
_CHARACTERS_A_TOKEN = 64  # text beyond this many a token is cut unread: BPE is quadratic in the length of a word
_CLIP_CACHE_WORDS = 200_000  # open_clip remembers every word it ever saw; web text would fill the memory


class TokenizerConfig(Config):
    """`clip` (nothing to download), or a transformers tokenizer by name or folder."""

    name: str = _CLIP


class Tokenizer(ABC):
    """Captions as `bos ... eos`; what follows eos is padding, and only lengths tell (pad may be a word: CLIP's 0 is "!")."""

    def __init__(self, vocab_size: int, *, bos: int, eos: int, pad: int):
        self.vocab_size = vocab_size
        self.bos = bos
        self.eos = eos
        self.pad = pad

    @abstractmethod
    def _pieces(self, text: str, limit: int) -> list[int]:
        """Ids of the text without special tokens; more than `limit` need not be given."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The text of ids that hold no bos and no eos."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `build_tokenizer` needs to build this tokenizer again from the folder."""

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """`bos ... eos`, at most `max_tokens` long; a longer text loses its end, never its eos."""
        pieces = self._pieces(text[: max_tokens * _CHARACTERS_A_TOKEN], max_tokens)
        return [self.bos, *pieces[: max_tokens - 2], self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first eos, without special tokens."""
        kept: list[int] = []
        for token in map(int, ids):
            if token == self.eos and (kept or self.eos != self.bos):  # some tokenizers have one token for both ends
                break
            if token != self.bos:
                kept.append(token)
        return self._text(kept).strip()

    def tokenize(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """`(token_BL, length_B)`, int64, padded to the longest text."""
        rows = [self.encode(text, max_tokens) for text in texts]
        return pad_rows(rows, max(map(len, rows), default=0), self.pad)


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding of lower-cased text, 49,408 entries."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer  # slow to import, and words of our own do without

        self._bpe = SimpleTokenizer()
        self._full_clean = self._bpe.clean_fn
        self._bpe.clean_fn = self._clean  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(self._bpe.vocab_size, bos=self._bpe.sot_token_id, eos=self._bpe.eot_token_id, pad=0)

    def _pieces(self, text: str, limit: int) -> list[int]:
        if len(self._bpe.cache) > _CLIP_CACHE_WORDS:
            self._bpe.cache = {word: word for word in ("<start_of_text>", "<end_of_text>")}
        return [token for token in self._bpe.encode(text) if token < self.bos]  # a caption cannot spell a special token

    def _clean(self, text: str) -> str:
        """What open_clip's cleaning gives, without its slow repair of encodings where there is nothing to repair."""
        if text.isascii() and "&" not in text and text.isprintable():
            return " ".join(text.split()).lower()
        return self._full_clean(text)

    def _text(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CLIP_FILE).write_text(json.dumps({"name": _CLIP}) + "\n", encoding="utf-8")


class PretrainedTokenizer(Tokenizer):
    """Any transformers tokenizer that has bos, eos and pad."""

    def __init__(self, inner: Any, source: str):
        ids = {"bos": inner.bos_token_id, "eos": inner.eos_token_id, "pad": inner.pad_token_id}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise ConfigError(
                f"tokenizer {source}: expected bos, eos and pad tokens, found no {' and no '.join(missing)}; "
                f"take another tokenizer, or save a copy of it with {', '.join(name + '_token' for name in missing)} set "
                "(pad may equal eos) and name that folder"
            )
        super().__init__(len(inner), **ids)
        self._inner = inner
        self._special = set(inner.all_special_ids) - {inner.unk_token_id}

    def _pieces(self, text: str, limit: int) -> list[int]:
        ids = self._inner.encode(text, add_special_tokens=False, truncation=True, max_length=limit)
        return [token for token in ids if token not in self._special]

    def _text(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)

    def save(self, folder: Path) -> None:
        self._inner.save_pretrained(str(folder))


def build_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """The tokenizer of a configuration (`clip`, a transformers name or folder) or of a folder that `save` wrote.

    Raises ConfigError where nothing is found, or where bos, eos or pad is missing.
    """
    if str(name_or_folder) == _CLIP or (Path(name_or_folder) / _CLIP_FILE).is_file():
        return ClipTokenizer()
    from transformers import AutoTokenizer  # slow to import, and who asks for help or errs in a setting need not wait for it

    try:
        inner = AutoTokenizer.from_pretrained(str(name_or_folder))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"tokenizer {name_or_folder}: expected `clip`, a folder with a tokenizer, or a transformers name; {error}"
        ) from error
    return PretrainedTokenizer(inner, str(name_or_folder))


def pad_rows(rows: list[list[int]], num_columns: int, pad: int) -> tuple[Tensor, Tensor]:
    """`(token_BL, length_B)`, int64, of rows that are at most `num_columns` long."""
    token_BL = torch.full((len(rows), num_columns), pad, dtype=torch.int64)
    for row_L, ids in zip(token_BL, rows):
        row_L[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return token_BL, torch.tensor([len(ids) for ids in rows], dtype=torch.int64)


def train_word_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write a lower-casing tokenizer of the texts' words and punctuation marks, that `build_tokenizer` reads."""
    _train_words(texts, pre_tokenizers.Whitespace()).save_pretrained(str(folder))


def train_prompt_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """The same for a language model: a line break is a word too (prompts have blank lines), bos precedes every text."""
    kept = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]+"), behavior="removed", invert=True)
    tokenizer = _train_words([*texts, "\n"], kept)
    words, bos = tokenizer.backend_tokenizer, str(tokenizer.bos_token)
    words.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.save_pretrained(str(folder))


def _train_words(texts: Iterable[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    words = WordTokenizer(models.WordLevel(unk_token=special["unk_token"]))
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizer
    trainer = trainers.WordLevelTrainer(special_tokens=list(special.values()), show_progress=False)
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)
