"""Words of captions against the official Java tokenizer's: its stored output, and cases by hand that were put to it."""

import json
import os
from pathlib import Path

import pytest

from sycoca.evaluation.ptb_tokenizer import tokenize_caption

OFFICIAL = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "caption_metrics"
needs_official = pytest.mark.skipif(not OFFICIAL.exists(), reason="no real data at SYCOCA_DATA")


@needs_official
def test_every_stored_caption_has_the_official_words():
    pairs = [line.split("\t") for line in (OFFICIAL / "ptb_pairs.tsv").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == 20_000
    assert [(raw, words) for raw, words in pairs if tokenize_caption(raw) != words] == []


@needs_official
@pytest.mark.parametrize("path", sorted(OFFICIAL.glob("f30k_*.json")), ids=lambda path: path.stem)
def test_every_reference_and_prediction_has_the_official_words(path: Path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    raws = [*stored["hyp"], *(text for texts in stored["refs"] for text in texts)]
    words = [*stored["hyp_tok"], *(text for texts in stored["refs_tok"] for text in texts)]
    assert [tokenize_caption(raw) for raw in raws] == words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ('A dog, a cat; and "two" birds!', "a dog a cat and two birds"),
        ("the man's dogs' bowls aren't his. He can't, she'll.", "the man 's dogs bowls are n't his he ca n't she 'll"),
        ("we cannot see, I'm gonna go, 'tis y'all", "we can not see i 'm gon na go 't is y' all"),
        ("rock 'n' roll of the '90s, o'clock, O'Reilly, 'em", "rock 'n' roll of the '90s o'clock o'reilly 'em"),
        ("it’s “quoted” and ‘so’ – or — not…", "it 's quoted and so or not"),
        ("a t-shirt, 8-year-old, mother-in-law -- and a--b", "a t-shirt 8-year-old mother-in-law and a b"),
        ("(left) [right] {both} <b>", "-lrb- left -rrb- -lsb- right -rsb- -lcb- both -rcb- <b>"),
        ("10:30 a.m., 3,500 at $5.00 or 5% off, #7, 1/2", "10:30 a.m. 3,500 at $ 5.00 or 5 % off # 7 1/2"),
        ("3 1/2 feet, (415) 555-1234", "3\u00a01/2 feet -lrb-415-rrb-\u00a0555-1234"),
        ("Mr. Smith Jr. of St. Louis, Washington D.C.", "mr. smith jr. of st. louis washington d.c."),
        ("no. 7 and no. Two on Pa. but not on pa.", "no. 7 and no two on pa. but not on pa"),
        ("the letter C. A man; the letter C. Two men", "the letter c a man the letter c. two men"),
        ("AT&T at&t R&B &amp; black/white and/or", "at&t at & t r&b & black/white and/or"),
        ("www.foo.com me@foo.com @home #hello IMG_1234.jpg x.jpg", "www.foo.com me@foo.com @home #hello img_1234 jpg x.jpg"),
        ("café naïve 日本 ½ £5 5° 😀 ?? ... :)", "café naïve 日本 1/2 # 5 5 ° ?? :-rrb-"),
        ("the end.,no b\u00adreak\ttab\u00a0space\nline", "the end. no break tab space line"),
        ("5'10 and 6'2\" tall hello.world 5pm 1st 4x4 80's", "5 '10 and 6 2 tall hello.world 5pm 1st 4x4 80 's"),
        (" . ", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_words_are_those_of_the_official_tokenizer(caption: str, words: str):
    assert tokenize_caption(caption) == words


def test_an_initial_at_the_end_keeps_its_period_whatever_caption_comes_next():
    """The official tool gives "c" where the next line of its file begins with "A", and "c." where it begins with "Two"."""
    assert tokenize_caption("the letter C.") == "the letter c."


def test_words_do_not_change_when_they_are_tokenized_again():
    words = tokenize_caption("The man's hat isn't 10:30, t-shirt (red) & black/white.")
    assert tokenize_caption(words) == words
