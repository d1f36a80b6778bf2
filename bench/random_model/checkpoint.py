"""Random models of published shapes, always the same ones, for benches that need no trained weights.

`llava`     CLIP ViT-L/14-336 (576 visual tokens), two-layer projector, a decoder of Qwen2-0.5B's shape with 32,000
            tokens; 0.69 B parameters
`qwen2_vl`  a Qwen2-VL of about the same size: the same decoder with M-RoPE, and a tower of 24 layers of 1024

A model is a Hugging Face directory with the published names: bfloat16 safetensors, tokenizer, chat template, processor.
A generator seeded by the tensor's name draws each tensor, so neither order nor sharding matters. One shard is in memory
at a time. Weights are scaled by their fan-in, so activations stay of order one and logits are finite in bfloat16. The
tokenizer has a text for every id. Ids that do not show as text (specials, bytes) have nearly zero rows in the tied
embedding, so greedy decoding does not draw these ids. Every output token is therefore visible to a client that times a
stream.
"""

import argparse
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.random_model.shape import FAMILIES, Shape, configs
from bench.random_model.text import N_SILENT, write_tokenizer
from foveate.configs.load import load as load_config
from foveate.engine.models.base import Model
from foveate.engine.process import load

_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Spec:
    """One tensor to draw: normally distributed around `mean`."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def n_bytes(self) -> int:
        return 2 * torch.Size(self.shape).numel()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a bench that runs one of these models in its own process."""
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of the engine")
    parser.add_argument("--models", type=Path, default=Path(".peers/models"), help="where the random model is or goes")


def loaded(args: argparse.Namespace) -> Model:
    """Load the model that the arguments name. A missing model is built first."""
    folder = args.models / args.family
    build(args.family, folder)
    return load(load_config(None, [*args.set, f"model.path={folder}"]))


def build(family: str, folder: Path, shape: Shape | None = None, seed: int = 0) -> None:
    """Write the model. A folder that holds the same model is left alone."""
    assert family in FAMILIES, f"family is one of {FAMILIES}"
    shape = shape or Shape()
    mark = folder / "random_model.json"
    made_from = json.dumps({"family": family, "shape": repr(shape), "seed": seed})
    if mark.is_file() and mark.read_text() == made_from:
        return
    folder.mkdir(parents=True, exist_ok=True)
    specs = list(_llava_tensors(shape) if family == "llava" else _qwen_tensors(shape))
    _write_weights(folder, specs, shape.vocab, seed)
    write_tokenizer(folder, family, shape.vocab, shape.context)
    for name, content in configs(family, shape).items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    mark.write_text(made_from)  # last: an interrupted run is done again


def n_parameters(family: str, shape: Shape | None = None) -> int:
    """Parameters of the whole checkpoint."""
    specs = (_llava_tensors if family == "llava" else _qwen_tensors)(shape or Shape())
    return sum(spec.n_bytes // 2 for spec in specs)


def _write_weights(folder: Path, specs: Sequence[Spec], vocab: int, seed: int) -> None:
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.n_bytes for s in shards[-1]) + spec.n_bytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({spec.name: _draw(spec, vocab, seed) for spec in shard}, folder / file, {"format": "pt"})
        weight_map |= {spec.name: file for spec in shard}
    index = {"metadata": {"total_size": sum(spec.n_bytes for spec in specs)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _draw(spec: Spec, vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode(), seed))
    values = torch.empty(spec.shape).normal_(spec.mean, spec.std, generator=generator)
    if spec.shape[0] == vocab and "embed_tokens" in spec.name:
        values[:N_SILENT] *= 0.01
    return values.bfloat16()


def _linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Iterator[Spec]:
    yield Spec(f"{name}.weight", (n_out, n_in), n_in**-0.5)
    if bias:
        yield Spec(f"{name}.bias", (n_out,), 0.02)


def _norm(name: str, n: int, bias: bool = True) -> Iterator[Spec]:
    yield Spec(f"{name}.weight", (n,), 0.02, mean=1.0)
    if bias:
        yield Spec(f"{name}.bias", (n,), 0.02)


def _decoder_tensors(shape: Shape, prefix: str) -> Iterator[Spec]:
    narrow = shape.kv_heads * shape.head_dim
    yield Spec(f"{prefix}.embed_tokens.weight", (shape.vocab, shape.hidden), 0.05)
    for i in range(shape.layers):
        layer = f"{prefix}.layers.{i}"
        yield from _linear(f"{layer}.self_attn.q_proj", shape.hidden, shape.hidden)
        yield from _linear(f"{layer}.self_attn.k_proj", shape.hidden, narrow)
        yield from _linear(f"{layer}.self_attn.v_proj", shape.hidden, narrow)
        yield from _linear(f"{layer}.self_attn.o_proj", shape.hidden, shape.hidden, bias=False)
        yield from _linear(f"{layer}.mlp.gate_proj", shape.hidden, shape.inner, bias=False)
        yield from _linear(f"{layer}.mlp.up_proj", shape.hidden, shape.inner, bias=False)
        yield from _linear(f"{layer}.mlp.down_proj", shape.inner, shape.hidden, bias=False)
        yield from _norm(f"{layer}.input_layernorm", shape.hidden, bias=False)
        yield from _norm(f"{layer}.post_attention_layernorm", shape.hidden, bias=False)
    yield from _norm(f"{prefix}.norm", shape.hidden, bias=False)


def _llava_tensors(shape: Shape) -> Iterator[Spec]:
    n, tower = shape.tower_hidden, "vision_tower.vision_model"
    rows = (shape.side // shape.patch) ** 2 + 1
    yield Spec(f"{tower}.embeddings.class_embedding", (n,), 1.0)
    yield Spec(f"{tower}.embeddings.patch_embedding.weight", (n, 3, shape.patch, shape.patch), 0.04)
    yield Spec(f"{tower}.embeddings.position_embedding.weight", (rows, n), 0.5)
    yield from _norm(f"{tower}.pre_layrnorm", n)
    for i in range(shape.tower_layers):
        layer = f"{tower}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{part}", n, n)
        yield from _linear(f"{layer}.mlp.fc1", n, shape.tower_inner)
        yield from _linear(f"{layer}.mlp.fc2", shape.tower_inner, n)
        yield from _norm(f"{layer}.layer_norm1", n)
        yield from _norm(f"{layer}.layer_norm2", n)
    yield from _norm(f"{tower}.post_layernorm", n)
    yield from _linear("multi_modal_projector.linear_1", n, shape.hidden)
    yield from _linear("multi_modal_projector.linear_2", shape.hidden, shape.hidden)
    yield from _decoder_tensors(shape, "language_model.model")


def _qwen_tensors(shape: Shape) -> Iterator[Spec]:
    n = shape.tower_hidden
    yield Spec("visual.patch_embed.proj.weight", (n, 3, 2, shape.patch, shape.patch), 0.03)
    for i in range(shape.tower_layers):
        block = f"visual.blocks.{i}"
        yield from _norm(f"{block}.norm1", n)
        yield from _linear(f"{block}.attn.qkv", n, 3 * n)
        yield from _linear(f"{block}.attn.proj", n, n)
        yield from _norm(f"{block}.norm2", n)
        yield from _linear(f"{block}.mlp.fc1", n, shape.tower_inner)
        yield from _linear(f"{block}.mlp.fc2", shape.tower_inner, n)
    yield from _norm("visual.merger.ln_q", n)
    yield from _linear("visual.merger.mlp.0", 4 * n, 4 * n)
    yield from _linear("visual.merger.mlp.2", 4 * n, shape.hidden)
    yield from _decoder_tensors(shape, "model")
