"""Families that cut pictures into tiles: strict loading, and the signals of a tower that reads tile by tile."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.engine.common import CELLS, ENC, ImageError, ModelError, Section, Signal
from foveate.engine.encoder import Features
from foveate.engine.geometry.config import read_mistral
from foveate.engine.models.loader import load_model

torch.set_num_threads(1)


def _all(model):
    """What a tower gives, of its first and last layer."""
    kinds = ("recv", "logits", "keys", "values", "qk", "hidden", "saliency")
    kinds += ("cls_row", "cls_cat", "cls_values") if model.spec.tower.has_cls else ()
    return frozenset({model.spec.tower.resolve(Signal(k, i)) for k in kinds for i in (0, -1)} | {ENC, CELLS})


@pytest.mark.parametrize(
    "family, values, message",
    [
        ("llava_next", {"text_config__sliding_window": 511}, "sliding_window 511"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "leaves 17 rows of a tile, not its 4 x 4"),
        ("llava_next", {"image_grid_pinpoints": [[30, 60]]}, r"image_grid_pinpoints \[\(30, 60\)\] are not"),
        ("llava_next", {"image_grid_pinpoints": [[30, 60, 90]]}, "pairs of positive whole numbers"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "leaves 15 rows of a tile"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres'"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_0"}, "anyres_max_0"),
    ],
)
def test_unsupported_settings_of_tiles_are_named(tiny_models, tmp_path, family, values, message):
    decoder = "mistral" if family == "llava_next" else "qwen2"
    tiny_models.save_tiled(tmp_path, family=family, decoder=decoder)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in values.items():
        parent, _, last = key.rpartition("__")
        (config[parent] if parent else config)[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("naming", ["saved", "published", "module"])
def test_the_newline_is_loaded_strictly(tiny_models, tmp_path, naming):
    tiny_models.save_tiled(tmp_path, naming=naming)
    newline = load_model(tmp_path, torch.float32, "cpu").image_newline
    assert torch.isfinite(newline).all() and newline.std() > 0.1
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.image_newline" if naming == "module" else "image_newline")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="image_newline is missing"):
        load_model(tmp_path, torch.float32, "cpu")


def test_a_mistral_without_a_word_of_it_has_a_window():
    read = read_mistral
    assert read(Section({"sliding_window": None}, "config", ModelError)).max_context == 131072
    assert read(Section({"max_position_embeddings": 4096}, "config", ModelError)).max_context == 4096
    with pytest.raises(ModelError, match="sliding_window 4096"):
        read(Section({}, "config", ModelError))


def _bytes(picture):
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


TILED = {"llava_next": [(45, 61), (30, 90)], "llava_onevision": [(30, 50)]}


@pytest.mark.parametrize("family", TILED)
def test_signals_of_tiles(tiny_models, tmp_path, family):
    """Each tile's own, in the order of the cells, the padding left out."""
    tiny_models.save_tiled(tmp_path, family=family, decoder="qwen2")
    model, oracle = load_model(tmp_path, torch.float32, "cpu"), tiny_models.load_reference(tmp_path, "eager")
    images = [tiny_models.picture(h, w, i) for i, (h, w) in enumerate(TILED[family])]
    raw = [_bytes(model.processor.prepare_tiles(image)) for image in images]
    got = model.encode(raw, _all(model), TILED[family])
    tower, clip = oracle.model.vision_tower, family == "llava_next"
    layer = 1 if clip else 2
    keys, queries, projected = [], [], []
    attention = tower.encoder.layers[layer].self_attn
    for module, into in ((attention.k_proj, keys), (attention.q_proj, queries), (attention.v_proj, projected)):
        module.register_forward_hook(lambda m, i, out, into=into: into.append(out))
    for image, size, one in zip(images, TILED[family], got, strict=True):
        for found in (keys, queries, projected):
            found.clear()
        with torch.no_grad():
            values = tiny_models.reference_inputs(tmp_path, [90], [image])["pixel_values"][0]
            seen = tower(values, output_attentions=True, output_hidden_states=True)
        tile, cell = torch.tensor(model.geometry.tiling(size).cells()).T
        row = cell + clip
        weights = seen.attentions[layer].mean(1)
        assert torch.allclose(one.recv(), weights.mean(1)[tile, row], atol=1e-6)
        assert torch.allclose(one.keys(), keys[0].unflatten(2, (3, 8)).mean(2)[tile, row], atol=1e-5)
        assert torch.allclose(one.hidden(0), seen.hidden_states[1][tile, row], atol=1e-5)
        assert torch.allclose(one.enc, seen.hidden_states[layer + 1][tile, row], atol=1e-5)
        assert torch.equal(one.cells, one.enc) and torch.allclose(one.project(one.enc), one.proj, atol=1e-6)
        with pytest.raises(ImageError, match="read in tiles"):  # which do not attend to each other
            one.full(layer)
        q, k, v = (found[0].unflatten(2, (3, 8)) for found in (queries, keys, projected))
        scores = torch.einsum("tmhd,tnhd->tmn", q, k) / 3 / 8**0.5
        logits = scores[:, 0][tile, row] if clip else one.recv().log()
        assert torch.allclose(one.logits(), logits, atol=1e-5)
        if clip:
            assert torch.allclose(one.cls_row(), weights[tile, 0, row], atol=1e-6)
            products = torch.einsum("thd,tnhd->tnh", v[:, 0], v)
            assert torch.allclose(one.cls_values(), (products - products[:, :1])[tile, row], atol=1e-5)
            assert torch.allclose(one.cls, seen.hidden_states[layer + 1][0, 0], atol=1e-5)
        else:
            assert one.cls is None
        grid = model.geometry.tiling(size).grid
        whole, newlines = one.unreduced(grid), torch.ones(grid.n_tokens, dtype=torch.bool)
        newlines[grid.tokens()] = False
        assert torch.equal(whole[~newlines], one.proj)
        assert torch.equal(whole[newlines], model.image_newline.expand(int(newlines.sum()), -1))


def test_signals_of_cells_scaled_down(tiny_models, tmp_path):
    """Like the rows they belong to; and there are none before the projector."""
    tiny_models.save_tiled(tmp_path, family="llava_onevision", decoder="qwen2")
    model = load_model(tmp_path, torch.float32, "cpu")
    size = (97, 80)
    raw = _bytes(model.processor.prepare_tiles(tiny_models.picture(*size)))
    (one,) = model.encode([raw], _all(model), [size])
    model.geometry.most_tiles = None
    (whole,) = model.encode([raw], _all(model), [size])
    grid, before = one.grid, whole.grid
    assert grid.rows < before.rows and grid.cols < before.cols
    assert one.enc is None and one.cells is None and one.project is None and whole.enc is not None
    for name in ("proj", "recv", "keys", "values"):
        ours, theirs = (one.proj, whole.proj) if name == "proj" else (getattr(x, name)() for x in (one, whole))
        assert torch.equal(ours[:16], theirs[:16])
        theirs = theirs[16:].view(1, before.rows, before.cols, -1).permute(0, 3, 1, 2)
        theirs = torch.nn.functional.interpolate(theirs, (grid.rows, grid.cols), mode="bilinear")
        assert torch.allclose(ours[16:].reshape(grid.rows * grid.cols, -1), theirs[0].flatten(1).T, atol=1e-6)


def test_batch_of_tiled_pictures_is_each_alone(tiny_models, tmp_path):
    tiny_models.save_tiled(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    sizes = [(45, 61), (30, 90), None, (7, 7)]
    pictures = [tiny_models.picture(*(size or (30, 30)), i) for i, size in enumerate(sizes)]
    raw = [_bytes(model.processor.prepare_tiles(p) if s else p) for p, s in zip(pictures, sizes, strict=True)]
    assert [model.geometry.n_patches(*x.shape[:2]) for x in raw] == [5 * 17, 4 * 17, 17, 3 * 17]
    for pixels, size, one in zip(raw, sizes, model.encode(raw, _all(model), sizes), strict=True):
        (alone,) = model.encode([pixels], _all(model), [size])
        assert alone.grid == one.grid == model.geometry.grid(*pixels.shape[:2], size).bare
        for name in ("proj", "newline", "enc", "cls"):
            assert torch.allclose(getattr(one, name), getattr(alone, name), atol=1e-5)
        assert one.taps.keys() == alone.taps.keys()
        assert all(torch.allclose(one.taps[s], alone.taps[s], atol=1e-5) for s in one.taps)


@pytest.mark.parametrize("family", TILED)
def test_what_is_kept_of_a_tiled_picture_is_its_rows_once(tiny_models, tmp_path, family):
    """Newlines are one row, laid between the others when all are read."""
    tiny_models.save_tiled(tmp_path, family=family, decoder="qwen2")
    model = load_model(tmp_path, torch.float32, "cpu")
    (size,) = TILED[family][:1]
    raw = _bytes(model.processor.prepare_tiles(tiny_models.picture(*size)))
    (one,) = model.encode([raw], frozenset(), [size])
    assert Features(one, frozenset()).n_bytes == one.proj.nbytes + one.newline.nbytes
