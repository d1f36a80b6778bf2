"""Sizes and shapes of pictures, by Pillow alone: what the steps of `preprocess` do to one picture."""

import math
from collections.abc import Iterable

from PIL import Image


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


def pad_square(image: Image.Image, colour: Iterable[int]) -> Image.Image:
    """In the middle of a square of `colour`."""
    side = max(image.size)
    red, green, blue = colour
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def flatten(image: Image.Image) -> Image.Image:
    """RGB, transparency laid over white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
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
