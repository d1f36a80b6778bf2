"""Pairs from files and folders, mistakes in them, and how they are split."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from foveate.bundled.scenes import HELD_OUT_SEED
from foveate.configs.errors import ConfigError
from foveate.tune.data import FIRST_SCENE, PARTS, Pair, read, sample, scenes, split


def picture(path: Path, colour: str = "red") -> bytes:
    """Save one and return its bytes."""
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return path.read_bytes()


def lines(path: Path, *said: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in said))
    return str(path)


def test_lines(tmp_path: Path) -> None:
    red = picture(tmp_path / "in" / "red.png")
    blue = "data:image/png;base64," + base64.b64encode(picture(tmp_path / "blue.png", "blue")).decode()
    file = lines(
        tmp_path / "data.jsonl",
        {"image": "in/red.png", "question": "What?", "answer": "red", "id": 7},
        "",
        {"image": blue, "question": "Und dies: é?"},
    )
    assert read(file, 1) == [
        Pair(red, "What?", "red", f"{file}:1"),
        Pair(blue, "Und dies: é?", None, f"{file}:3"),
    ]


def test_a_folder(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "b.PNG"), picture(tmp_path / "a.jpg", "blue")
    (tmp_path / "b.txt").write_text("One?\n\n Two?\n")
    (tmp_path / "a.txt").write_text("Three?")
    (tmp_path / "notes.md").write_text("not read")
    read_ = read(str(tmp_path), 1)
    assert [(p.picture, p.question, p.where) for p in read_] == [
        (blue, "Three?", f"{tmp_path}/a.txt:1"),
        (red, "One?", f"{tmp_path}/b.txt:1"),
        (red, "Two?", f"{tmp_path}/b.txt:3"),
    ]


GOOD = {"image": "red.png", "question": "What?"}
MISTAKES = [
    ([GOOD, "{"], ":2: not JSON"),
    ([GOOD, "[1]"], ":2: Expected `object`"),
    ([{"question": "What?"}], ":1: Object missing required field `image`"),
    ([{"image": "red.png"}], ":1: Object missing required field `question`"),
    ([{"image": 3, "question": "What?"}], ":1: Expected `str`, got `int`"),
    ([GOOD, "", {"image": "red.png", "question": " "}], ":3: the question is empty"),
    ([{"image": "gone.png", "question": "What?"}], ":1: "),
    ([{"image": "http://host/red.png", "question": "What?"}], ":1: http://host/red.png: pictures are not fetched"),
    ([""], "no pairs"),
]


@pytest.mark.parametrize(("said", "words"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_line_is_named(tmp_path: Path, said: list[object], words: str) -> None:
    picture(tmp_path / "red.png")
    file = lines(tmp_path / "data.jsonl", *said)
    with pytest.raises(ConfigError) as raised:
        read(file, 1)
    assert str(raised.value).startswith(file) and words in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    file = lines(tmp_path / "data.jsonl", {"image": "gone.png", "question": "What?"})
    with pytest.raises(ConfigError, match=r":1: .*gone.png: cannot be read: No such file"):
        read(file, 1)


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no pictures; a folder has .png, .jpg"):
        read(str(tmp_path), 1)
    picture(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png: no a\.txt beside it"):
        read(str(tmp_path), 1)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"a\.txt: no questions"):
        read(str(tmp_path), 1)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"a\.txt: not UTF-8 text: byte 3"):
        read(str(tmp_path), 1)
    picture(tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match=r"a\.jpg has the same questions|a\.png: a\.jpg has the same questions"):
        read(str(tmp_path), 1)
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        read(str(tmp_path / "nowhere"), 1)


def test_bundled_scenes_are_none_that_others_use() -> None:
    pairs = read("scenes", 2)
    assert pairs == scenes(2) and len({pair.picture for pair in pairs}) == 2
    of = [{pair.where for pair in read("scenes", 3, seed)} for seed in (0, 1, 9, -1)]
    assert len(set.union(*of)) == 12, "each seed has scenes of its own"
    assert FIRST_SCENE >= HELD_OUT_SEED + 10_000_000, "the benches and the other tests use what lies below"
    assert all(pair.answer for pair in pairs)


def made_up(sizes: list[int]) -> list[Pair]:
    return [Pair(f"p{i}", f"q{j}", None, "") for i, n in enumerate(sizes) for j in range(n)]


@pytest.mark.parametrize("sizes", [[7] * 40, [1] * 4, [50, 1, 1, 1], [1, 1, 1, 50], [3, 9, 1, 1, 30, 2, 2]])
@pytest.mark.parametrize("seed", range(5))
def test_a_split_has_each_picture_once_and_all_parts(sizes: list[int], seed: int) -> None:
    pairs = made_up(sizes)
    parts = split(pairs, seed)
    assert list(parts) == list(PARTS) and all(parts.values())
    assert sorted(map(repr, (pair for part in parts.values() for pair in part))) == sorted(map(repr, pairs))
    of = [{pair.picture for pair in part} for part in parts.values()]
    assert not of[0] & of[1] and not of[0] & of[2] and not of[1] & of[2]
    if len(set(sizes)) == 1 and len(sizes) == 40:
        assert [len(part) for part in parts.values()] == [56, 56, 168]
    assert split(pairs, seed) == parts


def test_seeds_split_differently_and_too_few_pictures_are_refused() -> None:
    pairs = made_up([2] * 20)
    assert split(pairs, 1) != split(pairs, 2)
    with pytest.raises(ConfigError, match="9 pairs about 3 pictures: give at least 4"):
        split(made_up([3, 3, 3]), 0)


def test_a_sample_is_drawn_by_the_seed_in_order() -> None:
    pairs = made_up([5] * 10)
    drawn = sample(pairs, 12, 3)
    assert len(drawn) == 12 and drawn == sorted(drawn, key=pairs.index) == sample(pairs, 12, 3)
    assert sample(pairs, 12, 4) != drawn and sample(pairs, None, 3) == pairs == sample(pairs, 99, 3)
