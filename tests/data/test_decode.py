"""Images of every kind become upright RGB; captions come from where the configuration says."""

from random import Random

import numpy as np
import pytest
from PIL import Image
from shard_maker import encode_image, make_json, save_image

from sycoca.config import parse_config
from sycoca.data.decode import CaptionConfig, SampleError, choose_caption, decode_image, list_captions, read_meta
from sycoca.types import ConfigError


def _decode(data: bytes, *, max_pixels: int = 10_000, max_bytes: int = 100_000, draft_size: int = 0) -> Image.Image:
    return decode_image(data, max_pixels=max_pixels, max_bytes=max_bytes, draft_size=draft_size)


def _reason(data: bytes, **limits: int) -> str:
    with pytest.raises(SampleError) as caught:
        _decode(data, **limits)
    return caught.value.reason


def _pixel(image: Image.Image, x: int = 3, y: int = 2) -> tuple[int, ...]:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)
    return found


def test_bytes_that_are_no_image_are_named_by_what_is_wrong() -> None:
    good = encode_image(size=(60, 40))
    assert _reason(b"") == "empty_image"
    assert _reason(b"<html>not found</html>") == "unsupported_image"
    assert _reason(good[: len(good) // 2]) == "truncated_image"
    assert _reason(good[:12]) == "corrupt_image"
    assert _reason(good, max_bytes=100) == "image_too_many_bytes"
    assert _reason(good, max_pixels=60 * 40 - 1) == "image_too_large"


def test_the_size_is_judged_before_anything_is_decoded() -> None:
    header_only = encode_image(size=(200, 100))[:700]
    assert _reason(header_only, max_pixels=100) == "image_too_large"


def test_a_decompression_bomb_is_refused_by_pillows_guard() -> None:
    header = b"BM" + (54 + 10).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    bomb = header + (60_000).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(34)
    assert _reason(bomb, max_pixels=10**12) == "image_too_large"


def test_cmyk_becomes_rgb() -> None:
    image = _decode(save_image(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = _pixel(image)
    assert image.mode == "RGB"
    assert red > 200 > 60 > max(green, blue)


def test_16_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257 * 100, 65535, 257 * 7]], dtype=np.uint16)
    image = _decode(save_image(Image.fromarray(values), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255, 7]


def test_palette_transparency_lies_on_white() -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    decoded = _decode(save_image(image, "PNG", transparency=0))
    assert _pixel(decoded, 0, 0) == (255, 255, 255)
    assert _pixel(decoded) == (0, 0, 255)


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (200, 0, 0, 0)), ("LA", (90, 0))])
def test_transparent_pixels_become_white(mode: str, color: tuple[int, ...]) -> None:
    assert _pixel(_decode(save_image(Image.new(mode, (8, 6), color), "PNG"))) == (255, 255, 255)


def test_grey_becomes_rgb() -> None:
    assert _pixel(_decode(save_image(Image.new("L", (8, 6), 90), "PNG"))) == (90, 90, 90)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = _decode(save_image(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert _pixel(decoded) == (255, 0, 0)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 10))
    image.paste((255, 255, 255), (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left side is the top
    decoded = _decode(save_image(image, "JPEG", exif=exif, quality=95))
    assert decoded.size == (10, 20)
    assert min(_pixel(decoded, 5, 1)) > 200
    assert max(_pixel(decoded, 5, 15)) < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_image() -> None:
    data = save_image(Image.new("RGB", (20, 10)), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert _decode(data).size == (20, 10)


def test_a_jpeg_twice_too_large_is_decoded_at_half_size() -> None:
    data = encode_image(size=(64, 48))
    assert _decode(data, draft_size=24).size == (32, 24)
    assert _decode(data, draft_size=25).size == (64, 48)
    assert _decode(data).size == (64, 48)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damage_at_any_byte_is_a_sample_error_or_an_image(form: str) -> None:
    good = encode_image(size=(20, 14), form=form)
    generator = Random(0)
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[generator.randrange(min(len(good), 400))] = generator.randrange(256)
        try:
            assert decode_image(bytes(damaged), max_pixels=100_000, max_bytes=10**6, draft_size=8).mode == "RGB"
        except SampleError as error:
            assert error.reason.split("_")[-1] in ("image", "large")  # noqa: PT017  either outcome is right


def _choose(members: dict[str, bytes], **sources: float) -> str:
    names = {name.replace("__", "."): weight for name, weight in sources.items()}
    return choose_caption(members, CaptionConfig(sources=names), Random(0))


def _caption_reason(members: dict[str, bytes], **sources: float) -> str:
    with pytest.raises(SampleError) as caught:
        _choose(members, **sources)
    return caught.value.reason


def test_captions_come_before_caption_before_txt() -> None:
    members = {"txt": b"t", "json": make_json(caption="c", captions=["x"])}
    assert _choose(members) == "x"
    assert _choose({**members, "json": make_json(caption="c")}) == "c"
    assert _choose({**members, "json": make_json(caption=None)}) == "t"
    assert _choose({"txt": b" t \n"}) == "t"


def test_one_of_several_captions_is_drawn_by_the_generator() -> None:
    members = {"json": make_json(captions=["a", "b", "c"])}
    drawn = [choose_caption(members, CaptionConfig(), Random(seed)) for seed in range(60)]
    assert set(drawn) == {"a", "b", "c"}
    assert drawn[7] == choose_caption(members, CaptionConfig(), Random(7))


def test_sources_are_drawn_by_their_weights() -> None:
    members = {"txt": b"t", "json": make_json(alt={"text": "a"})}
    config = CaptionConfig(sources={"txt": 0.75, "json.alt.text": 0.25})
    drawn = [choose_caption(members, config, Random(seed)) for seed in range(400)]
    assert 0.68 < drawn.count("t") / 400 < 0.82
    assert set(drawn) == {"t", "a"}


def test_a_sample_without_one_source_uses_the_others() -> None:
    assert _choose({"txt": b"t"}, txt=0.01, json__alt=1.0) == "t"


def test_unusable_captions_are_named() -> None:
    assert _caption_reason({"txt": b" \n"}) == "empty_caption"
    assert _caption_reason({"json": make_json(captions=["", " "])}) == "empty_caption"
    assert _caption_reason({"json": make_json(width=3)}) == "missing_caption"
    assert _caption_reason({"txt": b"t"}, json__alt=1.0) == "missing_caption"
    assert _caption_reason({"txt": b"\xff\xfe"}) == "bad_text"
    for broken in (b"{", b"[1]", b"\xff", make_json(caption=3), b"[" * 100_000):
        assert _caption_reason({"json": broken}) == "bad_json"


def test_all_captions_are_listed_in_order() -> None:
    members = {"txt": b"t", "json": make_json(captions=["b", "", "a"])}
    meta = read_meta(members)
    assert list_captions(members, meta, CaptionConfig()) == ["b", "a"]
    assert list_captions(members, meta, CaptionConfig(sources={"txt": 1, "json.captions": 1})) == ["t", "b", "a"]


def test_a_source_of_unknown_name_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"`txt` or `json\.<entry>`"):
        parse_config(CaptionConfig, {"sources": {"alt_text": 1.0}}, source="test")
