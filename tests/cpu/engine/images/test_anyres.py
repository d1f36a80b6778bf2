"""Pictures in tiles: the arithmetic against `transformers`, and their way from a URL to rows with positions."""

import base64
import io
from collections.abc import Iterator

import pytest
import torch
import transformers as t
from PIL import Image as Pictures
from transformers.image_processing_utils import ChannelDimension, get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from foveate.configs.config import LimitsConfig
from foveate.engine.common import Generate, Grid, Image, ImageError, Size, VisualBudget
from foveate.engine.encoder import Encoder
from foveate.engine.images.anyres import Tiling, best_size, fitted
from foveate.engine.images.preprocess import ImageProcessor
from foveate.engine.models.base import Model
from foveate.engine.models.loader import load_model
from foveate.engine.resolve import Room, resolve
from foveate.server.prepare.budget import ImageCap
from foveate.server.prepare.media import Media

torch.set_num_threads(1)
NEXT = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
ONEVISION = [(384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)]
KINDS = [(NEXT, 336, 24, None), (ONEVISION, 384, 27, 9), ([(672, 672), (336, 1344)], 336, 24, 2)]


def some_sizes(n: int, seed: int) -> Iterator[Size]:
    """Of every order of magnitude, with the awkward ones among them."""
    yield from [(1, 1), (336, 336), (384, 384), (672, 336), (1, 40), (700, 9), (2304, 2304), (2304, 2303), (4000, 100)]
    noise = torch.Generator().manual_seed(seed)
    for _ in range(n):
        height, width = torch.exp(torch.rand(2, generator=noise) * 8.3).int().add(1).tolist()
        yield height, width


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_sizes_are_those_of_transformers(kind: int) -> None:
    sizes = KINDS[kind][0]
    for height, width in some_sizes(300, kind):
        target = best_size((height, width), sizes)
        assert target == select_best_resolution((height, width), sizes)
        picture = torch.zeros(3, height, width, dtype=torch.uint8).numpy() if height * width < 10**6 else None
        if picture is not None:
            assert fitted((height, width), target) == get_patch_output_size(picture, target, ChannelDimension.FIRST)


def counter(sizes: list[Size], side: int, most: int | None) -> t.LlavaNextProcessor | t.LlavaOnevisionProcessor:
    """A processor of `transformers` that counts tokens; it wants no tokenizer for that."""
    made = object.__new__(t.LlavaNextProcessor if most is None else t.LlavaOnevisionProcessor)
    kind = t.LlavaNextImageProcessorPil if most is None else t.LlavaOnevisionImageProcessorPil
    made.image_processor = kind(image_grid_pinpoints=[list(size) for size in sizes])
    made.patch_size, made.num_additional_image_tokens = 14, 0
    made.num_image_tokens, made.vision_aspect_ratio = side**2, f"anyres_max_{most}"
    return made


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_counts_are_those_of_transformers(kind: int) -> None:
    sizes, pixels, side, most = KINDS[kind]
    theirs = counter(sizes, side, most)
    n_seen = n_scaled = 0
    for size in some_sizes(300, kind):
        n_theirs = theirs._get_number_of_features(*size, pixels, pixels)
        try:
            tiling = Tiling.of(size, best_size(size, sizes), pixels, side, most)
        except ImageError as error:
            assert n_theirs <= side**2 + 6 * side and "crop it" in str(error), "only where no row or column is seen"
            continue
        assert tiling.grid.n_tokens == n_theirs
        n_seen, n_scaled = n_seen + 1, n_scaled + tiling.is_scaled
    assert n_seen > 200 and (n_scaled > 10) == (most is not None)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_cells_are_where_transformers_has_them(kind: int) -> None:
    sizes, pixels, side, most = KINDS[kind]
    for size in some_sizes(40, kind):
        try:
            tiling = Tiling.of(size, best_size(size, sizes), pixels, side, most)
        except ImageError:
            continue
        index = torch.arange(side**2, tiling.n_tiles * side**2)
        laid_out = index.view(1, tiling.tile_rows, tiling.tile_cols, side, side).transpose(2, 3).flatten(1, 2)
        kept = unpad_image(laid_out.flatten(2, 3), size)[0]
        assert kept.shape == (tiling.rows, tiling.cols)
        ours = torch.tensor([tile * side**2 + cell for tile, cell in tiling.cells()])
        assert torch.equal(ours, torch.cat([torch.arange(side**2), kept.flatten()]))
        check_tiles(tiling, kept)


def check_tiles(tiling: Tiling, kept: torch.Tensor) -> None:
    """Tiles take every cell once; a crop has those cells, scaled down the middles of those, that lie in it."""
    grid, side = tiling.grid.bare, tiling.side
    tiles = grid.tiles
    assert sorted(cell for tile in tiles for cell in tile.cells()) == list(range(grid.n_tokens))
    assert tiles[0].kind == "thumbnail" and tiles[0].cells() == list(range(side**2))
    y = ((torch.arange(grid.rows) + 0.5) * tiling.rows / grid.rows).int()
    x = ((torch.arange(grid.cols) + 0.5) * tiling.cols / grid.cols).int()
    owner = (kept[y][:, x] // side**2 - 1).flatten()
    for tile in tiles[1:]:
        assert tile.kind == "crop" and tile.grid == Grid(tile.rows, tile.cols)
        of_picture = torch.tensor(tile.cells()) - side**2
        assert owner[of_picture].tolist() == [tile.tile_row * tiling.tile_cols + tile.tile_col] * len(of_picture)
        assert of_picture[0] == tile.row0 * grid.cols + tile.col0


@pytest.mark.parametrize(
    "grid, places",
    [
        (Grid(2, 3), [0, 1, 2, 3, 4, 5]),
        (Grid(2, 2, newlines="last"), [0, 1, 2, 3]),
        (Grid(2, 3, thumbnail=2, newlines="rows"), [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]),
    ],
)
def test_where_cells_are_among_tokens(grid: Grid, places: list[int]) -> None:
    assert grid.tokens() == places
    assert grid.n_tokens == max(places) + 1 + (grid.newlines != "none")
    assert grid.bare.n_tokens == len(places) and grid.bare.tokens() == list(range(len(places)))
    assert sum(tile.grid.n_tokens for tile in grid.tiles) == len(places)


def load(model: Model, pictures: list[Pictures.Image]) -> list[Image]:
    """Through the server's own code, from data URLs."""
    media = Media(model.processor, LimitsConfig(), 1, None)
    images = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        images.append(media.read(url, "p", ImageCap(), len(pictures)))
    media.close()
    return images


SENT = [("llava_next", [(45, 61)]), ("llava_next", [(80, 33), (40, 71)]), ("llava_onevision", [(97, 80)])]
SENT += [("llava_onevision", [(60, 24), (30, 90)])]


@pytest.mark.parametrize("family, sizes", SENT)
def test_a_smaller_budget_keeps_cells_where_they_were(tiny_models, tmp_path, family, sizes):
    """Whatever is kept has the row and the position it has in the whole prompt; newlines go first."""
    tiny_models.save_tiled(tmp_path, family=family, decoder="qwen2")
    model = load_model(tmp_path, torch.float32, "cpu")
    images = load(model, [tiny_models.picture(h, w, i) for i, (h, w) in enumerate(sizes)])
    prompt = tiny_models.prompt(12, len(sizes), 5)
    grids = [model.geometry.grid(image.height, image.width, image.original) for image in images]
    encoder = Encoder(model, 1 << 24)
    whole = None
    for budget in (None, sum(grid.n_tokens for grid in grids) - 1, 2 * len(sizes) + 1):
        visual = VisualBudget(tokens=budget, method="divprune")
        request = resolve(
            Generate(id="x", prompt_ids=prompt, images=images, visual=visual), model.geometry, "float32", Room(512, 512)
        )
        assert encoder.run([(request, i) for i in range(len(images))]) == []
        whole = whole or request
        assert request.next_pos == whole.next_pos == len(whole.prompt_ids)
        for grid, picture, all_of_it in zip(grids, request.pictures, whole.pictures, strict=True):
            rows, kept, (run,) = picture.rows[0], picture.n_kept, picture.runs
            assert rows is not None and rows.shape == (kept, model.spec.hidden_size)
            positions = request.positions[0, run.start : run.stop]
            assert bool((positions.diff() > 0).all())
            place = positions - whole.positions[0, all_of_it.runs[0].start]
            assert torch.equal(rows, all_of_it.rows[0][place])
            if kept < grid.n_tokens:
                assert set(place.tolist()) <= set(grid.tokens()), "a newline was kept"
        assert budget is None or budget >= request.visual.kept > 0
    assert request.visual.kept == budget


def test_a_picture_is_the_same_picture_only_if_cut_from_the_same(tiny_models, tmp_path):
    """Equal tiles of pictures of different sizes may stand for different tokens, so nothing is shared."""
    tiny_models.save_tiled(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    black = [Pictures.new("RGB", (60, height)) for height in (60, 59, 44)]
    images = [load(model, [picture])[0] for picture in black]
    assert len({image.pixels for image in images}) == 1
    assert len({image.digest for image in images}) == 3
    assert [image.original for image in images] == [(60, 60), (59, 60), (44, 60)]
    assert len({model.geometry.grid(i.height, i.width, i.original).n_tokens for i in images}) == 2


def test_what_does_not_fit_the_tiles_is_refused(tiny_models, tmp_path):
    tiny_models.save_tiled(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    assert model.geometry.grid(30, 30) == Grid(4, 4, newlines="last")
    assert model.geometry.grid(90, 30, (30, 55)).n_tokens == 16 + 4 * (8 + 1)
    for height, width, original in [(60, 30, (30, 55)), (90, 30, None), (30, 90, (30, 55)), (90, 60, (30, 55))]:
        with pytest.raises(ImageError, match="tiles of 30 x 30"):
            model.geometry.grid(height, width, original)
    with pytest.raises(ImageError, match="3000 x 10 pixels is too long and thin"):
        model.geometry.grid(120, 30, (10, 3000))


def test_the_server_cuts_several_pictures_only_where_the_model_does(tiny_models, tmp_path):
    tiny_models.save_tiled(tmp_path, family="llava_onevision", decoder="qwen2")
    processor = ImageProcessor.load(tmp_path)
    assert processor.is_cut(1) and not processor.is_cut(2)
    model = load_model(tmp_path, torch.float32, "cpu")
    pictures = [tiny_models.picture(30, 71, i) for i in range(2)]
    assert [image.original for image in load(model, pictures)] == [None, None]
    (alone,) = load(model, pictures[:1])
    assert alone.original == (30, 71) and alone.height == 4 * alone.width == 120


def test_a_budget_shared_by_information_goes_to_the_tile_that_has_it(tiny_models, tmp_path):
    """Pixels of a tile are its own square, not a part of the stack that has its place in the picture."""
    tiny_models.save_tiled(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    blank = Pictures.new("RGB", (60, 60))
    blank.paste(tiny_models.picture(30, 30), (0, 30))  # the lower left of four crops
    (image,) = load(model, [blank])
    visual = VisualBudget(tokens=20, method="random", split="information")
    request = resolve(
        Generate(id="x", prompt_ids=[5, 90, 6], images=[image], visual=visual),
        model.geometry,
        "float32",
        Room(512, 512),
    )
    assert Encoder(model, 1 << 24).run([(request, 0)]) == []
    grid, run = request.pictures[0].grid, request.runs[0]
    kept = set((request.positions[0, run.start : run.stop] - 1).tolist())
    places = grid.tokens()
    per_tile = [len(kept & {places[cell] for cell in tile.cells()}) for tile in grid.bare.tiles]
    assert sum(per_tile) == 20 and per_tile[3] == max(per_tile[1:]) >= 4 * max(per_tile[1], per_tile[2], per_tile[4])
