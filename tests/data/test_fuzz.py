"""Mutated shards, images, texts and JSON: never a crash, a hang or unbounded memory; each sample is yielded or counted.

The ordinary run mutates hundreds of members, the soak run (`make soak`) more than 10,000.
"""

import io
import json
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_maker import encode_image, make_config, save_image

from sycoca.data.pipeline import DataConfig, build_eval_loader, build_train_loader
from sycoca.data.tokenizer import Tokenizer, build_tokenizer

SECONDS = 120
"""For one example on a busy machine, before it counts as a hang."""
NUM_SAMPLES = 6
MAX_GROWTH = 400 * 2**20
"""Bytes by which the process may grow over all examples; images of 10^9 pixels are among them."""

IMAGES = {
    "jpg": encode_image(1, size=(40, 30)),
    "png": save_image(Image.new("RGBA", (20, 30), (1, 2, 3, 4)), "PNG"),
    "webp": save_image(Image.new("RGB", (20, 30), 77), "WEBP"),
    "jpeg": save_image(Image.new("CMYK", (20, 30)), "JPEG"),
}
ODD_IMAGES = [
    b"", b"RIFF", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(30), b"<svg/>", b"BM" + b"\xff" * 60,
    b"II*\0" + b"\x09" * 50,
    IMAGES["png"][:16] + (100_000).to_bytes(4, "big") * 2 + IMAGES["png"][24:],  # says it has 10^10 pixels
]  # fmt: skip
TEXTS = [
    b"a photo", b"", b" \n\t", b"\xff\xfe\x00", b"\xef\xbb\xbfbom", b"\x00" * 40, "\u202e\U0001f9ff\u0301".encode() * 30,
    b"w " * 20_000,
]  # fmt: skip
JSONS = [
    b"{", b"[]", b"null", b"[" * 30_000, b'{"caption": ' * 5_000, b'{"caption": 1}', b'{"captions": ["a", 2]}',
    b'{"captions": {}}', b'{"caption": "\\ud800"}', b'{"caption": NaN}', b'{"captions": []}',
    b'{"caption": "x", "caption": null}', b"\xff\xfe{\x00}\x00", b'{"n": ' + b"9" * 6_000 + b"}",
    json.dumps({"captions": ["one", "two"], "n": 10**400}).encode(),
]  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


def _mutate(data: bytes, generator: Random) -> bytes:
    """A few bytes flipped, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(generator.choice([0, 1, 1, 2, 5])):
        place = generator.randrange(len(changed) + 1)
        span = generator.choice([1, 2, 7, 64, 512])
        kind = generator.randrange(4)
        if kind == 0:
            changed[place : place + span] = generator.randbytes(min(span, len(changed) - place))
        elif kind == 1:
            del changed[place : place + span]
        elif kind == 2:
            changed[place:place] = changed[place : place + span]
        else:
            changed[place:place] = generator.randbytes(span)
    return bytes(changed)


def _members(number: int, generator: Random) -> list[tuple[str, bytes]]:
    """Of one sample: one to four files, whose key no other sample has."""
    key = generator.choice(["", "d/", "./", "é/", "x" * 120 + "/"]) + f"k{number}"
    extension = generator.choice(list(IMAGES))
    image = generator.choice(ODD_IMAGES) if generator.random() < 0.2 else IMAGES[extension]
    choices = [
        (f"{key}.{extension}", _mutate(image, generator)),
        (f"{key}.txt", _mutate(generator.choice(TEXTS), generator)),
        (f"{key}.json", _mutate(generator.choice(JSONS), generator)),
        (f"{key}.{generator.choice(['cls', 'a.b', 'JPG.txt', ' '])}", generator.randbytes(9)),
    ]
    return generator.sample(choices, generator.choice([1, 2, 2, 3, 4])) if generator.random() < 0.3 else choices[:3]


def _write(path: Path, rows: list[tuple[str, bytes]], generator: Random) -> None:
    stream = io.BytesIO()
    form = generator.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, data in rows:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), generator.choice([0, 10**9])
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(stream.getvalue())


def _config(folder: Path) -> DataConfig:
    return make_config(folder, batch_size=1, max_pixels=10_000, max_bytes=100_000, max_tokens=9, max_bad_share=1.0)


def _read_once(folder: Path) -> tuple[list[str], int]:
    """Keys and number of dropped samples of one pass; with the sound last sample every count has been told."""
    keys: list[str] = []
    num_dropped = 0
    for batch in build_eval_loader(_config(folder), rank=0, world_size=1, batch_size=1):
        keys += batch["key"]
        assert batch["image"].isfinite().all()
        num_dropped += sum(batch["num_dropped"].values())
    return keys, num_dropped


def _train_once(folder: Path, clip: Tokenizer) -> list[str]:
    keys: list[str] = []
    for batch in build_train_loader(_config(folder), clip, seed=0, rank=0, world_size=1):
        if batch["position"]["epoch"]:
            return keys
        keys += batch["key"]
    raise AssertionError("the stream has no end")


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"one example took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _examples(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=quiet, database=None)


def _check(seed: int, breaks_tar: bool, folder: Path, clip: Tokenizer) -> int:
    """One shard of mutated samples, of which the sound last one must come out; the number of mutated members."""
    generator = Random(seed)
    shard = folder / "a.tar"
    samples = [_members(number, generator) for number in range(NUM_SAMPLES)]
    sound = [("sound.jpg", IMAGES["jpg"]), ("sound.txt", b"a photo")]
    _write(shard, [row for rows in samples for row in rows] + sound, generator)
    if breaks_tar:
        shard.write_bytes(_mutate(shard.read_bytes(), generator))
        (folder / "z.tar").unlink(missing_ok=True)
        _write(folder / "z.tar", [("end.jpg", IMAGES["jpg"]), ("end.txt", b"a photo")], generator)
    last = "end" if breaks_tar else "sound"
    keys, num_dropped = _read_once(folder)
    assert keys[-1] == last
    assert last in _train_once(folder, clip)
    if not breaks_tar:
        assert len(keys) + num_dropped == NUM_SAMPLES + 1
    elif len(keys) + num_dropped < NUM_SAMPLES + 2:
        assert num_dropped > 0
    return sum(map(len, samples))


def _fuzz(num_examples: int, folder: Path, clip: Tokenizer) -> int:
    num_members = [0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @_examples(num_examples)
    @given(seed=st.integers(0, 2**40), breaks_tar=st.booleans())
    def run(seed: int, breaks_tar: bool) -> None:
        for path in folder.iterdir():
            path.unlink()
        with _time_limit(SECONDS):
            num_members[0] += _check(seed, breaks_tar, folder, clip)

    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MAX_GROWTH
    return num_members[0]


def test_hundreds_of_mutated_members_are_yielded_or_counted(tmp_path: Path, clip: Tokenizer) -> None:
    assert _fuzz(24, tmp_path, clip) >= 300


@pytest.mark.soak
def test_ten_thousand_mutated_members_are_yielded_or_counted(tmp_path: Path, clip: Tokenizer) -> None:
    assert _fuzz(700, tmp_path, clip) >= 10_000
