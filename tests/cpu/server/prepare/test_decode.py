"""Sound pictures are read, and as Pillow alone reads them; others are refused by what they are."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image as Pillow
from PIL import ImageChops, ImageOps, ImageStat, PngImagePlugin

from foveate.configs.config import IMAGE_FORMATS, LimitsConfig
from foveate.configs.errors import ConfigError
from foveate.engine.common import ImageError
from foveate.engine.images.preprocess import ImageProcessor
from foveate.server.prepare.decode import decode
from foveate.server.prepare.strip import read_orientation

Encode = Callable[..., bytes]
EVERY = LimitsConfig(image_formats=IMAGE_FORMATS)
SIZE = (61, 47)
HALF = (0.5, 0.5, 0.5)


def reference(encoded: bytes) -> Pillow.Image:
    """As `transformers.image_utils.load_image`."""
    return ImageOps.exif_transpose(Pillow.open(io.BytesIO(encoded))).convert("RGB")


def equal(one: Pillow.Image, other: Pillow.Image) -> bool:
    return (one.size, one.mode, one.tobytes()) == (other.size, other.mode, other.tobytes())


def difference(one: Pillow.Image, other: Pillow.Image) -> float:
    """The mean over all levels of 0 to 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def in_mode(photo: Any, mode: str) -> Pillow.Image:
    return photo(*SIZE).quantize(30) if mode == "P" else photo(*SIZE).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("JPEG", "RGB"),
     ("JPEG", "L"), ("JPEG", "CMYK"), ("JPEG", "YCbCr"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("MPO", "RGB"),
     ("TIFF", "RGB"), ("TIFF", "CMYK"), ("TIFF", "L"), ("TIFF", "F")],
)  # fmt: skip
def test_every_mode_and_orientation_as_pillow_alone(
    photo: Any, encode: Encode, kind: str, mode: str, orientation: int
) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    more = {"save_all": True, "append_images": [photo(*SIZE)]} if kind == "MPO" else {}
    encoded = encode(in_mode(photo, mode), kind, exif=exif, **more)
    assert equal(decode(encoded, EVERY), reference(encoded))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0, "quality": 95}), ("PNG", {"bits": 2}),
     ("GIF", {"interlace": 1}), ("GIF", {"save_all": True}), ("BMP", {}), ("PNG", {"save_all": True}),
     ("PNG", {"save_all": True, "default_image": True}), ("WEBP", {"save_all": True}),
     ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"})],
)  # fmt: skip
def test_every_way_to_store_as_pillow_alone(photo: Any, encode: Encode, kind: str, options: dict[str, Any]) -> None:
    picture = photo(*SIZE)
    if "bits" in options:
        picture = picture.quantize(4)
    if "save_all" in options:
        options = options | {"append_images": [Pillow.new("RGB", SIZE, "red")]}
    encoded = encode(picture, kind, **options)
    assert equal(decode(encoded, EVERY), reference(encoded))
    assert equal(decode(encoded + bytes(1000), EVERY), reference(encoded)), "what follows the picture does not matter"


def test_a_see_through_gif_lies_on_white(encode: Encode) -> None:
    frames = [Pillow.new("RGBA", SIZE, colour) for colour in ((255, 0, 0, 255), (0, 255, 0, 255))]
    frames[0].paste((0, 0, 0, 0), (30, 0, *SIZE))
    for more in ({}, {"save_all": True, "append_images": frames[1:]}):
        picture = decode(encode(frames[0], "GIF", **more), LimitsConfig())
        assert (picture.getpixel((10, 10)), picture.getpixel((50, 10))) == ((255, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", [0, 2])
def test_the_transparent_colour_in_every_depth(make_png: Any, png_chunk: Any, bits: int, kind: int) -> None:
    """One pixel has the transparent colour; others differ from it by one level."""
    if kind == 2 and bits < 8:
        pytest.skip("a PNG of colours has 8 or 16 bits")
    most = 2**bits - 1
    key = most - 1 if bits > 1 else 0
    n_levels = 1 if kind == 0 else 3
    pixels = [
        [key] * n_levels,
        [key + 1] * n_levels,
        [key] * (n_levels - 1) + [most if n_levels > 1 or bits == 1 else 0],
    ]
    levels = [level for pixel in pixels for level in pixel]
    if bits == 16:
        rows = struct.pack(f">{len(levels)}H", *levels)
    else:
        packed = sum(level << (bits * (len(levels) - 1 - i)) for i, level in enumerate(levels))
        n_bytes = -(-bits * len(levels) // 8)
        rows = (packed << (8 * n_bytes - bits * len(levels))).to_bytes(n_bytes)
    # The unused upper bits of an entry may hold anything.
    entry = [key | (0xFF00 if bits == 8 else 0)] * n_levels
    encoded = make_png(3, 1, bits, kind, rows, [png_chunk(b"tRNS", struct.pack(f">{n_levels}H", *entry))])
    picture = decode(encoded, LimitsConfig())
    shown = [round(255 * level / most) if bits < 16 else level >> 8 for level in levels]
    opaque = [tuple(shown[i : i + n_levels] * (1 if kind else 3)) for i in range(n_levels, len(shown), n_levels)]
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), *opaque]


def ballast(png_chunk: Any) -> dict[str, list[bytes]]:
    """Ancillary chunks of a PNG that Pillow stumbles over."""
    long = zlib.compress(bytes(3_000_000))
    noise = random.Random(1).randbytes(1_500_000)
    return {
        "long ICC": [png_chunk(b"iCCP", b"profile\0\0" + long)],
        "long zTXt": [png_chunk(b"zTXt", b"Comment\0\0" + long)],
        "long iTXt": [png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + long)],
        "long XMP": [png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long)],
        "long EXIF": [png_chunk(b"zTXt", b"Raw profile type exif\0\0" + long)],
        "much text": [png_chunk(b"tEXt", b"Comment\0" + noise)] * 50,
        "unknown method": [png_chunk(b"zTXt", b"Comment\0\7" + long), png_chunk(b"iCCP", b"profile\0\7" + long)],
        "no end of keyword": [png_chunk(b"iCCP", b"profile"), png_chunk(b"zTXt", b""), png_chunk(b"iTXt", b"XML")],
        "wrong checksums": [
            png_chunk(name, bytes(40), 7) for name in (b"tEXt", b"tIME", b"pHYs", b"eXIf", b"tRNS", b"prVt")
        ],
        "too short": [
            png_chunk(name, b"\1") for name in (b"tRNS", b"gAMA", b"cHRM", b"pHYs", b"acTL", b"fcTL", b"fdAT")
        ],
        "broken animation": [png_chunk(b"acTL", bytes(8)), png_chunk(b"fcTL", b"\xff" * 26)],
        "wrong letters": [png_chunk(b"te\xe9t", b"x"), png_chunk(b"\0\0\0\0", b"x")],
    }


@pytest.mark.parametrize("name", ballast(lambda *_: b""))
def test_what_nobody_reads_does_not_break_a_png(make_png: Any, png_chunk: Any, name: str) -> None:
    rows = random.Random(2).randbytes(3 * 20 * 10)
    plain, laden = (make_png(20, 10, 8, 2, rows, more) for more in ([], ballast(png_chunk)[name]))
    assert equal(decode(laden, LimitsConfig()), reference(plain))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE"])
def test_a_wrong_checksum_of_what_is_read_is_refused(photo: Any, encode: Encode, name: bytes) -> None:
    encoded = bytearray(encode(photo(*SIZE).quantize(30), "PNG"))
    at = encoded.index(name)
    encoded[at + 4 + int.from_bytes(encoded[at - 4 : at])] ^= 1
    with pytest.raises(ImageError, match="broken"):
        decode(bytes(encoded), LimitsConfig())


def test_orientation_in_the_places_where_programs_write_it(photo: Any, encode: Encode) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 8
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    in_text, in_xmp = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    hexadecimal = exif.tobytes().hex()
    in_text.add_text("Raw profile type exif", f"\nexif\n  {len(hexadecimal) // 2}\n{hexadecimal}\n", zip=True)
    in_xmp.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    for kind, options in (
        ("PNG", {"pnginfo": in_text}), ("PNG", {"pnginfo": in_xmp}), ("JPEG", {"xmp": xmp.encode()}),
        ("WEBP", {"xmp": xmp.encode()}), ("JPEG", {"xmp": xmp.encode(), "exif": exif}),
    ):  # fmt: skip
        encoded = encode(photo(*SIZE), kind, **options)
        assert equal(decode(encoded, LimitsConfig()), reference(encoded)), (kind, options)
        assert reference(encoded).size == SIZE[::-1], "the reference turns the picture too"


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_is_found_in_any_order_and_width(order: str) -> None:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    for kind, value in ((3, struct.pack(f"{order}HH", 6, 0)), (4, struct.pack(f"{order}I", 6))):
        entries = (
            struct.pack(f"{order}HHI4s", 0x010F, 2, 4, b"cam\0") + struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
        )
        exif = magic + struct.pack(f"{order}IH", 8, 2) + entries
        assert read_orientation(exif) == read_orientation(b"Exif\0\0" + exif) == 6
        assert all(read_orientation(exif[:n]) in (1, 6) for n in range(len(exif))), "cut off anywhere"
    assert read_orientation(b"garbage") == 1


@pytest.mark.parametrize(("orientation", "limit"), [(1, 50_000), (6, 50_000), (6, 200_000), (8, 3_100), (3, 12_000)])
def test_a_photo_above_the_limit_is_decoded_smaller(photo: Any, encode: Encode, orientation: int, limit: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    encoded = encode(photo(500, 381), "JPEG", quality=90, exif=exif)
    small, whole = decode(encoded, LimitsConfig(image_pixels=limit)), decode(encoded, LimitsConfig())
    scale = next(s for s in (1, 2, 4, 8) if 500 * 381 <= s * s * limit)
    expected = tuple(-(-edge // scale) for edge in whole.size)
    assert small.size == expected and whole.size == ((500, 381) if orientation in (1, 3) else (381, 500))
    assert equal(small, whole) == (scale == 1)
    assert difference(small, whole.resize(small.size, Pillow.Resampling.BOX)) < 4


def test_a_reduced_photo_is_prepared_nearly_as_the_whole_one(photo: Any, encode: Encode) -> None:
    """At the resolution of a tower, the mean difference is below one of 255 levels."""
    encoded = encode(photo(4096, 3072), "JPEG", quality=90)
    clip = ImageProcessor(rule="short_edge", size=(336, 336), crop=(336, 336), mean=HALF, std=HALF)
    smart = ImageProcessor(rule="smart", size=(56 * 56, 1_000_000), factor=28, mean=HALF, std=HALF)
    for processor in (clip, smart):
        whole = processor.prepare(decode(encoded, LimitsConfig()))
        small = processor.prepare(decode(encoded, LimitsConfig(image_pixels=10_000_000)))
        assert whole.size == small.size and not equal(whole, small)
        assert difference(whole, small) < 1


def test_only_jpeg_is_decoded_smaller(photo: Any, encode: Encode) -> None:
    small = LimitsConfig(image_pixels=1_000, image_formats=IMAGE_FORMATS)
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        with pytest.raises(ImageError, match="61 x 47 = 2867 pixels are more than limits.image_pixels 1000"):
            decode(encode(photo(*SIZE), kind), small)
    with pytest.raises(ImageError, match="limits.jpeg_pixels 2000"):
        decode(encode(photo(*SIZE), "JPEG"), replace(small, jpeg_pixels=2_000))
    with pytest.raises(ImageError, match="limits.image_pixels 30 even at an eighth"):
        decode(encode(photo(*SIZE), "JPEG"), replace(small, image_pixels=30))


def test_a_jpeg_without_its_end_marker_is_read_and_a_shorter_one_is_not(photo: Any, encode: Encode) -> None:
    for options in ({}, {"progressive": True}, {"optimize": True, "quality": 30}):
        encoded = encode(photo(*SIZE), "JPEG", **options)
        assert equal(decode(encoded[:-2], LimitsConfig()), reference(encoded))
        for n in (10, len(encoded) // 4, len(encoded) // 2):
            with pytest.raises(ImageError, match="broken or cut off"):
                decode(encoded[:-n], LimitsConfig())


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicheix", "HEIC"),
     (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF"), (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
     (b"\xef\xbb\xbf \n<?xml version='1.0'?>\n<!-- drawn --><svg/>", "SVG"), (b"<svg></svg>", "SVG"),
     (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"%PDF-1.7", "PDF"),
     (b"<!DOCTYPE html><html><svg>", "HTML"), (b"\n<html>not found", "HTML"), (b"\0\0\0\x20ftypisom", "video"),
     (b"\0\0\1\0\1\0", "ICO"), (b"8BPS\0\1", "PSD")],
)  # fmt: skip
def test_what_is_not_supported_is_named_with_the_remedy(start: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"^{name} is not supported; send a picture as PNG, JPEG, WebP or GIF$"):
        decode(start + bytes(100), LimitsConfig())


def test_formats_are_a_setting(photo: Any, encode: Encode) -> None:
    for kind, names in (("BMP", "bmp"), ("TIFF", "tiff"), ("PNG", "png")):
        encoded = encode(photo(*SIZE), kind)
        assert equal(decode(encoded, LimitsConfig(image_formats=(names,))), reference(encoded))
        with pytest.raises(
            ImageError, match=f"{kind} pictures are switched off; .* or add {names} to limits.image_formats"
        ):
            decode(encoded, LimitsConfig(image_formats=("jpeg", "webp")))
    for wrong in (("png", "heic"), ("PNG",), ()):
        with pytest.raises(ConfigError, match=r"limits.image_formats: .*png, jpeg, webp, gif, bmp, tiff"):
            LimitsConfig(image_formats=wrong)
