"""The picture of the README: which patches are drawn as kept, and what is written below them."""

import pytest
from PIL import Image, ImageFont

from foveate.bundled.scenes import make_scene


@pytest.fixture
def picture(bench):
    return bench.budget_picture


def panel(picture, kept_map, answer="a red star"):
    return picture.Panel("quarter budget", answer, 144, 36, kept_map, 10.0, 5.0)


def test_run_lengths_become_patches_in_reading_order(picture):
    assert picture.kept_patches([0, 2, 1, 1]) == [True, True, False, True]
    assert picture.kept_patches([3]) == [False] * 3


def test_kept_patches_show_the_picture_and_dropped_ones_lose_its_colour(picture):
    scene, side = make_scene(1, (240, 240)), picture.PANEL // 12
    whole = picture.draw_panel(scene, panel(picture, [0, 144]))
    some = picture.draw_panel(scene, panel(picture, [13, 1, 130]))  # row 1, column 1
    inside = (side + 2, side + 2, 2 * side - 2, 2 * side - 2)
    assert some.crop(inside).tobytes() == whole.crop(inside).tobytes()
    dropped = some.crop((0, 2 * side, picture.PANEL, picture.PANEL))
    assert all(red == green == blue for _, (red, green, blue) in dropped.getcolors(10**6))


def test_a_long_answer_is_wrapped_and_stays_within_its_panel(picture):
    font, text = ImageFont.load_default(16), "the word milk at the center and " * 6
    lines = picture.wrapped(text, font, 200).split("\n")
    assert len(lines) > 3 and " ".join(lines) == text.strip()
    assert all(font.getlength(line) <= 200 for line in lines)
    drawn = picture.draw(make_scene(1, (240, 240)), "What is it?", [panel(picture, [36, 36, 72], text)] * 2, 3)
    assert isinstance(drawn, Image.Image) and drawn.width == 3 * picture.MARGIN + 2 * picture.PANEL
