"""Decode a picture to upright RGB, as `Image.open(...).convert("RGB")` would, in bounded memory.

Transparent pixels are laid over white, so that the model sees what a person sees. The first frame counts. A JPEG with
more pixels than limits.image_pixels is decoded at a half, a quarter or an eighth of its width and height. Pillow's own
messages never reach a client, because such messages have leaked memory addresses in other projects.
"""

import io
import logging
import struct
from collections.abc import Callable

from PIL import BmpImagePlugin, GifImagePlugin, ImageChops, TiffImagePlugin, WebPImagePlugin
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from foveate.configs.config import LimitsConfig
from foveate.engine.common import ImageError
from foveate.server.prepare.formats import check_format
from foveate.server.prepare.strip import Stripped, read_orientation, strip_jpeg, strip_png

log = logging.getLogger("foveate.server.prepare.decode")

_BAND_PIXELS = 2**20  # converted at a time: conversions keep the interpreter lock
_SCANS = 100  # of a JPEG. Encoders write about ten; each costs a pass over all blocks, however few its bytes
_HELD_BYTES = 16  # for each of limits.image_pixels: coefficients of a JPEG in several scans
_STRIP_TAGS = (273, 324)  # offsets of strips and of tiles
_STRIPS = 100_000  # of a TIFF; Pillow makes an object for each
_SCALES = (1, 2, 4, 8)  # of a JPEG's decoder
_WHITE = (255, 255, 255, 255)
_END_OF_JPEG = b"\xff\xd9"
_TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}


def decode(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    """Return the picture in mode RGB. Memory: at most 20 bytes for each of limits.image_pixels, besides the file.

    Raises:
        ImageError: the format is refused, the picture is too large, or broken or cut off.
    """
    name = check_format(encoded, limits.image_formats)
    try:
        return _READERS[name](encoded, limits)
    except ImageError:
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise ImageError(f"more pixels than limits.image_pixels {limits.image_pixels}") from None
    except Exception as error:  # Pillow's readers raise anything on broken data
        log.info("a %s picture of %d bytes does not decode: %r", name, len(encoded), error)
        raise ImageError(f"the {name.upper()} picture is broken or cut off") from None


def _read_png(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    stripped = strip_png(encoded)
    with PngImageFile(io.BytesIO(stripped.data)) as picture:
        _check_size(picture, limits.image_pixels)
        picture.load()
        seen: Pillow.Image = picture
        if stripped.key:
            seen = _keyed(picture, stripped)
    return _turned(_flattened(seen), stripped.orientation)


def _keyed(picture: Pillow.Image, stripped: Stripped) -> Pillow.Image:
    """Make the pixels transparent that have the transparent colour in all 16 bits."""
    if picture.mode == "I;16":
        raw = picture.tobytes()
        high, low = (Pillow.frombytes("L", picture.size, raw, "raw", order) for order in ("L;16", "L;16B"))
    else:
        high = picture
        with PngImageFile(io.BytesIO(stripped.data)) as again:
            # Pillow keeps the first byte of each level. Read as of the other byte order, that is the second one.
            again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
            again.load()
            low = again
    alpha = Pillow.new("L", picture.size, 0)
    planes = [*zip(high.split(), (key >> 8 for key in stripped.key), strict=True)]
    planes += zip(low.split(), (key & 255 for key in stripped.key), strict=True)
    for plane, level in planes:
        alpha = ImageChops.lighter(alpha, plane.point([0 if i == level else 255 for i in range(256)]))
    seen = high.convert("RGB")
    seen.putalpha(alpha)
    return seen


def _read_jpeg(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    stripped = strip_jpeg(encoded)
    if stripped.n_scans > _SCANS:
        raise ImageError(f"a JPEG of {stripped.n_scans} scans; save the picture with at most {_SCANS}")
    if stripped.held_bytes > _HELD_BYTES * limits.image_pixels:
        raise ImageError(
            f"a progressive JPEG of more pixels than limits.image_pixels {limits.image_pixels} allows; "
            "save the picture as a baseline JPEG, or smaller"
        )
    try:
        picture = _decoded_jpeg(stripped.data, limits)
    except OSError:
        # Cameras that stream leave out the end marker. If whatever follows the data leaves the pixels alone, then only
        # the marker is missing; otherwise pixels are.
        one, other = (_decoded_jpeg(stripped.data + tail + _END_OF_JPEG, limits) for tail in (b"", b"\x55" * 64))
        if ImageChops.difference(one, other).getbbox() is not None:
            raise
        picture = one
    return _turned(_flattened(picture), stripped.orientation)


def _decoded_jpeg(data: bytes, limits: LimitsConfig) -> Pillow.Image:
    """Decode a JPEG at the largest scale that limits.image_pixels allows."""
    # `Image.open` would go on to the other pictures of the file (MPO), and limit all formats alike.
    with JpegImageFile(io.BytesIO(data)) as picture:
        width, height = picture.size
        _check_size(picture, max(limits.jpeg_pixels, limits.image_pixels), "jpeg_pixels")
        scale = next((s for s in _SCALES if -(-width // s) * -(-height // s) <= limits.image_pixels), None)
        if scale is None:
            raise ImageError(
                f"{width} x {height} pixels are more than limits.image_pixels {limits.image_pixels} even at an eighth"
            )
        if scale > 1:
            picture.draft(None, (max(1, width // scale), max(1, height // scale)))
            _check_size(picture, limits.image_pixels)  # a picture of fewer than eight rows is not scaled as far
        picture.load()
        return picture


def _read_webp(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    with WebPImagePlugin.WebPImageFile(io.BytesIO(encoded)) as picture:
        _check_size(picture, limits.image_pixels)
        picture.load()
        exif, xmp = (picture.info.get(key, b"") for key in ("exif", "xmp"))
    return _turned(_flattened(picture), read_orientation(exif, xmp))


def _read_plain(plugin: Callable[[io.BytesIO], ImageFile], encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    with plugin(io.BytesIO(encoded)) as picture:
        _check_size(picture, limits.image_pixels)
        picture.load()
    return _flattened(picture)


def _read_gif(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    return _read_plain(GifImagePlugin.GifImageFile, encoded, limits)


def _read_bmp(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    return _read_plain(BmpImagePlugin.BmpImageFile, encoded, limits)


def _read_tiff(encoded: bytes, limits: LimitsConfig) -> Pillow.Image:
    _check_strips(encoded)
    return _read_plain(TiffImagePlugin.TiffImageFile, encoded, limits)  # which turns the picture itself


def _check_strips(encoded: bytes) -> None:
    """Refuse a TIFF whose entries count more values than a sound picture has strips."""
    order = "<" if encoded[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", encoded, 4)
    (n_entries,) = struct.unpack_from(f"{order}H", encoded, start)
    for at in range(start + 2, start + 2 + 12 * n_entries, 12):
        tag, _, count = struct.unpack_from(f"{order}HHI", encoded, at)
        if tag in _STRIP_TAGS and count > _STRIPS:
            raise ImageError(f"a TIFF of {count} strips; save the picture with at most {_STRIPS}")


_READERS: dict[str, Callable[[bytes, LimitsConfig], Pillow.Image]] = {
    "png": _read_png,
    "jpeg": _read_jpeg,
    "webp": _read_webp,
    "gif": _read_gif,
    "bmp": _read_bmp,
    "tiff": _read_tiff,
}


def _check_size(picture: Pillow.Image, most: int, setting: str = "image_pixels") -> None:
    width, height = picture.size
    if width * height > most:
        raise ImageError(f"{width} x {height} = {width * height} pixels are more than limits.{setting} {most}")


def _turned(picture: Pillow.Image, orientation: int) -> Pillow.Image:
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _flattened(picture: Pillow.Image) -> Pillow.Image:
    """Convert to RGB band by band, transparency over white."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    flat = Pillow.new("RGB", picture.size)
    rows = max(1, _BAND_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        flat.paste(_flat(band), (0, top))
    return flat


def _flat(band: Pillow.Image) -> Pillow.Image:
    if band.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        band = band.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if not band.has_transparency_data:
        return band.convert("RGB")
    band = band.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", band.size, _WHITE), band).convert("RGB")
