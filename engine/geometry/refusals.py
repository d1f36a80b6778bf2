"""Directories that hold no checkpoint for this server: adapters, weights in other formats, quantized weights.

The names of the files and a few small JSON files decide, so a refusal comes before any weights are read, or fetched.
"""

from collections.abc import Iterator
from pathlib import Path

from foveate.engine.common import Section

_FORMATS = {  # of weights that are not safetensors, by the end of the file's name
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".bin": "pickled PyTorch",
    ".pth": "pickled PyTorch",
    ".pt": "pickled PyTorch",
    ".ckpt": "pickled PyTorch",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".npz": "NumPy",
}
_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}  # of a training run
_IN_CONFIG = ("quantization_config", "compression_config", "quantization")  # transformers; its older name; MLX
_OWN_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ and ModelOpt
_FLAGS = {"load_in_4bit": "4", "load_in_8bit": "8"}  # how bitsandbytes says the width
_REMEDY = (
    "this server reads unquantized weights: serve the original checkpoint; "
    "on a CPU, model.weights=int8 or int4 quantizes them at load"
)


def check_files(path: Path, error: type[Exception]) -> None:
    """Refuse a directory that holds something else than an unquantized model in safetensors.

    Args:
        error: what a refusal raises: ConfigError or ModelError. A broken JSON file raises the same.
    """
    check_settings(path, error)
    _refuse_formats(path, error)


def check_settings(path: Path, error: type[Exception]) -> None:
    """As `check_files`, by the JSON files alone, for a directory whose weights may still be on their way."""
    _refuse_adapter(path, error)
    file = path / "config.json"
    if file.is_file():
        config = Section.read(file, error)
        _refuse_quantized(config)
        if "mm_vision_tower" in config:
            raise error(
                f"model.path: {file} has the layout of LLaVA's own code (mm_vision_tower); serve the checkpoint "
                "converted for transformers, which the hub has under llava-hf"
            )
    for name in _OWN_FILES:
        if (path / name).is_file():
            _refuse_own_file(Section.read(path / name, error))


def _refuse_adapter(path: Path, error: type[Exception]) -> None:
    """An adapter's weights alone are no model; beside a model, they would be left out without a word."""
    file = path / "adapter_config.json"
    adapts = any(path.glob("adapter_model.*")) or not (path / "config.json").is_file()
    if not file.is_file() or not adapts:
        return
    settings = Section.read(file, error)
    kind = settings.text("peft_type", "LORA").replace("LORA", "LoRA")
    base = settings.text("base_model_name_or_path", "") or "its base model"
    raise error(
        f"model.path: {path} holds a {kind} adapter (adapter_config.json), which this server does not apply; "
        f"merge the adapter into {base} (PEFT: merge_and_unload, save_pretrained) and serve the result"
    )


def _refuse_formats(path: Path, error: type[Exception]) -> None:
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return
    for file in sorted(path.glob("*")):
        kind = _FORMATS.get(file.suffix.lower())
        if kind is not None and file.name not in _NO_WEIGHTS and file.is_file():
            remedy = "convert them with save_pretrained of transformers"
            if kind in ("GGUF", "GGML"):
                remedy = "serve the checkpoint that the file was made from"
            raise error(
                f"model.path: {path} holds weights in {kind} format ({file.name}) and none in safetensors, "
                f"the only format that this server reads; {remedy}"
            )


def _refuse_quantized(config: Section) -> None:
    inner = [config.section(key) for key in config.keys() if config.is_object(key)]
    for part in (config, *inner):
        for key in _IN_CONFIG:
            if key not in part:
                continue
            # MLX writes its settings under two keys, and names no method under either.
            unnamed = "MLX" if "quantization" in part else ""
            method = _method(part.section(key), unnamed)
            if method:
                raise config.error(f"model.path: {part.where}: {key}: the weights are quantized by {method}; {_REMEDY}")


def _refuse_own_file(file: Section) -> None:
    """A file that a quantizer writes beside config.json."""
    unnamed = "GPTQ" if file.where.endswith("quantize_config.json") else "AWQ"
    if file.is_object("quantization"):  # ModelOpt
        inner = file.section("quantization")
        algorithm = inner.text("quant_algo", "")
        method = f"ModelOpt ({algorithm})" if algorithm else ""  # null: the cache is quantized, the weights are not
    else:
        method = _method(file, unnamed)
    if method:
        raise file.error(f"model.path: {file.where}: the weights are quantized by {method}; {_REMEDY}")


def _method(settings: Section, unnamed: str) -> str:
    """The name of the method and the bits per weight; empty where the settings quantize nothing."""
    if not settings.keys():
        return ""
    on = [bits for flag, bits in _FLAGS.items() if settings.flag(flag, False)]
    name = settings.text("quant_method", "")
    if any(flag in settings for flag in _FLAGS):
        if not on and name in ("", "bitsandbytes"):  # a model saved after a run that quantized nothing
            return ""
        name = name or "bitsandbytes"
    name = name or settings.text("quant_algo", "") or unnamed or "a method without a name"
    bits = "".join(on[:1]) or next(_widths(settings), "")
    return f"{name} ({bits} bits)" if bits else name


def _widths(settings: Section) -> Iterator[str]:
    for key in ("bits", "w_bit", "wbits"):
        if key in settings:
            yield str(settings.number(key, 0)).removesuffix(".0")
