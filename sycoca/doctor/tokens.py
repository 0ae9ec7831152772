"""The tokenizer: its special tokens, and whether captions survive the way to ids and back."""

import re
from collections.abc import Sequence

from sycoca.data.tokenizer import Tokenizer
from sycoca.doctor.report import Check, grade, judge

_MAX_LOST_SHARE, _MOST_LOST_SHARE = 0.05, 0.5
_NUM_CAPTIONS = 500


def check_tokenizer(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> list[Check]:
    """Both findings; `captions` are some of the training data's."""
    return [check_special_tokens(tokenizer), check_round_trip(tokenizer, captions[:_NUM_CAPTIONS], max_tokens)]


def check_special_tokens(tokenizer: Tokenizer) -> Check:
    """bos, eos and pad lie in the vocabulary, and a caption ends in a token of its own."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    says = f"{tokenizer.vocab_size} entries; " + ", ".join(f"{name} {token}" for name, token in ids.items())
    outside = [name for name, token in ids.items() if not 0 <= token < tokenizer.vocab_size]
    if outside:
        return Check("special tokens", "wrong", f"{says}: {', '.join(outside)} outside the vocabulary; take another tokenizer")
    token = tokenizer.encode("a photo", 8)
    if token[0] != tokenizer.bos or token[-1] != tokenizer.eos or tokenizer.eos in token[1:-1]:
        return Check("special tokens", "wrong", f"{says}: a caption is not bos ... eos but {token}; take another tokenizer")
    if tokenizer.bos == tokenizer.eos:
        return Check("special tokens", "warning", f"{says}: one token for both ends; a model may end where it begins")
    return Check("special tokens", "ok", says)


def check_round_trip(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> Check:
    """Words of captions that come back from their ids; case, spaces and punctuation may change."""
    num_words, lost = 0, []
    for caption in captions:
        token = tokenizer.encode(caption, max_tokens + 1)
        if len(token) > max_tokens:
            continue  # cut: counted with the shards
        back, words = set(_words(tokenizer.decode(token))), _words(caption)
        num_words += len(words)
        lost += [word for word in words if word not in back]
    share = len(lost) / max(1, num_words)
    shown = f": {', '.join(sorted(set(lost))[:5])}" if lost else ""
    says = f"{share:.1%} of {num_words} words are lost between text and ids{shown}"
    status = grade(share, warn_above=_MAX_LOST_SHARE, wrong_above=_MOST_LOST_SHARE)
    return judge("tokenizer round trip", status, says, "take a tokenizer that knows these words (data.tokenizer.name: clip)")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
