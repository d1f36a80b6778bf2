"""Pictures: what a person would see is what the model gets, and what hides something is refused."""

import asyncio
import base64
import io
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image as Pillow

from foveate.configs.config import LimitsConfig
from foveate.engine.common import Image
from foveate.server.common.errors import ApiError
from foveate.server.prepare.budget import ImageCap
from foveate.server.prepare.media import Media

SIZE = (20, 10)


class AsItIs:
    identity = "as it is"

    def is_cut(self, n_images: int) -> bool:
        return False

    def prepare_tiles(self, image: Pillow.Image) -> Pillow.Image:
        raise AssertionError("pictures are read whole")

    def prepare(self, image: Pillow.Image) -> Pillow.Image:
        assert image.mode == "RGB"
        return image


@pytest.fixture
def media() -> Iterator[Media]:
    made = Media(AsItIs(), LimitsConfig(image_pixels=10_000, image_mb=1), 1, None)
    yield made
    made.close()


@pytest.fixture
def load(media: Media) -> Any:
    return lambda url: media.read(url, "p", ImageCap(tokens=3), 1)


def colour(image: Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(image.pixels[3 * (y * image.width + x) :][:3])


def halves(mode: str, left: Any, right: Any) -> Pillow.Image:
    image = Pillow.new(mode, SIZE, left)
    image.paste(right, (SIZE[0] // 2, 0, *SIZE))
    return image


def near(found: tuple[int, ...], want: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 6 for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_lossy_formats(load: Any, to_url: Callable[..., str], kind: str) -> None:
    image = load(to_url(halves("RGB", (250, 10, 10), (10, 10, 250)), kind))
    assert (image.width, image.height, image.tokens) == (*SIZE, 3)
    assert near(colour(image, 2, 5), (250, 10, 10)) and near(colour(image, 17, 5), (10, 10, 250))


def test_every_mode_looks_as_it_should(load: Any, to_url: Callable[..., str]) -> None:
    grey16 = Pillow.new("I;16", SIZE, 128 * 257)
    palette = halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(4)
    clear = halves("RGBA", (255, 0, 0, 255), (0, 0, 255, 0))
    see_through = palette.copy()
    see_through.info["transparency"] = palette.getpixel((0, 0))
    cases: list[tuple[Pillow.Image, str, tuple[int, int, int], tuple[int, int, int]]] = [
        (halves("L", 0, 255), "PNG", (0, 0, 0), (255, 255, 255)),
        (halves("1", 0, 1), "PNG", (0, 0, 0), (255, 255, 255)),
        (grey16, "PNG", (128, 128, 128), (128, 128, 128)),
        (palette, "PNG", (255, 0, 0), (0, 0, 255)),
        (clear, "PNG", (255, 0, 0), (255, 255, 255)),
        (clear, "WEBP", (255, 0, 0), (255, 255, 255)),
        (halves("LA", (0, 255), (0, 0)), "PNG", (0, 0, 0), (255, 255, 255)),
        (see_through, "PNG", (255, 255, 255), (0, 0, 255)),
        (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", (255, 0, 0), (0, 0, 255)),
    ]
    for picture, kind, left, right in cases:
        options = {"lossless": True} if kind == "WEBP" else {}
        image = load(to_url(picture, kind, **options))
        assert near(colour(image, 2, 5), left), (picture.mode, kind, colour(image, 2, 5))
        assert near(colour(image, 17, 5), right), (picture.mode, kind, colour(image, 17, 5))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_turns_the_picture(load: Any, to_url: Callable[..., str], kind: str) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = load(to_url(halves("RGB", (250, 10, 10), (10, 10, 250)), kind, exif=exif))
    assert (image.width, image.height) == (10, 20)
    assert near(colour(image, 5, 2), (250, 10, 10)) and near(colour(image, 5, 17), (10, 10, 250))


def test_a_picture_with_broken_exif_or_of_one_pixel_is_used(load: Any, to_url: Callable[..., str]) -> None:
    for kind in ("PNG", "JPEG"):
        image = load(to_url(halves("RGB", (250, 10, 10), (10, 10, 250)), kind, exif=b"Exif\0\0garbage!"))
        assert near(colour(image, 2, 5), (250, 10, 10))
    assert load(to_url(Pillow.new("RGB", (1, 1), (9, 9, 9)))).width >= 1


def test_of_several_frames_the_first(load: Any, to_url: Callable[..., str]) -> None:
    first, second = Pillow.new("RGB", SIZE, (255, 0, 0)), Pillow.new("RGB", SIZE, (0, 255, 0))
    for kind in ("PNG", "WEBP"):
        image = load(to_url(first, kind, save_all=True, append_images=[second]))
        assert near(colour(image, 5, 5), (255, 0, 0))


def test_the_digest_covers_shape_and_processor(to_url: Callable[..., str]) -> None:
    class Other(AsItIs):
        identity = "other"

    digests = set()
    for processor in (AsItIs(), Other()):
        media = Media(processor, LimitsConfig(), 1, None)
        for size in ((4, 8), (8, 4)):
            url = to_url(Pillow.new("RGB", size, (9, 9, 9)))
            digests.add(media.read(url, "p", ImageCap(), 1).digest)
            assert media.read(url, "p", ImageCap(tokens=1), 1).digest in digests
        media.close()
    assert len(digests) == 4 and all(len(digest) == 32 for digest in digests)


def raw_png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def saved(kind: str, size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Pillow.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (url_of(raw_png(20_000, 20_000)), "pixels"),
        (url_of(raw_png(101, 100)), "limits.image_pixels"),
        (url_of(raw_png(2**31 - 1, 2**31 - 1)), "pixels"),
        (url_of(raw_png(50, 50, b"\0" * 10)), "broken"),
        (url_of(saved("PNG")[:-40]), "broken"),
        (url_of(saved("JPEG")[:100]), "broken"),
        (url_of(saved("JPEG")[:-20]), "broken"),
        (url_of(saved("WEBP")[:60]), "broken"),
        (url_of(saved("GIF")[:-60]), "broken"),
        (url_of(saved("GIF", (101, 100))), "limits.image_pixels"),
        (url_of(saved("WEBP", (101, 100))), "limits.image_pixels"),
        (url_of(saved("BMP")), "limits.image_formats"),
        (url_of(saved("TIFF")), "limits.image_formats"),
        (url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "SVG is not supported"),
        (url_of(b"hello", "text/plain"), "not a PNG, JPEG, WebP or GIF picture"),
        ("data:image/png;base64,", "not a PNG"),
        ("data:image/png;base64", "comma"),
        ("data:image/png,abc", "not a PNG"),
        ("picture.png", "expected a data URL"),
        ("file:///etc/hostname", "expected a data URL"),
        ("data:image/png;base64," + "A" * 1_500_000, "limits.image_mb"),
        ("data:image/png," + "A" * 1_500_000, "limits.image_mb"),
    ],
)  # fmt: skip
def test_what_is_refused(media: Media, url: str, word: str) -> None:
    """Quickly, by the path of the part, and without a word of the decoder's."""
    started = time.monotonic()
    with pytest.raises(ApiError) as caught:
        asyncio.run(media.load(url, "messages[0].content[1]", ImageCap(), 1))
    error = caught.value
    assert word in error.message and (error.code, error.param) == ("invalid_image", "messages[0].content[1]")
    assert error.message.startswith("messages[0].content[1]: ")
    assert "0x" not in error.message and len(error.message) < 220
    assert time.monotonic() - started < 2


def test_a_wrong_label_of_a_known_kind_does_not_matter(load: Any) -> None:
    assert load(url_of(saved("JPEG"), "image/png")).width == 20


def test_other_work_goes_on_while_pictures_decode(media: Media) -> None:
    """A picture of 3 million pixels, in a long URL that must be unescaped."""
    picture = saved("PNG", (2000, 1500))
    url = url_of(picture).replace("A", "%41")
    media = Media(AsItIs(), LimitsConfig(), 1, None)
    gaps: list[float] = []

    async def main() -> None:
        loading = asyncio.create_task(media.load(url, "p", ImageCap(), 1))
        while not loading.done():
            before = time.monotonic()
            await asyncio.sleep(0.002)
            gaps.append(time.monotonic() - before)
        assert (await loading).width == 2000

    asyncio.run(main())
    media.close()
    assert len(gaps) > 20 and sum(gap > 0.1 for gap in gaps) <= 3, sorted(gaps)[-5:]
