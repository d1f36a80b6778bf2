"""Procedural images with questions and exact answers.

A scene has one to five coloured shapes, at most one per cell of a 3 x 3 grid, and usually a short word or number. The
seed determines the whole scene, so a data set is a range of integers. Training uses seeds below `HELD_OUT_SEED`;
evaluation uses `make_scene(HELD_OUT_SEED + i)` for i < 1000.

The module needs only Pillow and the standard library. Boxes are (left, top, right, bottom) as fractions of the image's
width and height.
"""

import functools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

KINDS = ("colour", "shape", "count", "where", "exists", "read", "describe")
HELD_OUT_SEED = 1_000_000_000

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "orange": (248, 140, 15),
    "yellow": (245, 225, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 215),
    "purple": (125, 35, 165),
    "pink": (250, 135, 190),
    "brown": (120, 70, 30),
}
REGIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WORDS = (
    "cat", "dog", "sun", "map", "key", "box", "cup", "hat", "jet", "zip", "bus", "fox",
    "fish", "bird", "lamp", "tree", "moon", "ship", "door", "book", "milk", "quiz", "cave", "wolf",
    "house", "bread", "chair", "plant", "river", "juice", "tiger", "clock",
)  # fmt: skip

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    """One question with its only right answer.

    `about` lists the items that determine the answer: indices into `Scene.objects`, and len(objects) for the text.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class SceneObject:
    """One shape: kind, colour, tight box, the grid cell of the box's centre, and the painted RGB colour."""

    shape: str
    colour: str
    box: Box
    region: str
    rgb: Colour


@dataclass(frozen=True)
class SceneText:
    """The written text. `content` is lower case; words are painted in capitals. One box per character."""

    content: str
    box: Box
    region: str
    rgb: Colour
    glyphs: tuple[Box, ...]

    @property
    def sort(self) -> str:
        """Return "number" or "word"."""
        return "number" if self.content.isdigit() else "word"


@dataclass(frozen=True)
class Background:
    """A gradient of two tones (equal for a plain background), its direction in degrees, and the strength of noise."""

    tones: tuple[Colour, Colour]
    angle: float
    noise: float
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    """The whole content of one image, before rendering. `size` is (width, height) in pixels."""

    seed: int
    size: tuple[int, int]
    background: Background
    objects: tuple[SceneObject, ...]
    text: SceneText | None


# --- layout ----------------------------------------------------------------------------------------------------------


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


@functools.cache
def _glyph(char: str) -> tuple[float, float, float, float]:
    """Return the ink box of the capital or digit `char` at a font size of 1."""
    left, top, right, bottom = _font(200).getbbox(char.upper())
    return left / 200, top / 200, right / 200, bottom / 200


def _overlaps(a: Box, b: Box, margin: float = 0.015) -> bool:
    return not (a[2] + margin <= b[0] or b[2] + margin <= a[0] or a[3] + margin <= b[1] or b[3] + margin <= a[1])


def _middle(rng: random.Random, third: int, extent: float) -> float | None:
    """Draw a centre for an item of length `extent`, well inside one third of an axis and inside the image.

    None if no centre fits.
    """
    low, high = ((0.0, 0.29), (0.38, 0.62), (0.71, 1.0))[third]
    low, high = max(low, extent / 2 + 0.01), min(high, 1 - extent / 2 - 0.01)
    return rng.uniform(low, high) if low <= high else None


def _place(rng: random.Random, width: float, height: float, taken: list[Box]) -> tuple[Box, str] | None:
    """Draw a free box of the given size. Return the box and its region, or None if the one random try fails."""
    row, column = rng.randrange(3), rng.randrange(3)
    x, y = _middle(rng, column, width), _middle(rng, row, height)
    if x is None or y is None:
        return None
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return None if any(_overlaps(box, other) for other in taken) else (box, REGIONS[3 * row + column])


def _jitter(rng: random.Random, colour: Colour, by: int) -> Colour:
    red, green, blue = (max(0, min(255, value + rng.randint(-by, by))) for value in colour)
    return red, green, blue


def _background(rng: random.Random) -> tuple[Background, bool]:
    """Draw a background. Return the background and whether it is dark."""
    dark = rng.random() < 0.2
    level = rng.randint(12, 45) if dark else rng.randint(195, 250)
    first = _jitter(rng, (level, level, level), 8)
    second = _jitter(rng, first, 22) if rng.random() < 0.6 else first
    noise = rng.choice((0.0, 0.0, 6.0, 12.0))
    return Background((first, second), rng.choice((0.0, 90.0, 180.0, 270.0)), noise, rng.getrandbits(32)), dark


def lay_out_text(
    rng: random.Random, content: str, size: tuple[int, int], taken: list[Box], dark: bool
) -> SceneText | None:
    """Find room for a text. None if no room exists. `content`: letters or digits."""
    unit = min(size)
    for _ in range(60):
        points = rng.uniform(0.19, 0.25)  # font size as a fraction of the shorter side
        boxes = [_glyph(char) for char in content]
        gap = 0.09
        width = (sum(right - left for left, _, right, _ in boxes) + gap * (len(boxes) - 1)) * points * unit / size[0]
        top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
        height = (bottom - top) * points * unit / size[1]
        found = _place(rng, width, height, taken) if width < 0.96 else None
        if found is None:
            continue
        x, glyphs = found[0][0], []
        for left, _, right, _ in boxes:
            step = (right - left) * points * unit / size[0]
            glyphs.append((x, found[0][1], x + step, found[0][3]))
            x += step + gap * points * unit / size[0]
        rgb = _jitter(rng, (225, 225, 225) if dark else (35, 35, 35), 25)
        return SceneText(content, found[0], found[1], rgb, tuple(glyphs))
    return None


def _kinds_of_objects(rng: random.Random) -> list[tuple[str, str]]:
    """Draw distinct (shape, colour) pairs. At least one pair has a unique shape, and one has a unique colour."""
    count = rng.randint(1, 5)
    if rng.random() < 0.6:
        return list(zip(rng.sample(SHAPES, count), rng.sample(sorted(COLOURS), count), strict=True))
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    while True:
        chosen = rng.sample(pairs, count)
        shapes, colours = [shape for shape, _ in chosen], [colour for _, colour in chosen]
        if any(shapes.count(s) == 1 for s in shapes) and any(colours.count(c) == 1 for c in colours):
            return chosen


def make_scene(seed: int, size: tuple[int, int] | None = None) -> Scene:
    """Make the scene of a seed. `size`: (width, height) in pixels; None: drawn from the seed."""
    rng = random.Random(seed)
    drawn = (rng.randint(170, 300), rng.uniform(0.8, 1.25))
    width, height = size or (drawn[0], round(drawn[0] / drawn[1]))
    unit = min(width, height)
    background, dark = _background(rng)
    pairs = _kinds_of_objects(rng)
    content = None
    if rng.random() < 0.85:
        content = str(rng.randrange(10 ** rng.randint(1, 3))) if rng.random() < 0.5 else rng.choice(WORDS)
    while True:
        taken: list[Box] = []
        text = lay_out_text(rng, content, (width, height), taken, dark) if content is not None else None
        if text is not None:
            taken.append(text.box)
        objects: list[SceneObject] = []
        used = {text.region} if text is not None else set()
        for _ in range(200):
            if len(objects) == len(pairs):
                break
            side = rng.uniform(0.17, 0.25) * unit
            found = _place(rng, side / width, side / height, taken)
            if found is None or found[1] in used:
                continue
            shape, colour = pairs[len(objects)]
            objects.append(SceneObject(shape, colour, found[0], found[1], _jitter(rng, COLOURS[colour], 12)))
            taken.append(found[0])
            used.add(found[1])
        if len(objects) == len(pairs) and (text is not None or content is None):
            return Scene(seed, (width, height), background, tuple(objects), text)


# --- painting --------------------------------------------------------------------------------------------------------

_OVERSAMPLE = 2  # draw shapes larger and average down, for smooth edges


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in the unit square."""
    if shape == "square":
        return [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)]
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "cross":
        a, b = 0.32, 0.68
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if shape == "star":
        points = []
        for corner in range(10):
            radius, turn = (0.52 if corner % 2 == 0 else 0.21), math.pi * (corner / 5 - 0.5)
            points.append((0.5 + radius * math.cos(turn), 0.53 + radius * math.sin(turn)))
        return points
    points = []
    for corner in range(40):
        turn = 2 * math.pi * corner / 40
        x, y = math.cos(turn), math.sin(turn)
        if shape == "heart":
            x = math.sin(turn) ** 3
            y = -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)) / 14.5
            y -= 0.17
        points.append((0.5 + 0.5 * x, 0.5 + 0.5 * y))
    return points


def _paint_background(scene: Scene) -> Image.Image:
    size, ground = scene.size, scene.background
    picture = Image.new("RGB", size, ground.tones[0])
    if ground.tones[0] != ground.tones[1]:
        ramp = Image.linear_gradient("L").rotate(ground.angle).resize(size, Image.Resampling.BILINEAR)
        picture = Image.composite(Image.new("RGB", size, ground.tones[1]), picture, ramp)
    if ground.noise:
        grain = (max(8, size[0] // 5), max(8, size[1] // 5))
        noise = Image.frombytes("L", grain, random.Random(ground.noise_seed).randbytes(grain[0] * grain[1]))
        noise = noise.resize(size, Image.Resampling.BICUBIC).point(lambda v: 128 + (v - 128) * ground.noise / 128)
        picture = Image.blend(picture, noise.convert("RGB"), 0.5).point(lambda v: max(0, min(255, 2 * v - 128)))
    return picture


def render(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image of the scene's size."""
    picture = _paint_background(scene)
    width, height = scene.size
    for item in scene.objects:
        left, top = item.box[0] * width, item.box[1] * height
        spans = (item.box[2] - item.box[0]) * width, (item.box[3] - item.box[1]) * height
        patch = (math.ceil(spans[0]) + 2, math.ceil(spans[1]) + 2)
        mask = Image.new("L", (patch[0] * _OVERSAMPLE, patch[1] * _OVERSAMPLE))
        shift = (left - math.floor(left), top - math.floor(top))
        corners = [
            ((x * spans[0] + shift[0]) * _OVERSAMPLE, (y * spans[1] + shift[1]) * _OVERSAMPLE)
            for x, y in outline(item.shape)
        ]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        picture.paste(item.rgb, (math.floor(left), math.floor(top)), mask.reduce(_OVERSAMPLE))
    if scene.text is not None:
        draw = ImageDraw.Draw(picture)
        tops = [_glyph(char)[1] for char in scene.text.content]
        bottoms = [_glyph(char)[3] for char in scene.text.content]
        points = (scene.text.box[3] - scene.text.box[1]) * height / (max(bottoms) - min(tops))
        for char, box in zip(scene.text.content, scene.text.glyphs, strict=True):
            origin = (box[0] * width - _glyph(char)[0] * points, box[1] * height - min(tops) * points)
            bold = points / 45
            draw.text(origin, char.upper(), fill=scene.text.rgb, font=_font(round(points)), stroke_width=bold)
    return picture


def box_cells(box: Box, rows: int, cols: int, slack: float = 0.1) -> set[int]:
    """Return raster indices of the grid cells that a box covers by more than `slack` of a cell in both directions."""
    left, right = max(0, math.floor(box[0] * cols + slack)), min(cols, math.ceil(box[2] * cols - slack))
    top, bottom = max(0, math.floor(box[1] * rows + slack)), min(rows, math.ceil(box[3] * rows - slack))
    return {row * cols + column for row in range(top, bottom) for column in range(left, right)}


def object_cells(scene: Scene, rows: int, cols: int) -> set[int]:
    """Return raster indices of the cells in a rows x cols grid over the image that any object or the text touches."""
    boxes = [item.box for item in scene.objects] + ([scene.text.box] if scene.text is not None else [])
    return set().union(*(box_cells(box, rows, cols) for box in boxes))


# --- questions -------------------------------------------------------------------------------------------------------

PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What color is the {x}?",
        "What colour is the {x}?",
        "Which color does the {x} have?",
        "What is the color of the {x}?",
        "Name the color of the {x}.",
    ),
    "shape": (
        "What shape is the {x} one?",
        "Which shape is {x}?",
        "What is the shape of the {x} object?",
        "What is the {x} thing?",
        "Name the shape of the {x} one.",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
        "How many objects do you see?",
        "Count the shapes.",
        "What is the number of shapes in the image?",
    ),
    "where": (
        "Where is the {x}?",
        "Where in the picture is the {x}?",
        "In which part of the image is the {x}?",
        "Where can I find the {x}?",
        "What is the position of the {x}?",
    ),
    "exists": (
        "Is there a {x}?",
        "Is there a {x} in the picture?",
        "Do you see a {x}?",
        "Does the image show a {x}?",
        "Can you find a {x}?",
    ),
    "read": (
        "Read the {x}.",
        "What does the {x} say?",
        "What is written in the picture?",
        "Which {x} is written in the image?",
        "What {x} do you see?",
    ),
    "describe": (
        "Describe the picture.",
        "Describe the image.",
        "What is in the picture?",
        "What do you see in the image?",
        "List everything in the picture.",
    ),
}


def article(word: str) -> str:
    """Return the word with "a" or "an" before the word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _phrase(rng: random.Random, kind: str, what: str = "") -> str:
    text = rng.choice(PHRASINGS[kind])
    if "a {x}" in text:
        text = text.replace("a {x}", article(what))
    text = text.format(x=what)
    if rng.random() < 0.25:
        text = text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 0.2 else text


def describe(scene: Scene) -> str:
    """Return the sentence that lists all items in reading order."""
    parts = [(item.region, article(f"{item.colour} {item.shape}")) for item in scene.objects]
    if scene.text is not None:
        parts.append((scene.text.region, f"the {scene.text.sort} {scene.text.content}"))
    parts.sort(key=lambda part: REGIONS.index(part[0]))
    return ", ".join(f"{what} at the {region}" for region, what in parts) + "."


def _exists(rng: random.Random, scene: Scene) -> Question:
    """Ask whether a shape exists. Half the questions are about an absent shape, mostly similar to a present shape."""
    pairs = [(item.shape, item.colour) for item in scene.objects]
    if rng.random() < 0.5:
        index = rng.randrange(len(pairs))
        return Question("exists", _phrase(rng, "exists", f"{pairs[index][1]} {pairs[index][0]}"), "yes", (index,))
    near = rng.randrange(len(pairs))
    shape, colour = pairs[near]
    turn = rng.random()
    about: tuple[int, ...] = ()
    while (shape, colour) in pairs:
        if turn < 0.4:
            shape, colour, about = pairs[near][0], rng.choice(sorted(COLOURS)), (near,)
        elif turn < 0.8:
            shape, colour, about = rng.choice(SHAPES), pairs[near][1], (near,)
        else:
            shape, colour = rng.choice(SHAPES), rng.choice(sorted(COLOURS))
    return Question("exists", _phrase(rng, "exists", f"{colour} {shape}"), "no", about)


def _candidates(rng: random.Random, scene: Scene, kind: str) -> list[Question]:
    """Return all distinct questions of one kind about a scene, in random order."""
    shapes = [item.shape for item in scene.objects]
    colours = [item.colour for item in scene.objects]
    found: list[Question] = []
    everything = tuple(range(len(scene.objects)))
    for index, item in enumerate(scene.objects):
        if kind == "colour" and shapes.count(item.shape) == 1:
            found.append(Question(kind, _phrase(rng, kind, item.shape), item.colour, (index,)))
        elif kind == "shape" and colours.count(item.colour) == 1:
            found.append(Question(kind, _phrase(rng, kind, item.colour), item.shape, (index,)))
        elif kind == "where":
            alone = shapes.count(item.shape) == 1 and rng.random() < 0.5
            name = item.shape if alone else f"{item.colour} {item.shape}"
            found.append(Question(kind, _phrase(rng, kind, name), item.region, (index,)))
    if kind == "count":
        found.append(Question(kind, _phrase(rng, kind), str(len(shapes)), everything))
    elif kind == "describe":
        about = everything + ((len(shapes),) if scene.text is not None else ())
        found.append(Question(kind, _phrase(rng, kind), describe(scene), about))
    elif kind == "exists":
        found.append(_exists(rng, scene))
    elif scene.text is not None and kind == "where":
        found.append(Question(kind, _phrase(rng, kind, scene.text.sort), scene.text.region, (len(shapes),)))
    elif scene.text is not None and kind == "read":
        sort = rng.choice((scene.text.sort, "text"))
        found.append(Question(kind, _phrase(rng, kind, sort), scene.text.content, (len(shapes),)))
    rng.shuffle(found)
    return found


def questions(scene: Scene, seed: int, per_kind: int = 1) -> list[Question]:
    """Return up to `per_kind` questions per kind, in the order of KINDS. "read" needs a text in the scene."""
    rng = random.Random(f"{scene.seed}/{seed}")
    asked: list[Question] = []
    for kind in KINDS:
        batch: list[Question] = []
        for _ in range(4 * per_kind):  # later passes ask the same questions in other words
            batch += [new for new in _candidates(rng, scene, kind) if new.text not in {old.text for old in batch}]
            if len(batch) >= per_kind:
                break
        asked += batch[:per_kind]
    return asked
