"""Porter's stemmer (M. F. Porter, An algorithm for suffix stripping, Program 14(3), 1980), as the paper has it."""

import re
from collections.abc import Callable, Sequence

Rule = tuple[str, str]
Condition = Callable[[str], bool]

_STEP_2 = [
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("abli", "able"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"), ("ator", "ate"),
    ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"),
    ("biliti", "ble"),
]  # fmt: skip
_STEP_3 = [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")]
_SUFFIXES_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = [(suffix, "") for suffix in _SUFFIXES_4.split()]
_MIN_LENGTH = 3


def stem(word: str) -> str:
    """The stem of a word in lower case; words of one or two letters are their own."""
    if len(word) < _MIN_LENGTH:
        return word
    word = _strip_past(_strip_plural(word))
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _replace(word, _STEP_2, lambda kept: _measure(kept) > 0)
    word = _replace(word, _STEP_3, lambda kept: _measure(kept) > 0)
    word = _replace(word, _STEP_4, lambda kept: _measure(kept) > 1)
    return _strip_end(word)


def _strip_plural(word: str) -> str:
    for suffix, other in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(suffix):
            return word[: -len(suffix)] + other
    return word


def _strip_past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        kept = word.removesuffix(suffix)
        if kept != word and _has_vowel(kept):
            if kept.endswith(("at", "bl", "iz")):
                return kept + "e"
            if _ends_double(kept) and kept[-1] not in "lsz":
                return kept[:-1]
            return kept + "e" if _measure(kept) == 1 and _ends_cvc(kept) else kept
    return word


def _strip_end(word: str) -> str:
    if word.endswith("e"):
        kept = word[:-1]
        if _measure(kept) > 1 or (_measure(kept) == 1 and not _ends_cvc(kept)):
            word = kept
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


def _replace(word: str, rules: Sequence[Rule], is_met: Condition) -> str:
    """By the rule of the longest suffix alone; `ion` stands only behind s or t."""
    fitting = [rule for rule in rules if word.endswith(rule[0])]
    if not fitting:
        return word
    suffix, other = max(fitting, key=lambda rule: len(rule[0]))
    kept = word[: -len(suffix)]
    is_free = suffix != "ion" or kept.endswith(("s", "t"))
    return kept + other if is_free and is_met(kept) else word


def _forms(text: str) -> str:
    """v for each vowel and c for each consonant; y is a vowel behind a consonant."""
    forms = ""
    for letter in text:
        is_vowel = letter in "aeiou" or (letter == "y" and forms.endswith("c"))
        forms += "v" if is_vowel else "c"
    return forms


def _measure(text: str) -> int:
    """How many times a consonant follows a vowel: m of [C](VC)^m[V]."""
    return len(re.findall("vc", _forms(text)))


def _has_vowel(text: str) -> bool:
    return "v" in _forms(text)


def _ends_double(text: str) -> bool:
    return len(text) > 1 and text[-1] == text[-2] and _forms(text).endswith("c")


def _ends_cvc(text: str) -> bool:
    return _forms(text).endswith("cvc") and text[-1] not in "wxy"
