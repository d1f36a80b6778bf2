"""Load the images of requests: from a URL to RGB pixels of the vision tower's input size.

Refuses formats other than PNG, JPEG and WebP (whatever the URL says), images with more pixels than limits.image_pixels
(read from the header, before decoding), and files with more bytes than limits.image_mb. Clients never see the decoder's
error messages, because such messages have leaked memory addresses in other projects.
"""

import asyncio
import base64
import binascii
import hashlib
import io
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

from PIL import Image as Pillow
from PIL import ImageOps

from foveate.configs.config import LimitsConfig
from foveate.engine.common import Image, RequestError
from foveate.server.common.errors import ApiError
from foveate.server.prepare.budget import ImageCap

log = logging.getLogger("foveate.server.prepare.media")

MEGABYTE = 1024 * 1024
_DATA_URL = re.compile(r"data:([A-Za-z0-9.+/-]*)((?:;[A-Za-z0-9=_.\"-]+)*?)(;base64)?,", re.IGNORECASE)
Args = TypeVarTuple("Args")
R = TypeVar("R")
_MEDIA_TYPES = {"image/png", "image/jpeg", "image/jpg", "image/webp"}


class Processor(Protocol):
    """The members of `engine.preprocess.ImageProcessor` that this module uses."""

    @property
    def identity(self) -> str: ...

    def is_cut(self, n_images: int) -> bool: ...

    def prepare(self, image: Pillow.Image) -> Pillow.Image: ...

    def prepare_tiles(self, image: Pillow.Image) -> Pillow.Image: ...


class Fetch(Protocol):
    """Downloads an http(s) URL. `fetch.Fetcher` if server.image_urls is on."""

    async def __call__(self, url: str, param: str) -> bytes: ...

    async def aclose(self) -> None: ...


def bad_image(param: str, why: str) -> ApiError:
    return ApiError(f"{param}: {why}", param, "invalid_image")


class Media:
    """Loads images in a thread pool. Decoding and resizing release the interpreter lock."""

    def __init__(self, processor: Processor, limits: LimitsConfig, n_workers: int, fetch: Fetch | None) -> None:
        self._processor = processor
        self._limits = limits
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(n_workers, thread_name_prefix="media")
        # Pillow's global limit: `open` warns above the limit and raises above twice the limit.
        Pillow.MAX_IMAGE_PIXELS = limits.image_pixels

    async def load(self, url: str, param: str, cap: ImageCap, n_images: int) -> Image:
        """Fetch or unpack, decode, preprocess and hash one image.

        Args:
            param: path of the URL in the request, for error messages.
            n_images: number of images in the request. Some models cut an image into tiles only if it is the only one.

        Raises:
            ApiError: the URL or the image is unusable.
        """
        data: bytes | str = url
        if not url[:5].lower() == "data:":
            data = await self._fetched(url, param)
        return await self.run(self.read, data, param, cap, n_images)

    async def run(self, function: Callable[[Unpack[Args]], R], *args: *Args) -> R:
        """Run a slow function in the thread pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _fetched(self, url: str, param: str) -> bytes:
        if not url[:8].lower().startswith(("http://", "https://")):
            raise bad_image(param, "expected a data URL (data:image/png;base64,...) or an http(s) URL")
        if self._fetch is None:
            raise bad_image(param, "http(s) URLs are switched off; send a data URL, or set server.image_urls=true")
        return await self._fetch(url, param)

    def read(self, data: bytes | str, param: str, cap: ImageCap, n_images: int) -> Image:
        """Like `load`, for an encoded image or a data URL, in the calling thread."""
        encoded = self._unpack(data, param) if isinstance(data, str) else data
        picture = self._decode(encoded, param)
        cut = self._processor.is_cut(n_images)
        try:
            prepared = self._processor.prepare_tiles(picture) if cut else self._processor.prepare(picture)
        except RequestError as error:
            raise ApiError(f"{param}: {error}", param, error.code) from None
        pixels = prepared.tobytes()
        assert prepared.mode == "RGB" and len(pixels) == 3 * prepared.width * prepared.height, "prepared to RGB"
        original = (picture.height, picture.width) if cut else None
        header = f"{prepared.width} {prepared.height} {prepared.mode} {original} {self._processor.identity}\0"
        return Image(
            pixels=pixels,
            height=prepared.height,
            width=prepared.width,
            digest=hashlib.sha256(header.encode() + pixels).digest(),
            tokens=cap.tokens,
            ratio=cap.ratio,
            original=original,
        )

    def _unpack(self, url: str, param: str) -> bytes:
        """Return the bytes of a data URL. The size check precedes decoding."""
        head = _DATA_URL.match(url[:256])
        if head is None or head[3] is None:
            raise bad_image(param, "not a base64 data URL; expected data:image/png;base64,...")
        if head[1].lower() not in _MEDIA_TYPES:
            raise bad_image(param, "only image/png, image/jpeg and image/webp are supported")
        n_bytes = (len(url) - head.end()) * 3 // 4
        if n_bytes > self._limits.image_mb * MEGABYTE:
            raise bad_image(param, f"{n_bytes} bytes are more than limits.image_mb {self._limits.image_mb}")
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise bad_image(param, "the base64 of the data URL is broken") from None

    def _decode(self, encoded: bytes, param: str) -> Pillow.Image:
        name = _format(encoded)
        if name is None:
            raise bad_image(param, "not a PNG, JPEG or WebP picture")
        try:
            with Pillow.open(io.BytesIO(encoded), formats=(name,)) as picture:
                self._check_size(picture, param)
                picture.load()
                return _flatten(_upright(picture))
        except ApiError:
            raise
        except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
            raise bad_image(param, f"more pixels than limits.image_pixels {self._limits.image_pixels}") from None
        except Exception as error:  # Pillow's readers raise anything on broken data
            log.info("a %s picture of %d bytes does not decode: %r", name, len(encoded), error)
            raise bad_image(param, f"the {name} picture is broken or cut off") from None

    def _check_size(self, picture: Pillow.Image, param: str) -> None:
        width, height = picture.size
        if width * height > self._limits.image_pixels:
            limit = f"limits.image_pixels {self._limits.image_pixels}"
            raise bad_image(param, f"{width} x {height} = {width * height} pixels are more than {limit}")


def _format(encoded: bytes) -> str | None:
    """Detect the format from the first bytes. The media type that the client states is ignored."""
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if encoded.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WEBP"
    return None


def _upright(picture: Pillow.Image) -> Pillow.Image:
    """Rotate the image by its EXIF orientation. Like browsers, leave the image unchanged if the EXIF is unreadable."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's reader of EXIF raises anything on broken data
        log.info("the EXIF of a picture does not parse: %r", error)
        return picture


def _flatten(picture: Pillow.Image) -> Pillow.Image:
    """Convert to RGB. Transparent pixels are composited over white, so the model sees what a person sees."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        picture = picture.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Pillow.new("RGBA", picture.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, picture).convert("RGB")
