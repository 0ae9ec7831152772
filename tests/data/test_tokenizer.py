"""Tokenizers: ids are `bos ... eos`, nothing a caption says is lost, and a saved one comes back equal."""

from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from sycoca.data.tokenizer import Tokenizer, build_tokenizer, train_word_tokenizer
from sycoca.types import ConfigError

CAPTIONS = ["A small red cube left of a blue ball.", "Two green cones!", "a ball"]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    train_word_tokenizer(CAPTIONS, folder)
    return build_tokenizer(folder)


def test_clip_has_its_known_special_tokens(clip: Tokenizer) -> None:
    assert (clip.vocab_size, clip.bos, clip.eos, clip.pad) == (49408, 49406, 49407, 0)


@pytest.mark.parametrize("text", [*CAPTIONS, "caf\u00e9 &amp; bar", "a  b\tc", "\u6f22\u5b57", "it's 42% o\u2019clock"])
def test_clip_ids_are_those_of_open_clip(clip: Tokenizer, text: str) -> None:
    expected = SimpleTokenizer()([text], context_length=20)[0]
    ids = clip.encode(text, 20)
    assert ids == expected[: len(ids)].tolist()


def test_the_caption_of_an_exclamation_mark_survives_although_it_is_id_0(clip: Tokenizer) -> None:
    token_BL, length_B = clip.tokenize(["!", "a red ball !"], 10)
    assert token_BL[0, :3].tolist() == [49406, 256, 49407]  # 0 is the same mark inside a word
    assert length_B.tolist() == [3, 6]
    assert clip.decode(token_BL[0].tolist()) == "!"
    assert clip.decode([clip.bos, 0, clip.eos, 0, 0]) == "!"


@pytest.mark.parametrize("name", ["clip", "words"])
def test_a_long_text_is_cut_but_ends_with_eos(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("a ball " * 5000, 7)
    assert len(ids) == 7
    assert ids[0] == tokenizer.bos
    assert ids[-1] == tokenizer.eos
    assert tokenizer.eos not in ids[:-1]


@pytest.mark.parametrize("name", ["clip", "words"])
def test_a_caption_cannot_spell_a_special_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("a <end_of_text> <start_of_text> [EOS] [BOS] [PAD] ball", 30)
    assert tokenizer.eos not in ids[:-1]
    assert tokenizer.bos not in ids[1:]


def test_rows_are_padded_to_the_longest_text(words: Tokenizer) -> None:
    token_BL, length_B = words.tokenize(["a ball", "a small red cube"], 30)
    assert token_BL.shape == (2, 6)
    assert length_B.tolist() == [4, 6]
    assert token_BL[0, 4:].tolist() == [words.pad] * 2


def test_decode_stops_at_eos_and_drops_special_tokens(clip: Tokenizer) -> None:
    ids = clip.encode("a red ball", 10)
    assert clip.decode([*ids, *clip.encode("never seen", 10)]) == "a red ball"


def test_words_come_back_readable_and_lower_case(words: Tokenizer) -> None:
    assert words.decode(words.encode(CAPTIONS[0], 30)).replace(" .", ".") == "a small red cube left of a blue ball."


def test_an_unknown_word_is_one_token(words: Tokenizer) -> None:
    assert len(words.encode("zebra", 30)) == 3


@pytest.mark.parametrize("name", ["clip", "words"])
def test_a_saved_tokenizer_comes_back_equal(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    again = build_tokenizer(tmp_path)
    assert again.encode(CAPTIONS[0], 30) == tokenizer.encode(CAPTIONS[0], 30)
    assert (again.vocab_size, again.bos, again.eos, again.pad) == (
        tokenizer.vocab_size,
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
    )


def _save_with(folder: Path, **special: str) -> None:
    inner = WordTokenizer(models.WordLevel({"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special).save_pretrained(str(folder))


def test_a_tokenizer_without_pad_is_refused_by_name(tmp_path: Path) -> None:
    _save_with(tmp_path, bos_token="[BOS]", eos_token="[EOS]")
    with pytest.raises(ConfigError, match=r"no pad;.*pad_token"):
        build_tokenizer(tmp_path)


def test_pad_may_equal_eos(tmp_path: Path) -> None:
    _save_with(tmp_path, bos_token="[BOS]", eos_token="[EOS]", pad_token="[EOS]")
    tokenizer = build_tokenizer(tmp_path)
    assert tokenizer.encode("a", 9) == [1, 3, 2]
    assert tokenizer.pad == tokenizer.eos


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected `clip`"):
        build_tokenizer(tmp_path)
