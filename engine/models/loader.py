"""A Hugging Face directory to a model, strictly: every tensor has its place, every place its tensor.

Reads safetensors only, single or sharded; never pickles. Tensors are copied one at a time out of the mapped files into
the model, converted on the way, so memory peaks at one copy of the weights and one tensor.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveate.configs.config import ModelConfig
from foveate.engine.common import ModelError, Section
from foveate.engine.geometry.base import CheckpointGeometry, load_geometry
from foveate.engine.models.family import EMBEDDING, HEAD, Family
from foveate.engine.models.parts.layers import Linear, Matrix
from foveate.engine.models.weights import WeightPlan

_MAPPED_BYTES = 32 * 2**20  # of a file, read before it is opened again
_AS_IT_COMES = ModelConfig()
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
_POINTER = b"version https://git-lfs"
Progress = Callable[[int, int], None]  # told how many bytes of weights are loaded, and how many there are
# Tables that old versions saved and everyone computes: harmless in a file, and never read.
_COMPUTED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq)$")


def load_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    settings: ModelConfig = _AS_IT_COMES,
    progress: Progress = lambda done, total: None,
) -> Family:
    """Build the family that `config.json` names and fill it from the directory's safetensors.

    Args:
        settings: read for how weights are held.
        progress: called after each tensor, and at the end with both numbers equal.

    Raises:
        ModelError: a file is missing or broken, the family or a setting is not supported, or a tensor is missing,
            unexpected, doubled or of the wrong shape; each is named.
        ConfigError: the image processor's settings are not supported, or weights cannot be held as asked here.
    """
    geometry, device = load_geometry(path), torch.device(device)
    kind = f"{__package__}.{geometry.spec.family}"
    family: Callable[[CheckpointGeometry, torch.device], Family] = importlib.import_module(kind).FAMILY
    plan = WeightPlan.make(settings, dtype, device, _stored_dtype(path))
    with device, _default_dtype(plan.rows_dtype):
        model = family(geometry, device)
    model.requires_grad_(False).eval()
    model.dtype, model.weights = dtype, plan.name
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            module.storage = plan.storage(name, module, tied=model.lm_head is None)
    _fill(model, path, progress)
    return model


def _stored_dtype(path: Path) -> torch.dtype:
    """bfloat16 if every matrix of the checkpoint is, else float32. Reads the headers of the files only.

    Raises:
        ModelError: a tensor holds integers or 8-bit floats. Scales that the file may not even hold would be lacking.
    """
    seen = set()
    for file in _files(path):
        with _opened(file) as opened:
            for name in opened.keys():
                piece = opened.get_slice(name)
                kind, is_matrix = piece.get_dtype(), len(piece.get_shape()) > 1
                if kind not in _FLOATS and not _COMPUTED.search(name):
                    raise ModelError(
                        f"{file}: {name} is stored as {kind}, so the weights are quantized; this server reads "
                        f"{', '.join(_FLOATS)}: serve the original checkpoint"
                    )
                seen |= {kind} if is_matrix else set()
    return torch.bfloat16 if seen <= {"BF16"} else torch.float32


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are born uninitialised in their dtype on their device. Not on the meta device first: moving them from
    there imports sympy, and seconds of start-up."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the checkpoint goes."""

    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]


def _fill(model: Family, path: Path, progress: Progress) -> None:
    places = _places(model)
    done, total = 0, sum(file.stat().st_size for file in _files(path))
    owner: dict[str, str] = {}  # our name -> the checkpoint's
    for name, tensor in _tensors(path):
        progress(done, total)
        done += tensor.nbytes
        target = None if _COMPUTED.search(name) else model.rename(name)
        if target is None:
            continue
        if target in owner:
            raise ModelError(f"{path}: {name} and {owner[target]} are the same tensor under two names")
        owner[target] = name
        if target == HEAD and model.lm_head is None:
            continue
        if target not in places:
            raise ModelError(f"{path}: unexpected tensor {name} of shape {list(tensor.shape)}")
        if tuple(tensor.shape) != places[target].shape:
            expected = list(places[target].shape)
            raise ModelError(f"{path}: {name} has shape {list(tensor.shape)}, the config asks for {expected}")
        places[target].fill(tensor)
    missing = sorted(places.keys() - owner.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path}: tensor {missing[0]} is missing{more}")
    if model.lm_head is None and HEAD in owner:
        _check_tied(path, owner[HEAD], owner[EMBEDDING])
    progress(total, total)
    model.n_parameters = sum(prod(place.shape) for place in places.values())


def _check_tied(path: Path, head: str, embedding: str) -> None:
    """A tied head that was saved all the same must be the embedding, or the config lies about one of them."""
    (one,), (other,) = ([tensor for _, tensor in _tensors(path, only=name)] for name in (head, embedding))
    if one.shape != other.shape or not torch.equal(one, other):
        raise ModelError(f"{path}: tie_word_embeddings is true, but {head} differs from the embedding")


def _places(model: Family) -> dict[str, _Place]:
    """What to fill by checkpoint name: parameters, and the pieces of matrices and of their biases."""
    places: dict[str, _Place] = {}
    for path, module in model.named_modules():
        if isinstance(module, Matrix):
            places |= dict(_pieces(path, module))
        else:
            own = module.named_parameters(path, recurse=False)
            places |= {name: _Place(tuple(p.shape), p.copy_) for name, p in own}
    return places


def _pieces(path: str, matrix: Matrix) -> Iterator[tuple[str, _Place]]:
    siblings = path.rpartition(".")[0]
    bias = matrix.bias if isinstance(matrix, Linear) else None
    first = 0
    for piece, n_rows in matrix.pieces.items():
        name = f"{siblings}.{piece}" if piece else path
        yield f"{name}.weight", _Place((n_rows, matrix.n_in), partial(matrix.fill, piece))
        if bias is not None:
            yield f"{name}.bias", _Place((n_rows,), bias[first : first + n_rows].copy_)
        first += n_rows


class _Slice(Protocol):
    def get_dtype(self) -> str: ...
    def get_shape(self) -> list[int]: ...


class _Opened(Protocol):
    """What we use of safetensors' open file, which has no types."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


@contextmanager
def _opened(file: Path) -> Iterator[_Opened]:
    """Raises ModelError where the file is missing or broken."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"{file}: {_why_closed(file, problem)}") from problem


def _why_closed(file: Path, problem: Exception) -> str:
    if not file.is_file():
        return "the file is missing; download the checkpoint again"
    with file.open("rb") as raw:
        if raw.read(len(_POINTER)) == _POINTER:
            return "the file is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder"
    return str(problem)


def _tensors(path: Path, only: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the directory, or `only` one, by its saved name; mapped, and dropped when the caller moves on.

    What was read of a mapped file counts as resident until the file is closed, so it is opened again now and then.
    """
    for file in _files(path):
        with _opened(file) as opened:
            left = [name for name in opened.keys() if only in ("", name)]
        while left:
            read = 0
            with _opened(file) as opened:
                while left and read < _MAPPED_BYTES:
                    tensor = opened.get_tensor(left[0])
                    read += tensor.nbytes
                    yield left.pop(0), tensor
                    del tensor


def _files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():  # before an index, as `transformers` does: an old index may lie beside weights saved later
        return [single]
    if index.is_file():
        shards = Section.read(index, ModelError).section("weight_map")
        files = {shards.text(name, "") for name in shards.keys()}
        if any(Path(file).name != file for file in files):
            raise ModelError(f"{index}: a shard lies outside the directory")
        return [path / file for file in sorted(files)]
    others = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3])
    found = f", only {others}" if others else ""
    raise ModelError(f"model.path: {path} holds neither model.safetensors nor model.safetensors.index.json{found}")
