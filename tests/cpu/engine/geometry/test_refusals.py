"""Directories that hold no model for this server: one line that names what they hold, before any weights are read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from foveate.configs.config import Config, ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine.common import ModelError
from foveate.engine.geometry.base import load_geometry
from foveate.engine.geometry.refusals import check_files
from foveate.server.find_model import find_model

Files = dict[str, dict[str, Any] | str]

# What is published, by file, and the method that the refusal names.
QUANTIZED: list[tuple[Files, str]] = [
    ({"config.json": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, r"awq \(4 bits\)"),
    ({"config.json": {"quantization_config": {"quant_method": "gptq", "bits": 8}}}, r"gptq \(8 bits\)"),
    ({"config.json": {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}}, "fp8;"),
    ({"config.json": {"quantization_config": {"load_in_8bit": True}}}, r"bitsandbytes \(8 bits\)"),
    (
        {"config.json": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}},
        r"bitsandbytes \(4 bits\)",
    ),
    ({"config.json": {"quantization_config": {"quant_method": "compressed-tensors"}}}, "compressed-tensors"),
    ({"config.json": {"compression_config": {"quant_method": "compressed-tensors"}}}, "compressed-tensors"),
    ({"config.json": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
    ({"config.json": {"text_config": {"quantization_config": {"quant_method": "hqq"}}}}, "text_config.*hqq"),
    (
        {"config.json": {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"bits": 4}}},
        r"MLX \(4 bits\)",
    ),
    ({"config.json": {"quantization_config": {"group_size": 128}}}, "without a name"),
    ({"quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": False}}, r"GPTQ \(4 bits\)"),
    ({"quant_config.json": {"w_bit": 4, "q_group_size": 128, "zero_point": True}}, r"AWQ \(4 bits\)"),
    ({"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, r"ModelOpt \(NVFP4\)"),
]
SOUND: list[Files] = [
    {"config.json": {"quantization_config": None}},
    {"config.json": {"quantization_config": {}}},
    {"config.json": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False}}},
    {"hf_quant_config.json": {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}},
    {"adapter_config.json": {"peft_type": "LORA"}},  # left over from weights that were merged
    {"training_args.bin": "pickle", "optimizer.pt": "pickle"},
]
OTHERS: list[tuple[Files, str]] = [
    (
        {"adapter_config.json": {"base_model_name_or_path": "org/base"}, "adapter_model.safetensors": ""},
        "LoRA adapter .*merge the adapter into org/base",
    ),
    ({"adapter_config.json": {"peft_type": "IA3"}, "adapter_model.bin": ""}, "IA3 adapter .*into its base model"),
    ({"config.json": {}, "pytorch_model.bin": "pickle"}, r"pickled PyTorch format \(pytorch_model.bin\).*safetensors"),
    ({"config.json": {}, "pytorch_model-00001-of-00002.bin": "", "x.txt": ""}, "pickled PyTorch"),
    ({"consolidated.00.pth": ""}, "consolidated.00.pth"),
    ({"llava-q4_k_m.gguf": "", "mmproj-model-f16.gguf": ""}, "GGUF format .*that the file was made from"),
    ({"config.json": {"model_type": "llava", "mm_vision_tower": "openai/clip"}}, "LLaVA's own code.*llava-hf"),
    ({"config.json": {"quantization_config": "awq"}}, "quantization_config is 'awq', not an object"),
]


def write(directory: Path, files: Files) -> None:
    """Write files; an object goes into a JSON object that is already there."""
    for name, content in files.items():
        file = directory / name
        if isinstance(content, dict):
            content = json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | content)
        file.write_text(content)


@pytest.mark.parametrize(("files", "named"), QUANTIZED)
def test_a_quantized_checkpoint_is_refused_by_its_method(
    tiny_models: Any, tmp_path: Path, files: Files, named: str
) -> None:
    tiny_models.save_llava(tmp_path)
    load_geometry(tmp_path)
    write(tmp_path, files)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=f"quantized by .*{named}" if "text" not in named else named) as refused:
        load_geometry(tmp_path)
    assert "\n" not in str(refused.value) and "serve the original checkpoint" in str(refused.value)
    with pytest.raises(ConfigError, match=re.escape(str(refused.value))):
        find_model(Config(model=ModelConfig(path=str(tmp_path))))


@pytest.mark.parametrize("files", SOUND)
def test_settings_that_quantize_nothing_are_no_reason(tiny_models: Any, tmp_path: Path, files: Files) -> None:
    tiny_models.save_llava(tmp_path)
    write(tmp_path, files)
    assert load_geometry(tmp_path).spec.family == "llava"
    assert find_model(Config(model=ModelConfig(path=str(tmp_path))))[1] == tmp_path


@pytest.mark.parametrize(("files", "named"), OTHERS)
def test_adapters_and_other_formats_are_named(tmp_path: Path, files: Files, named: str) -> None:
    write(tmp_path, files)
    for error in (ModelError, ConfigError):
        with pytest.raises(error, match=named) as refused:
            check_files(tmp_path, error)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=named):
        find_model(Config(model=ModelConfig(path=str(tmp_path))))


def test_an_adapter_beside_its_base_is_not_left_out_in_silence(tiny_models: Any, tmp_path: Path) -> None:
    tiny_models.save_llava(tmp_path)
    write(tmp_path, {"adapter_config.json": {}, "adapter_model.safetensors": ""})
    with pytest.raises(ModelError, match="LoRA adapter"):
        load_geometry(tmp_path)


def test_a_file_in_place_of_a_directory_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="model.gguf is a file; give the directory"):
        find_model(Config(model=ModelConfig(path=str(file))))


def test_a_hub_checkpoint_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    write(tmp_path, {"config.json": {"quantization_config": {"quant_method": "awq"}}})
    with pytest.raises(ConfigError, match="quantized by awq"):
        find_model(Config(model=ModelConfig(path="org/model-awq")))
    assert len(fetched) == 1 and not any("safetensors" in pattern for pattern in fetched[0])
    (tmp_path / "config.json").write_text("{}")
    find_model(Config(model=ModelConfig(path="org/model")))
    assert "*.safetensors" in fetched[-1]
