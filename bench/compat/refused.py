"""Checkpoints that the server cannot serve, and the one line that refuses each before any weights are read."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foveate.configs.errors import ConfigError
from foveate.engine.geometry.refusals import check_files


@dataclass(frozen=True)
class Refused:
    """One checkpoint, and what the server says of it; empty if it is not refused."""

    name: str
    said: str


def _quantized(**settings: object) -> dict[str, object]:
    return {"config.json": {"model_type": "llava", "quantization_config": settings}, "model.safetensors": ""}


# Name -> files of the directory: text, or an object of JSON.
CHECKPOINTS: dict[str, dict[str, object]] = {
    "AWQ": _quantized(quant_method="awq", bits=4),
    "GPTQ": _quantized(quant_method="gptq", bits=4),
    "FP8": _quantized(quant_method="fp8"),
    "bitsandbytes": _quantized(quant_method="bitsandbytes", load_in_4bit=True),
    "compressed-tensors": _quantized(quant_method="compressed-tensors"),
    "MLX": {"config.json": {"model_type": "llava", "quantization": {"bits": 4}}, "model.safetensors": ""},
    "ModelOpt": {
        "config.json": {"model_type": "llava"},
        "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}},
        "model.safetensors": "",
    },
    "LoRA adapter": {
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/model"},
        "adapter_model.safetensors": "",
    },
    "pickled weights": {"config.json": {"model_type": "llava"}, "pytorch_model.bin": ""},
    "GGUF": {"model-q4.gguf": ""},
    "LLaVA's own layout": {"config.json": {"model_type": "llava", "mm_vision_tower": "x"}, "model.safetensors": ""},
}


def try_all() -> Iterator[Refused]:
    """Show every checkpoint to the check that the server makes first."""
    for name, files in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content)
                (Path(folder) / file).write_text(text)
            said = ""
            try:
                check_files(Path(folder), ConfigError)
            except ConfigError as error:
                said = str(error).replace(f"{folder}/", "").replace(folder, "DIRECTORY")
            yield Refused(name, said)
