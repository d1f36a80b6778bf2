"""Read pairs of an image and a question from a JSON Lines file, a folder or the bundled scenes, and split the pairs.

A JSON Lines file has one object per line: `image` (a path, relative to the file, or a data URL), `question`, and
optionally `answer`. Other keys are ignored. A folder has images and, beside each image, a text file with the same stem
and one question per line.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from foveate.bundled.scenes import HELD_OUT_SEED, make_scene, questions, render
from foveate.configs.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SCENES = "scenes"  # name of the data set of bundled scenes
FIRST_SCENE = HELD_OUT_SEED + 20_000_000  # not used in training, in the published tables or in the tests
_SCENES_APART = 10_000  # between the first scenes of two seeds
_SEEDS = 10_000  # with scenes of their own
PARTS = SEARCH, CHOICE, HELD_OUT = ("search", "choice", "held out")
HELD_OUT_SHARE = 0.6
_SHARES = (0.2, 1 - HELD_OUT_SHARE)  # ends of the first and the second part, as shares of the pairs


@dataclass(frozen=True, slots=True)
class Pair:
    """One question about one image."""

    picture: bytes | str  # an encoded image, or a data URL from the data
    question: str
    answer: str | None  # the right answer, if the user gave one
    where: str  # place of the pair, for messages: "data.jsonl:12"


class _Line(msgspec.Struct, frozen=True):
    image: str
    question: str
    answer: str | None = None


def read(source: str, n_scenes: int, seed: int = 0) -> list[Pair]:
    """Read all pairs of a file or a folder. For the name "scenes", make pairs of `n_scenes` bundled scenes.

    Each seed has other scenes.

    Raises:
        ConfigError: the data are wrong. The message names the file and the line.
    """
    if source == SCENES:
        return scenes(n_scenes, FIRST_SCENE + _SCENES_APART * (seed % _SEEDS))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ConfigError(f"{source}: no such file or folder; give a .jsonl file, a folder, or {SCENES!r}")
    return _read_lines(path)


def scenes(n: int, first: int = FIRST_SCENE) -> list[Pair]:
    """Make one question of each kind for each of `n` bundled scenes outside the training data."""
    pairs = []
    for seed in range(first, first + n):
        scene = make_scene(seed)
        buffer = io.BytesIO()
        render(scene).save(buffer, "PNG")
        encoded, where = buffer.getvalue(), f"scene {seed}"
        pairs += [Pair(encoded, asked.text, asked.answer, where) for asked in questions(scene, seed=0)]
    return pairs


def sample(pairs: Sequence[Pair], n: int | None, seed: int) -> list[Pair]:
    """Draw `n` pairs and keep their order. None: return all pairs."""
    if n is None or n >= len(pairs):
        return list(pairs)
    return [pairs[i] for i in sorted(random.Random(f"sample/{seed}").sample(range(len(pairs)), n))]


def split(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Split the pairs: a fifth to search, a fifth to choose among the found points, the rest to confirm the choice.

    No image is in two parts.

    Raises:
        ConfigError: there are too few images for three parts.
    """
    pictures = list(dict.fromkeys(pair.picture for pair in pairs))
    if len(pictures) < 4:
        raise ConfigError(f"{len(pairs)} pairs about {len(pictures)} pictures: give at least 4, as most are held out")
    random.Random(f"split/{seed}").shuffle(pictures)
    of: dict[bytes | str, list[Pair]] = {picture: [] for picture in pictures}
    for pair in pairs:
        of[pair.picture].append(pair)
    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    done = 0
    for i, picture in enumerate(pictures):
        left = len(pictures) - i
        part = PARTS[sum(done >= share * len(pairs) for share in _SHARES)]
        if missing := [name for name in PARTS if not parts[name]][-left:]:  # at least one image per part
            part = missing[0] if left <= len(missing) else part
        parts[part] += of[picture]
        done += len(of[picture])
    return parts


def _read_lines(path: Path) -> list[Pair]:
    pairs: list[Pair] = []
    known: dict[Path, bytes] = {}  # so that each image is read only once
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            said = msgspec.json.decode(line, type=_Line)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {error}; a line is like {_EXAMPLE}") from None
        except msgspec.DecodeError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not said.question.strip():
            raise ConfigError(f"{where}: the question is empty")
        pairs.append(Pair(_named(said.image, path.parent, where, known), said.question, said.answer, where))
    if not pairs:
        raise ConfigError(f"{path}: no pairs; a line is like {_EXAMPLE}")
    return pairs


_EXAMPLE = '{"image": "cat.png", "question": "What is this?"}'


def _named(image: str, folder: Path, where: str, known: dict[Path, bytes]) -> bytes | str:
    """Load the image of a line. Return the data URL, or the bytes of the file."""
    if image[:5].lower() == "data:":
        return image
    if image.lower().startswith(("http://", "https://")):
        raise ConfigError(f"{where}: {image[:60]}: pictures are not fetched; give a path or a data URL")
    path = folder / Path(image).expanduser()
    if path not in known:
        known[path] = _picture(path, where)
    return known[path]


def _read_folder(folder: Path) -> list[Pair]:
    pictures: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in pictures:
                raise ConfigError(f"{path}: {pictures[path.stem].name} has the same questions; give it another stem")
            pictures[path.stem] = path
    if not pictures:
        raise ConfigError(f"{folder}: no pictures; a folder has {', '.join(SUFFIXES)} files and a .txt beside each")
    pairs = []
    for path in pictures.values():
        asked = path.with_suffix(".txt")
        if not asked.is_file():
            raise ConfigError(f"{path}: no {asked.name} beside it with its questions, one a line")
        picture = _picture(path, str(path))
        lines = [(number, line.strip()) for number, line in enumerate(_text(asked).splitlines(), 1)]
        own = [Pair(picture, line, None, f"{asked}:{number}") for number, line in lines if line]
        if not own:
            raise ConfigError(f"{asked}: no questions; write one a line")
        pairs += own
    return pairs


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} is {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _picture(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: {path}: cannot be read: {error.strerror}") from None
