"""VQA answers: the official normal form and accuracy (GT-Vision-Lab/VQA, vqaEval.py), and the vocabulary a model chooses from.

A vocabulary's answers are told apart by their normalised form. One built here spells each as it occurs most often: the official
accuracy normalises nothing where all ten people agree, so "two" can only be hit by "two", although its normal form is "2".
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from sycoca.types import DataError

MIN_ANSWERS = 4
"""With fewer answers to a question, not even a unanimous one can score 1."""
VQA_V2_MIN_COUNT = 9
"""Questions with that answer, for 3,129 answers of VQA v2 (Teney et al., arXiv:1708.02711, and all that followed)."""

_PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as published: `(?!<=` was meant to be `(?<!`, and never holds back
_COMMA = re.compile(r"(\d)(\,)(\d)")
_MAX_PERIODS = int(re.UNICODE)  # as published: the flag stands in the place of the number of substitutions
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = ("a", "an", "the")
_CONTRACTION_PAIRS = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't
    hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm
    Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't
    mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've
    oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've
    she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've
    somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's
    thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've
    weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd
    wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've
    whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've
    wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've
    y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
"""
_CONTRACTIONS = dict(re.findall(r"(\S+):(\S+)", _CONTRACTION_PAIRS))


class AnswerVocabulary:
    """Answers by place; none empty, none twice. Raises DataError otherwise."""

    def __init__(self, answers: Iterable[str]):
        self.answers = tuple(answers)
        if not self.answers:
            raise DataError("an answer vocabulary without answers; lower min_count, or give more training questions")
        twice = [answer for answer, number in Counter(self.answers).items() if number > 1 or not answer.strip()]
        if twice:
            raise DataError(f"answer vocabulary: {twice[0]!r} is empty or occurs twice; expected each answer once")
        self._places: dict[str, int] = {}
        for spelled in (self.answers, map(normalise_answer, self.answers)):
            for place, answer in enumerate(spelled):
                self._places.setdefault(answer, place)

    def __len__(self) -> int:
        return len(self.answers)

    def find(self, answer: str) -> int | None:
        """The place of the answer with the same normal form; nothing where that is empty, as of "the"."""
        form = normalise_answer(answer)
        return self._places.get(form) if form else None

    def soft_targets(self, answers: Sequence[str]) -> dict[int, float]:
        """The official accuracy that each place would score on these people's answers, where it is above 0.

        Of ten answers: 0.3, 0.6, 0.9 and 1 for one, two, three and more that agree. All answers are normalised.
        """
        counts = Counter(place for answer in answers if (place := self.find(answer)) is not None)
        return {place: leave_one_out_accuracy(number, len(answers)) for place, number in counts.items()}

    def save(self, path: Path) -> None:
        """A JSON list, that `read_vocabulary` reads."""
        path.write_text(json.dumps(self.answers, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


@lru_cache(maxsize=1 << 16)  # ten people give a question few different answers
def normalise_answer(answer: str) -> str:
    """The official normal form: punctuation, articles and case gone, number words as digits, contractions with apostrophes."""
    return _normalise_words(_strip_punctuation(clean_answer(answer)))


def clean_answer(answer: str) -> str:
    """What the official evaluation does to every answer: one line, no spaces around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out_accuracy(num_matching: int, num_answers: int) -> float:
    """The official accuracy in [0, 1] of an answer that `num_matching` of `num_answers` people gave.

    The mean over the people, each left out in turn, of min(1, matches among the others / 3) (Antol et al., arXiv:1505.00468).
    """
    num_other = num_answers - num_matching
    return (num_matching * min(1.0, (num_matching - 1) / 3) + num_other * min(1.0, num_matching / 3)) / num_answers


def build_vocabulary(main_answers: Iterable[str], *, min_count: int) -> AnswerVocabulary:
    """The answers that are the main one of at least `min_count` questions, most frequent first. Raises DataError for none."""
    spellings: dict[str, Counter[str]] = {}
    for answer in main_answers:
        form = normalise_answer(answer)
        if form:
            spellings.setdefault(form, Counter())[answer.strip()] += 1
    counts = {form: spelled.total() for form, spelled in spellings.items() if spelled.total() >= min_count}
    order = sorted(counts, key=lambda form: (-counts[form], form))
    return AnswerVocabulary(min(spellings[form].items(), key=lambda item: (-item[1], item[0]))[0] for form in order)


def read_vocabulary(path: Path) -> AnswerVocabulary:
    """A JSON list of answers, a JSON object of places by answer, or text with one answer a line. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such answer vocabulary") from error
    except ValueError as error:
        raise DataError(f"{path}: not UTF-8 JSON or text ({error})") from error
    if isinstance(tree, dict) and sorted(tree.values()) == list(range(len(tree))):
        tree = sorted(tree, key=tree.__getitem__)
    if not isinstance(tree, list) or not all(isinstance(answer, str) for answer in tree):
        raise DataError(f"{path}: expected a list of answers, or an object that gives each answer its place from 0 on")
    return AnswerVocabulary(tree)


def _strip_punctuation(text: str) -> str:
    """A mark beside a space goes, another one becomes a space; in a text with a number such as 1,000 all marks go."""
    stripped = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_beside_space or _COMMA.search(text) else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)


def _normalise_words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
