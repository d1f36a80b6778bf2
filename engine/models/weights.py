"""How the matrices of a model are held: the setting `model.weights`, turned into a form for each of them."""

from dataclasses import dataclass

import torch

from foveate.configs.config import ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine.models.parts.layers import Embedding, Matrix, Storage
from foveate.kernels.cpu.weights import INTEGERS, Form
from foveate.kernels.hardware.device import packed_forms, packs, rounded_form

_FORMS: dict[str, Form] = {"fp32": "float32", "bf16": "bfloat16", "int16": "int16", "int8": "int8", "int4": "int4"}
HEAD = "lm_head"
_NAMES = {form: name for name, form in _FORMS.items()}


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What each role's matrices become.

    On CUDA, and where the CPU runs the reference, matrices are plain tensors in the model's dtype. Packed matrices
    take activations in float32, so a checkpoint in bfloat16 is held in bfloat16 without loss, whatever the model's
    dtype. Where the model's dtype is bfloat16 and the processor multiplies no bfloat16, int16 takes its place: as
    small, nearer to the truth than inputs rounded to bfloat16, and half as fast again as float32's arithmetic.
    """

    dtype: torch.dtype
    device: torch.device
    wide: Form | None  # of what is not in 8 or 4 bits; None: plain tensors
    decoder: Form | None
    quantize: tuple[str, ...]

    @classmethod
    def make(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device, stored: torch.dtype) -> "WeightPlan":
        """Plan for a checkpoint whose matrices are `stored` in one dtype (float32 if mixed).

        Raises:
            ConfigError: the form asked for does not exist here.
        """
        asked = _FORMS.get(config.weights)
        if asked in INTEGERS and asked not in packed_forms(device):
            raise ConfigError(f"model.weights: {config.weights} runs on the CPU only; use auto on {device}")
        if not packs(device) and asked not in INTEGERS:
            return cls(dtype, device, None, None, ())
        wide: Form = "bfloat16" if torch.bfloat16 in (stored, dtype) else "float32"
        if asked in ("float32", "bfloat16", "int16"):
            wide = asked
        elif dtype == torch.bfloat16:
            wide = rounded_form()
        return cls(dtype, device, wide, asked or wide, config.quantize)

    @property
    def rows_dtype(self) -> torch.dtype:
        """Of activations, norms and biases."""
        return self.dtype if self.wide is None else torch.float32

    @property
    def name(self) -> str:
        """As the setting calls it."""
        if self.decoder is None:
            return "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return _NAMES[self.decoder]

    def storage(self, path: str, matrix: Matrix, tied: bool) -> Storage:
        """How the matrix at `path` of a family is held; `tied`: its embedding is its head. What is quantized besides
        the decoder's layers is never put below 8 bits: logits and features feel four of them."""
        if path.startswith("language_model.layers."):
            form = self.decoder
        else:
            embeds = isinstance(matrix, Embedding)
            role = "head" if path == HEAD or (embeds and tied) else "embeddings" if embeds else "tower"
            quantized = self.decoder in ("int8", "int4") and role in self.quantize
            form = "int8" if quantized else self.wide
        return Storage(self.dtype, self.device, form)
