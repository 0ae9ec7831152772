"""Words and stems."""

import pytest

from sycoca.captioners.stem import stem
from sycoca.captioners.words import STOP_WORDS, content_words


def test_content_words_leave_out_stop_words_punctuation_numbers_and_repetitions():
    expected = ["dog", "red", "balls", "well", "known", "mat"]
    assert content_words("A dog's 2 red balls; isn't it RED, on the well-known mat?") == expected
    assert content_words("the, and 3!") == []
    assert len(STOP_WORDS) == 174


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "ti"), ("cats", "cat"), ("agreed", "agre"), ("feed", "feed"),
        ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"), ("sing", "sing"), ("conflated", "conflat"),
        ("hopping", "hop"), ("falling", "fall"), ("hissing", "hiss"), ("filing", "file"), ("happy", "happi"), ("sky", "sky"),
        ("relational", "relat"), ("vietnamization", "vietnam"), ("hopefulness", "hope"), ("triplicate", "triplic"),
        ("electrical", "electr"), ("revival", "reviv"), ("adjustment", "adjust"), ("replacement", "replac"),
        ("adoption", "adopt"), ("effective", "effect"), ("probate", "probat"), ("rate", "rate"), ("cease", "ceas"),
        ("controll", "control"), ("roll", "roll"), ("as", "as"),
    ],
)  # fmt: skip
def test_stems_are_those_that_porter_s_paper_gives(word: str, expected: str):
    assert stem(word) == expected
