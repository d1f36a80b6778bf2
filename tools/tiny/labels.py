"""Label the content of each visual token: dense labels for the auxiliary losses, cells for attention guidance."""

import numpy as np
from PIL import Image, ImageDraw

from foveate.bundled import scenes
from foveate.bundled.scenes import Scene

COLOURS, SHAPES, REGIONS = sorted(scenes.COLOURS), list(scenes.SHAPES), list(scenes.REGIONS)
CHARS = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_GLYPHS = 5
FIELDS = ("item", "colour", "shape", "region", "char", "glyph")

_FINE = 6  # samples along each side of a cell
_GLYPHS = 10  # the map of a scene has the value _GLYPHS + k for the k-th character


def coverage(scene: Scene, rows: int, cols: int) -> np.ndarray:
    """Return the covered share of each cell per item: float32 [objects + characters, rows * cols], objects first."""
    width, height = cols * _FINE, rows * _FINE
    chart = Image.new("L", (width, height))
    draw = ImageDraw.Draw(chart)
    for index, item in enumerate(scene.objects):
        left, top, right, bottom = item.box
        corners = [
            ((left + x * (right - left)) * width - 0.5, (top + y * (bottom - top)) * height - 0.5)
            for x, y in scenes.outline(item.shape)
        ]
        draw.polygon(corners, fill=1 + index)
    for index, box in enumerate(scene.text.glyphs if scene.text is not None else ()):
        corner = (box[2] * width - 1, box[3] * height - 1)
        draw.rectangle((box[0] * width - 0.5, box[1] * height - 0.5, *corner), fill=_GLYPHS + index)
    fine = np.asarray(chart).reshape(rows, _FINE, cols, _FINE)
    values = [1 + i for i in range(len(scene.objects))]
    values += [_GLYPHS + i for i in range(len(scene.text.glyphs) if scene.text is not None else 0)]
    return np.stack([(fine == value).mean(axis=(1, 3), dtype=np.float32).ravel() for value in values])


def dense(scene: Scene, shares: np.ndarray, least: float = 0.2) -> np.ndarray:
    """Return labels per cell, int64 [len(FIELDS), cells]. -1: the field does not apply.

    The item is 0 for background, 1 for a shape, 2 for a character. In a cell with several items, the largest counts.
    """
    best, share = shares.argmax(axis=0), shares.max(axis=0)
    labels = np.full((len(FIELDS), shares.shape[1]), -1, dtype=np.int64)
    labels[0] = 0
    for index, item in enumerate(scene.objects):
        here = (best == index) & (share >= least)
        region = REGIONS.index(item.region)
        labels[:4, here] = np.array([[1], [COLOURS.index(item.colour)], [SHAPES.index(item.shape)], [region]])
    for index, char in enumerate(scene.text.content if scene.text is not None else ""):
        assert scene.text is not None
        here = (best == len(scene.objects) + index) & (share >= least)
        labels[0, here] = 2
        labels[3, here] = REGIONS.index(scene.text.region)
        labels[4, here], labels[5, here] = CHARS.index(char), index
    edge = (labels[0] == 0) & (share > 0.04)  # a small part of an item: neither item nor background
    labels[0, edge] = -1
    return labels


def whole(scene: Scene) -> np.ndarray:
    """Return labels of the whole image: float32 [shapes * colours + len(CHARS)], 1: pair or character present."""
    labels = np.zeros(len(SHAPES) * len(COLOURS) + len(CHARS), dtype=np.float32)
    for item in scene.objects:
        labels[SHAPES.index(item.shape) * len(COLOURS) + COLOURS.index(item.colour)] = 1
    for char in scene.text.content if scene.text is not None else "":
        labels[len(SHAPES) * len(COLOURS) + CHARS.index(char)] = 1
    return labels
