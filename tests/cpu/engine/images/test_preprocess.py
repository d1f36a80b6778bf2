"""Our image processors against the PIL back ends of `transformers`: pixel for pixel, then value for value."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageChops
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from foveate.configs.errors import ConfigError
from foveate.engine.common import ImageError
from foveate.engine.images.preprocess import ImageProcessor, resize_padded
from foveate.engine.models.parts.tower import normalise, patches

torch.set_num_threads(1)
SIZES = [(1, 1), (30, 30), (31, 30), (17, 200), (225, 91), (224, 224), (335, 337), (640, 427), (3, 5)]
CASES = [
    (CLIPImageProcessorPil, {}),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
    (CLIPImageProcessorPil, {"size": 40, "crop_size": 57, "rescale_factor": 0.01, "image_mean": [0.1, 0.2, 0.3]}),
    (CLIPImageProcessorPil, {"size": [31, 44], "crop_size": [29, 44]}),
    (CLIPImageProcessorPil, {"size": {"height": 33, "width": 40}, "crop_size": {"height": 51, "width": 23}}),
    (CLIPImageProcessorPil, {"size": {"height": 30, "width": 30}, "do_center_crop": False, "resample": 2}),
    (LlavaImageProcessorPil, {"do_pad": True, "size": 50, "crop_size": 50}),
    (SiglipImageProcessorPil, {}),
    (SiglipImageProcessorPil, {"size": {"height": 38, "width": 50}, "do_normalize": False}),
    (Qwen2VLImageProcessorPil, {}),
    (Qwen2VLImageProcessorPil, {"min_pixels": 100 * 100, "max_pixels": 200 * 200}),
    (Qwen2VLImageProcessorPil, {"size": {"shortest_edge": 1024, "longest_edge": 9000}, "patch_size": 8}),
]
SMALL = {"size": 28, "crop_size": 28, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]}
PUBLISHED = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_pad": True}
TILED = [  # and how many pictures a request has
    (LlavaNextImageProcessorPil, SMALL, 1),
    (LlavaNextImageProcessorPil, SMALL | {"resample": 2, "do_normalize": False}, 3),
    (LlavaNextImageProcessorPil, SMALL | {"crop_size": None, "do_center_crop": False}, 1),
    (LlavaNextImageProcessorPil, PUBLISHED, 1),
    (LlavaOnevisionImageProcessorPil, {}, 1),
    (LlavaOnevisionImageProcessorPil, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 2),
    (LlavaOnevisionImageProcessorPil, {"size": {"height": 20, "width": 20}, "image_grid_pinpoints": [[20, 40]]}, 1),
]


def load(path, kind, settings):
    name = kind.__name__.removesuffix("Pil")
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name} | settings))
    return ImageProcessor.load(path)


def pixels_of(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.mark.parametrize("kind, settings", CASES)
def test_values_equal_transformers(tiny_models, tmp_path, kind, settings):
    ours, theirs = load(tmp_path, kind, settings), kind(**settings)
    for seed, (height, width) in enumerate(SIZES):
        picture = tiny_models.picture(height, width, seed)
        ready = ours.prepare(picture)
        assert (ready.height, ready.width) == ours.prepared_size(height, width)
        values = normalise(pixels_of(ready), ours)
        expected = torch.as_tensor(theirs(picture, return_tensors="pt")["pixel_values"])
        if kind is Qwen2VLImageProcessorPil:  # theirs repeats each patch for both frames
            patch = settings.get("patch_size", 14)
            values = patches(values, patch, 2)
            expected = expected.view(-1, 3, 2, patch * patch)
            assert torch.equal(expected[:, :, 0], expected[:, :, 1])
            expected = expected[:, :, 0].flatten(1)
        else:
            values, expected = values.permute(2, 0, 1), expected[0]
        assert values.shape == expected.shape
        assert (values - expected).abs().max() < 2e-6


@pytest.mark.parametrize("kind, settings, n_images", TILED)
def test_tiles_equal_transformers(tiny_models, tmp_path, kind, settings, n_images):
    ours, theirs = load(tmp_path, kind, settings), kind(**settings)
    cut = kind is LlavaNextImageProcessorPil or n_images == 1
    assert ours.is_cut(n_images) == cut
    several = n_images > 1 and kind is LlavaOnevisionImageProcessorPil
    for seed, (height, width) in enumerate(SIZES[:: 1 if ours.size[0] < 100 else 3]):
        picture = tiny_models.picture(height, width, seed)
        ready = ours.prepare_tiles(picture) if cut else ours.prepare(picture)
        seen = theirs([[picture] * n_images] if several else [picture], return_tensors="pt")
        expected = seen["pixel_values"][0][: 1 if several else None]
        assert tuple(seen["image_sizes"][0]) == (height, width)
        values = normalise(pixels_of(ready), ours).view(-1, *ours.size, 3).permute(0, 3, 1, 2)
        assert values.shape == expected.shape
        assert (values - expected).abs().max() < 2e-6


TYPES = [CLIPImageProcessorPil, SiglipImageProcessorPil, Qwen2VLImageProcessorPil, LlavaOnevisionImageProcessorPil]


@pytest.mark.parametrize("kind", TYPES)
def test_what_transformers_saves(tmp_path, kind):
    """Its own file round-trips, and so does the same inside processor_config.json."""
    kind().save_pretrained(tmp_path)
    own = ImageProcessor.load(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    joint = {"image_processor": json.loads(file.read_text()), "processor_class": "X"}
    file.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(joint))
    assert ImageProcessor.load(tmp_path) == own == load(tmp_path, kind, {})


def write(path, **files):
    for name, settings in files.items():
        (path / f"{name}.json").write_text(json.dumps(settings))


def test_the_processors_file_wins_over_an_old_one_beside_it(tmp_path):
    """Where it holds settings of an image processor; `transformers` reads the two in the same order."""
    old = {"image_processor_type": "CLIPImageProcessor", "size": 40, "crop_size": 40}
    new = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 38, "width": 50}}
    for joint, winner in [
        ({"image_processor": new, "processor_class": "X"}, new),
        ({"image_processor": None}, old),
        ({"processor_class": "X", "patch_size": 14}, old),
    ]:
        write(tmp_path, preprocessor_config=old, processor_config=joint)
        theirs, _ = CLIPImageProcessorPil.get_image_processor_dict(tmp_path)
        assert theirs == winner
        ours = ImageProcessor.load(tmp_path)
        assert ours.size == ((38, 50) if winner is new else (40, 40))


@pytest.mark.parametrize(
    "model_type, settings, kind",
    [
        ("llava", {"do_pad": True, "size": 50, "crop_size": 50}, LlavaImageProcessorPil),
        ("llava_next", SMALL, LlavaNextImageProcessorPil),
        ("llava_onevision", {}, LlavaOnevisionImageProcessorPil),
        ("qwen2_vl", {"min_pixels": 100 * 100, "max_pixels": 200 * 200}, Qwen2VLImageProcessorPil),
        ("qwen2_5_vl", {}, Qwen2VLImageProcessorPil),
    ],
)
def test_without_a_type_the_models_type_decides(tmp_path, model_type, settings, kind):
    expected = load(tmp_path, kind, settings)
    write(tmp_path, preprocessor_config=settings, config={"model_type": model_type})
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is kind
    assert ImageProcessor.load(tmp_path) == expected
    write(tmp_path, preprocessor_config={}, processor_config={"image_processor": settings})
    assert ImageProcessor.load(tmp_path) == expected


def test_a_type_in_the_config_comes_before_the_models(tmp_path):
    config = {"model_type": "llava", "image_processor_type": "SiglipImageProcessor"}
    write(tmp_path, preprocessor_config={}, config=config)
    assert ImageProcessor.load(tmp_path) == load(tmp_path, SiglipImageProcessorPil, {})
    write(tmp_path, preprocessor_config={}, config={"model_type": "bert"})
    with pytest.raises(ConfigError, match="image_processor_type '' is not supported"):
        ImageProcessor.load(tmp_path)


def test_the_type_that_early_qwen_files_name(tmp_path):
    write(tmp_path, preprocessor_config={"image_processor_type": "Qwen2_5_VLImageProcessor"})
    assert ImageProcessor.load(tmp_path) == load(tmp_path, Qwen2VLImageProcessorPil, {})


def test_published_qwen_spelling(tmp_path):
    inside = load(tmp_path, Qwen2VLImageProcessorPil, {"size": {"min_pixels": 3136, "max_pixels": 12845056}})
    beside = load(tmp_path, Qwen2VLImageProcessorPil, {"min_pixels": 3136, "max_pixels": 12845056})
    assert inside == beside and inside.size == (3136, 12845056)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_modes_and_transparency(tmp_path, mode):
    picture = Image.new("RGBA", (40, 30), (255, 0, 0, 128)).convert(mode)
    ours = load(tmp_path, SiglipImageProcessorPil, {"do_normalize": False})
    theirs = SiglipImageProcessorPil(do_normalize=False)(picture, return_tensors="pt")["pixel_values"][0]
    assert (normalise(pixels_of(ours.prepare(picture)), ours).permute(2, 0, 1) - theirs).abs().max() < 2e-6


def test_identity_tells_settings_apart(tmp_path):
    cases = [*CASES, *((kind, settings) for kind, settings, _ in TILED if "crop_size" not in settings)]
    seen = {load(tmp_path, kind, settings).identity for kind, settings in cases}
    assert len(seen) == len(cases)


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (1, 70), (70, 1), (24, 24), (25, 24), (333, 7)])
@pytest.mark.parametrize("target", [(24, 24), (60, 60), (70, 20)])
def test_a_padded_picture_has_the_bits_of_the_whole_square(tiny_models, monkeypatch, size, target, resample):
    picture, colour = tiny_models.picture(*size, 5), (122, 116, 104)
    side = max(size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    expected = square.resize(target, resample)
    for band in (1, 3 * side, 2**20):
        monkeypatch.setattr("foveate.engine.images.preprocess._BAND_PIXELS", band)
        found = resize_padded(picture, target, colour, resample)
        most = max(high for _, high in ImageChops.difference(found, expected).getextrema())
        assert most <= (0 if target[0] == target[1] else 8)


SHAPES = [
    CASES[0],
    (SiglipImageProcessorPil, {}),
    (LlavaNextImageProcessorPil, PUBLISHED),
    (LlavaOnevisionImageProcessorPil, {}),
]


@pytest.mark.parametrize("kind, settings", SHAPES)
@pytest.mark.parametrize("size", [(1, 5_000_000), (5_000_000, 1)])
def test_a_line_of_millions_of_pixels_is_refused_before_it_fills_the_memory(tmp_path, kind, settings, size):
    ours, line = load(tmp_path, kind, settings), Image.new("RGB", size)
    for prepare in (ours.prepare, ours.prepare_tiles) if ours.tile_sizes else (ours.prepare,):
        with pytest.raises(ImageError, match="longer than 200 times its short edge; crop it"):
            prepare(line)


def test_a_panorama_is_padded_in_little_memory(tmp_path):
    """Its square would take 1.6 GB."""
    settings = {"rule": "exact", "size": (336, 336), "pad_square": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    program = f"""
import resource
from PIL import Image
from foveate.engine.images.preprocess import ImageProcessor, resize_padded
picture = Image.new("RGB", (20_000, 1_000), "red")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ImageProcessor(**{settings!r}).prepare(picture)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 100


@pytest.mark.parametrize("kind, settings", [CASES[0], CASES[9]])
def test_extreme_aspect_is_refused(tmp_path, kind, settings):
    ours = load(tmp_path, kind, settings)
    with pytest.raises(ImageError, match="1 x 40000000"):
        ours.prepared_size(40000000, 1)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
        ({"image_processor_type": "CLIPImageProcessor", "do_resize": False}, "do_resize"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "do_center_crop"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "do_pad"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 3}}, "longest_edge"),
        ({"image_processor_type": "SiglipImageProcessor", "size": 30}, "size.height"),
        ({"image_processor_type": "CLIPImageProcessor", "size": [336, 336, 3]}, "size .336, 336, 3."),
        ({"image_processor_type": "CLIPImageProcessor", "size": "336"}, "size is '336'"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": "336"}}, "height is '336'"),
        ({"image_processor_type": "SiglipImageProcessor", "resample": 9}, "resample 9"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "do not divide into square tiles"),
        ({"image_processor_type": "LlavaNextImageProcessor", "size": 336}, "crop_size"),
        ({"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": [[384]]}, "pairs"),
        ({"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": []}, "pairs"),
        ({"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": "none"}, "pairs"),
        ({"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 384, "width": 192}}, "square"),
        ({"image_processor_type": "SiglipImageProcessor", "image_mean": [1, 2]}, "image_mean"),
        ({"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 9, "max_pixels": 4}, "at least 9"),
        ({"image_processor_type": "Qwen2VLImageProcessor", "patch_size": "x"}, "patch_size"),
    ],
)
def test_unsupported_settings_are_named(tmp_path, settings, named):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=named):
        ImageProcessor.load(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="preprocessor_config.json"):
        ImageProcessor.load(tmp_path)


def test_imports_nothing_heavy():
    heavy = "('torch', 'numpy', 'transformers')"
    code = f"import sys, foveate.engine.images.preprocess; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
