"""Pictures to the pixels the vision tower reads: resize, pad, crop and cut into tiles, by Pillow alone.

Own code, where `transformers` has image processors, because importing those costs about five seconds of start-up
against a readiness target of six; and because the server's worker threads run this, and the server process must not
load torch. The results are bit-identical to the PIL back ends of `transformers` (a test compares them). Rescaling and
normalising need float tensors and happen in the model, from the settings kept here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from PIL import Image

from foveate.configs.errors import ConfigError
from foveate.engine.common import ImageError, Section, Size
from foveate.engine.images.anyres import stack_tiles

MAX_ASPECT = 200  # a 1 x 40,000,000 picture resized by its short edge would fill the memory
_MAX_EDGE = 65_535  # of a picture that is longer still. Resizing holds a whole edge at the width of the result
_BAND_PIXELS = 2**20  # padded and resized at a time

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
Triple = tuple[float, float, float]  # one number per colour
_Rule = Literal["exact", "short_edge", "smart"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """The resolved settings of one checkpoint's processor. Sizes are (height, width) in pixels."""

    rule: _Rule  # exact: to `size`; short_edge: the shorter edge to size[0], aspect kept; smart: Qwen2-VL's
    size: tuple[int, int]  # for "smart": (least, most) pixels
    crop: tuple[int, int] | None = None  # centre crop after resizing, filled with black where the picture is smaller
    pad_square: bool = False  # to a square in the mean colour, before resizing
    factor: int = 1  # "smart": both edges become multiples of it (patch size x merge size)
    resample: int = 3  # of PIL.Image.Resampling; 3 is bicubic
    rescale: float = 1 / 255
    mean: Triple
    std: Triple
    tile_sizes: tuple[Size, ...] = ()  # to cut a picture into tiles of `size` at; empty: it is prepared whole
    tiles_several: bool = True  # whether also where a request has several pictures, or then each is prepared whole

    @classmethod
    def load(cls, model_dir: Path) -> "ImageProcessor":
        """Read the image processor's part of `processor_config.json`, else `preprocessor_config.json`.

        Raises:
            ConfigError: neither file is there, or a type or setting is not supported; it is named.
        """
        raw = _section(model_dir)
        kind = _kind(raw, model_dir)
        if kind not in _READERS:
            known = ", ".join(sorted(_READERS))
            raise ConfigError(f"{raw.where}: image_processor_type {kind!r} is not supported; there are {known}")
        if not raw.flag("do_resize", True):
            raise ConfigError(f"{raw.where}: do_resize false is not supported; the vision tower needs its own size")
        return _READERS[kind](raw)

    @property
    def identity(self) -> str:
        """Stable text of all settings: what turns the same picture into other pixels changes it. For digests."""
        return repr(self)

    def prepared_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after `prepare`. Pure arithmetic.

        Raises:
            ImageError: the picture is too long and thin to resize by its short edge or in proportion.
        """
        if self.crop is not None:
            self._resized(*self._padded(height, width))
            return self.crop
        return self._resized(*self._padded(height, width))

    def prepare(self, image: Image.Image) -> Image.Image:
        """RGB pixels of the size the tower reads. Transparency is laid over white.

        Raises:
            ImageError: as `prepared_size`.
        """
        image = flatten(image)
        height, width = self._resized(*self._padded(image.height, image.width))
        if self.pad_square:
            red, green, blue = (int(x * 255) for x in self.mean)
            image = resize_padded(image, (width, height), (red, green, blue), Image.Resampling(self.resample))
        elif (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=Image.Resampling(self.resample))
        return image if self.crop is None else crop(image, *self.crop)

    def is_cut(self, n_images: int) -> bool:
        """Whether each picture of a request with so many goes through `prepare_tiles`, or through `prepare`."""
        return bool(self.tile_sizes) and (n_images == 1 or self.tiles_several)

    def prepare_tiles(self, image: Image.Image) -> Image.Image:
        """RGB squares one above the other: the whole picture, then its crops.

        Raises:
            ImageError: the picture is too long and thin.
        """
        _check_shape(image.height, image.width, _MAX_EDGE)
        return stack_tiles(flatten(image), self.tile_sizes, self.size[0], Image.Resampling(self.resample))

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        _check_shape(height, width, _MAX_EDGE)
        return (max(height, width),) * 2 if self.pad_square else (height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.rule == "exact":
            return self.size
        _check_shape(height, width)
        if self.rule == "smart":
            return smart_resize(height, width, self.factor, self.size)
        short, long = sorted((height, width))
        edge = self.size[0]
        scaled = int(edge * long / short)
        return (edge, scaled) if height <= width else (scaled, edge)


def _check_shape(height: int, width: int, edge: int = 0) -> None:
    """Refuse a picture that is longer than `edge` and much longer than wide."""
    short, long = sorted((height, width))
    if long > max(edge, MAX_ASPECT * short):
        raise ImageError(f"image of {width} x {height} pixels: longer than {MAX_ASPECT} times its short edge; crop it")


def _section(model_dir: Path) -> Section:
    """The settings: `transformers` saves them inside processor_config.json today, and old files may stay beside it."""
    own, joint = model_dir / "preprocessor_config.json", model_dir / "processor_config.json"
    if joint.is_file():
        whole = Section.read(joint, ConfigError)
        if "image_processor" in whole:
            return whole.section("image_processor")
    if own.is_file():
        return Section.read(own, ConfigError)
    raise ConfigError(
        f"model.path: {model_dir} has no settings of an image processor, neither in preprocessor_config.json nor as "
        "image_processor in processor_config.json"
    )


def _kind(raw: Section, model_dir: Path) -> str:
    """The class that reads the settings, by the name that `_READERS` has for it.

    Without a name there, config.json decides, by a name or by the model's type.
    """
    kind = raw.text("image_processor_type", raw.text("feature_extractor_type", ""))
    file = model_dir / "config.json"
    if not kind and file.is_file():
        config = Section.read(file, ConfigError)
        kind = config.text("image_processor_type", _OF_MODELS.get(config.text("model_type", ""), ""))
    kind = kind.removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    return _RENAMED.get(kind, kind)


@dataclass(frozen=True, slots=True)
class _Colours:
    rescale: float
    mean: Triple
    std: Triple

    @classmethod
    def read(cls, raw: Section, mean: Triple, std: Triple) -> "_Colours":
        """Neutral where a step is switched off."""
        rescale = raw.number("rescale_factor", 1 / 255) if raw.flag("do_rescale", True) else 1.0
        if not raw.flag("do_normalize", True):
            return cls(rescale, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return cls(rescale, _triple(raw, "image_mean", mean), _triple(raw, "image_std", std))


def _triple(raw: Section, key: str, default: Triple) -> Triple:
    values = raw.numbers(key, default)
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise ConfigError(f"{raw.where}: {key} {values} is not one number per colour")
    return values[0], values[1], values[2]


def _edges(raw: Section, key: str, default: dict[str, int]) -> dict[str, int]:
    """A size: named edges, a list of height and width, or a bare number, the shorter edge."""
    if key not in raw:
        return default
    if not raw.is_object(key):
        edges = raw.integers(key, ())
        if len(edges) not in (1, 2) or min(edges) < 1:
            raise ConfigError(f"{raw.where}: {key} {list(edges)} is not a positive whole number, or two")
        return dict(zip(("height", "width") if len(edges) == 2 else ("shortest_edge",), edges, strict=True))
    named = raw.section(key)
    return {edge: named.positive(edge, 0) for edge in named.keys()}


def _read_clip(raw: Section, may_pad: bool = False) -> ImageProcessor:
    colours = _Colours.read(raw, _CLIP_MEAN, _CLIP_STD)
    rule, size = _target(raw, _edges(raw, "size", {"shortest_edge": 224}))
    crop = None
    if raw.flag("do_center_crop", True):
        edges = _edges(raw, "crop_size", {"shortest_edge": 224})
        _, crop = _target(raw, edges)
    elif rule == "short_edge":
        raise ConfigError(f"{raw.where}: size.shortest_edge without do_center_crop gives pictures of any shape")
    pad = raw.flag("do_pad", False)
    if pad and not may_pad:
        raise ConfigError(f"{raw.where}: do_pad true is not supported for this image_processor_type")
    return ImageProcessor(
        rule=rule,
        size=size,
        crop=crop,
        pad_square=pad,
        resample=_filter(raw),
        rescale=colours.rescale,
        mean=colours.mean,
        std=colours.std,
    )


def _read_siglip(raw: Section) -> ImageProcessor:
    colours = _Colours.read(raw, _HALF, _HALF)
    rule, size = _target(raw, _edges(raw, "size", {"height": 224, "width": 224}))
    if rule != "exact" or raw.flag("do_center_crop", False) or raw.flag("do_pad", False):
        raise ConfigError(f"{raw.where}: only size.height and size.width are supported for SigLIP, no crop, no pad")
    return ImageProcessor(
        rule=rule, size=size, resample=_filter(raw), rescale=colours.rescale, mean=colours.mean, std=colours.std
    )


def _read_qwen(raw: Section) -> ImageProcessor:
    colours = _Colours.read(raw, _CLIP_MEAN, _CLIP_STD)
    size = _edges(raw, "size", {})
    # Oldest spelling first: min_pixels beside `size`, then inside it, then the edges of today, which count pixels too.
    least = raw.positive("min_pixels", size.get("min_pixels", size.get("shortest_edge", 56 * 56)))
    most = raw.positive("max_pixels", size.get("max_pixels", size.get("longest_edge", 28 * 28 * 1280)))
    if least > most:
        raise ConfigError(f"{raw.where}: at least {least} pixels but at most {most}")
    return ImageProcessor(
        rule="smart",
        size=(least, most),
        factor=raw.positive("patch_size", 14) * raw.positive("merge_size", 2),
        resample=_filter(raw),
        rescale=colours.rescale,
        mean=colours.mean,
        std=colours.std,
    )


def _read_llava_next(raw: Section) -> ImageProcessor:
    sizes = tuple((336 * rows, 336 * cols) for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    return _read_tiled(raw, {"shortest_edge": 224}, {"height": 224, "width": 224}, sizes)


def _read_llava_onevision(raw: Section) -> ImageProcessor:
    sizes = tuple((384 * rows, 384 * cols) for rows, cols in product(range(1, 7), repeat=2))
    read = _read_tiled(raw, {"height": 384, "width": 384}, None, sizes)
    return replace(read, pad_square=True, tiles_several=False)


def _read_tiled(
    raw: Section, size: dict[str, int], crop: dict[str, int] | None, sizes: tuple[Size, ...]
) -> ImageProcessor:
    """A processor that makes tiles, over its type's defaults; `crop` None: it crops only where it is told to."""
    colours = _Colours.read(raw, _CLIP_MEAN, _CLIP_STD)
    _, tile = _target(raw, _edges(raw, "size", size))
    if raw.flag("do_center_crop", crop is not None):
        _, cropped = _target(raw, _edges(raw, "crop_size", crop or size))
        if cropped != tile:
            raise ConfigError(f"{raw.where}: crop_size {cropped} is not the tiles' size {tile}")
    sizes = raw.pairs("image_grid_pinpoints", sizes)
    if tile[0] != tile[1] or any(edge % tile[0] for pair in sizes for edge in pair):
        raise ConfigError(f"{raw.where}: image_grid_pinpoints {sizes} do not divide into square tiles of {tile}")
    return ImageProcessor(
        rule="exact",
        size=tile,
        resample=_filter(raw),
        rescale=colours.rescale,
        mean=colours.mean,
        std=colours.std,
        tile_sizes=sizes,
    )


_READERS: dict[str, Callable[[Section], ImageProcessor]] = {
    "CLIPImageProcessor": _read_clip,
    "LlavaImageProcessor": partial(_read_clip, may_pad=True),
    "LlavaNextImageProcessor": _read_llava_next,
    "LlavaOnevisionImageProcessor": _read_llava_onevision,
    "SiglipImageProcessor": _read_siglip,
    "Qwen2VLImageProcessor": _read_qwen,
}
# What `AutoImageProcessor` takes for a model's type where no file names a class.
_OF_MODELS = {
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
}
_RENAMED = {"Qwen2_5_VLImageProcessor": "Qwen2VLImageProcessor"}  # of a class that no release has


def _target(raw: Section, edges: dict[str, int]) -> tuple[_Rule, tuple[int, int]]:
    if set(edges) == {"shortest_edge"}:
        return "short_edge", (edges["shortest_edge"],) * 2
    if set(edges) == {"height", "width"}:
        return "exact", (edges["height"], edges["width"])
    raise ConfigError(f"{raw.where}: size {edges} is not supported; give shortest_edge, or height and width")


def _filter(raw: Section) -> int:
    value = raw.integer("resample", 3)
    if value not in {int(r) for r in Image.Resampling}:
        raise ConfigError(f"{raw.where}: resample {value} is not one of Pillow's filters, 0 to 5")
    return value


def smart_resize(height: int, width: int, factor: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Qwen2-VL's rule: multiples of `factor`, the pixel count within bounds, the aspect nearly kept."""
    least, most = pixels
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    if rows * cols > most:
        shrink = math.sqrt((height * width) / most)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * cols < least:
        grow = math.sqrt(least / (height * width))
        rows, cols = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, cols


def resize_padded(
    image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Put an RGB picture into the middle of a square of `colour` and resize the square to `size` (width, height).

    The square is never held: of a panorama the square has ten times the pixels. Pillow resizes rows first and columns
    then, and rounds in between. The same two steps here give the bits of the whole square if `size` is square, as in
    every published processor. For some other sizes Pillow begins with columns, and levels may differ by a few.
    """
    side, width = max(image.size), size[0]
    narrow = Image.new("RGB", (width, side), colour)  # the square after the resizing of its rows
    rows = max(1, _BAND_PIXELS // side)
    for top in range(0, image.height, rows):
        n = min(rows, image.height - top)
        band = Image.new("RGB", (side, n), colour)
        band.paste(image.crop((0, top, image.width, top + n)), ((side - image.width) // 2, 0))
        narrow.paste(band.resize((width, n), resample), (0, (side - image.height) // 2 + top))
    return narrow.resize(size, resample)


def flatten(image: Image.Image) -> Image.Image:
    """RGB, transparency laid over white. A picture that is so already is not copied."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre `height` x `width`; where the picture is smaller it is surrounded by black, off-centre by the half
    pixel that `transformers` gives it."""
    if (image.height, image.width) == (height, width):
        return image
    rows, cols = max(height, image.height), max(width, image.width)
    down, right = -(-(rows - image.height) // 2), -(-(cols - image.width) // 2)
    top, left = (image.height - height) // 2 + down, (image.width - width) // 2 + right
    if (rows, cols) != (image.height, image.width):
        canvas = Image.new("RGB", (cols, rows))
        canvas.paste(image, (right, down))
        image = canvas
    top, left = max(0, top), max(0, left)
    return image.crop((left, top, left + width, top + height))
