"""Load the images of requests: from a URL to RGB pixels of the vision tower's input size.

The parts: `unpack` reads data URLs, `formats` tells formats apart, `strip` drops what nobody reads of a file, `decode`
decodes within limits.image_pixels.
"""

import asyncio
import hashlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

from PIL import Image as Pillow

from foveate.configs.config import LimitsConfig
from foveate.engine.common import Image, RequestError
from foveate.server.common.errors import ApiError
from foveate.server.prepare.budget import ImageCap
from foveate.server.prepare.decode import decode
from foveate.server.prepare.unpack import is_inline, unpack

MEGABYTE = 1024 * 1024
Args = TypeVarTuple("Args")
R = TypeVar("R")


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
        # Texts wait for no picture: one of 200 million pixels takes seconds.
        self._texts = ThreadPoolExecutor(2, thread_name_prefix="texts")
        # Pillow's global limit: `open` warns above the limit and raises above twice the limit.
        Pillow.MAX_IMAGE_PIXELS = limits.image_pixels
        # Python remembers each distinct text of a warning for good, and these texts hold numbers of the client's file.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

    async def load(self, url: str, param: str, cap: ImageCap, n_images: int) -> Image:
        """Fetch or unpack, decode, preprocess and hash one image.

        Args:
            param: path of the URL in the request, for error messages.
            n_images: number of images in the request. Some models cut an image into tiles only if it is the only one.

        Raises:
            ApiError: the URL or the image is unusable.
        """
        data: bytes | str = url if is_inline(url) else await self._fetched(url.strip(), param)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self.read, data, param, cap, n_images)

    async def run(self, function: Callable[[Unpack[Args]], R], *args: *Args) -> R:
        """Run a slow function on texts in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, function, *args)

    def close(self) -> None:
        for pool in (self._pool, self._texts):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _fetched(self, url: str, param: str) -> bytes:
        if not url[:8].lower().startswith(("http://", "https://")):
            raise bad_image(param, "expected a data URL (data:image/png;base64,...) or an http(s) URL")
        if self._fetch is None:
            raise bad_image(param, "http(s) URLs are switched off; send a data URL, or set server.image_urls=true")
        return await self._fetch(url, param)

    def read(self, data: bytes | str, param: str, cap: ImageCap, n_images: int) -> Image:
        """Like `load`, for an encoded image or a data URL, in the calling thread."""
        cut = self._processor.is_cut(n_images)
        try:
            encoded = unpack(data, self._limits.image_mb * MEGABYTE) if isinstance(data, str) else data
            picture = decode(encoded, self._limits)
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
