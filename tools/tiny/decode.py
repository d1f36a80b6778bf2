"""Forward pass of the decoder over packed questions, and the guidance of its attention.

Weights and results equal the Hugging Face model. The pass leaves out unnecessary work: attention between questions
and, in the last layer, all positions that predict no answer token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny.losses import Batch, Seen
from tiny.models import Model, decoder_of

GUIDED = {1: (0, 3), 2: (0, 3)}  # decoder layer -> guided heads, one per key/value head


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embedding (cos, sin), each [B, S, E], to heads x [B, H, S, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0][:, None] + torch.cat((-second, first), dim=-1) * rotary[1][:, None]


def _norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def _gather(x: Tensor, at: Tensor) -> Tensor:
    """Gather rows `at` [B, G] of x [B, S, E]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


@dataclass
class Packed:
    """Input of the decoder: S positions, of which the first `head` come before the questions or before the answer.

    Attributes:
        embedded: [B, S, D].
        positions: [B, S], or [3, B, S] with M-RoPE.
        mask: [B, T, S], what the last T = S - `head` positions read.
        past: [B, head, head], what the first positions read; None: all before them.
        first: number of positions before the visual tokens.
    """

    embedded: Tensor
    positions: Tensor
    mask: Tensor
    past: Tensor | None
    first: int
    head: int


def embed(model: Model, family: str, batch: Batch, seen: Seen, prefix: list[int]) -> Packed:
    """Lay out prefix, visual tokens and questions; with `owner` in the batch, the text comes before the image."""
    table = model.get_input_embeddings()
    keep, kept, grid = batch["keep"], batch["kept"], batch["grid"].tolist()
    size, lead = len(keep), len(prefix)
    start = table(torch.tensor(prefix)).expand(size, -1, -1)
    first = torch.arange(lead).expand(size, -1)
    real, tokens, place = torch.ones(size, lead, dtype=torch.bool), seen.tokens, torch.full((size, 1), lead)
    if "owner" in batch:
        before, n_before = batch["before"], batch["n_before"][:, None]
        steps = torch.arange(before.shape[1]).expand(size, -1)
        start, first = torch.cat((start, table(before)), dim=1), torch.cat((first, lead + steps), dim=1)
        real = torch.cat((real, steps < n_before), dim=1)
        tokens, place = tokens[batch["owner"]], lead + n_before
    embedded = torch.cat((start, _gather(tokens, keep), table(batch["ids"])), dim=1)
    if family == "llava":
        positions = torch.cat((first, keep + place, batch["positions"] + place + grid[0] * grid[1]), dim=1)
    else:
        text = batch["positions"] + place + max(grid)
        axes = (place.expand_as(keep), keep // grid[1] + place, keep % grid[1] + place)
        positions = torch.stack([torch.cat((first, axis, text), dim=1) for axis in axes])
    segments = batch["segments"]
    own = (segments[:, :, None] == segments[:, None, :]).tril()
    real = torch.cat((real, kept), dim=1)
    mask = torch.cat((real[:, None].expand(-1, segments.shape[1], -1), own), dim=2)
    past = (real[:, None].expand(-1, real.shape[1], -1)).tril() if "owner" in batch else None
    return Packed(embedded, positions, mask, past, start.shape[1], real.shape[1])


def _look_at(query: Tensor, key: Tensor, at: Tensor, wanted: Tensor, allowed: Tensor, heads: tuple[int, ...]) -> Tensor:
    """-log(attention on wanted positions) of rotated queries [B, H, T, E] at positions `at` [B, G], mean over heads."""
    groups = query.shape[1] // key.shape[1]
    valid = wanted.any(-1)
    losses = []
    for head in heads:
        scores = _gather(query[:, head], at) @ key[:, head // groups].transpose(1, 2) * query.shape[-1] ** -0.5
        share = scores.masked_fill(~allowed, -1e4).log_softmax(-1).masked_fill(~wanted, -1e4).logsumexp(-1)
        losses.append(-share[valid].mean())
    return torch.stack(losses).mean()


def _guidance(batch: Batch, mask: Tensor, lead: int, head: int) -> tuple[Tensor, Tensor]:
    """Return the targets and the allowed positions of the guided attention: (wanted, allowed), each [B, G, S]."""
    cells = batch["guide_cells"].gather(2, batch["keep"][:, None].expand(-1, batch["guide_at"].shape[1], -1))
    wanted = mask.new_zeros(*batch["guide_at"].shape, mask.shape[2])
    wanted[..., lead:head] = cells & batch["kept"][:, None]
    return wanted, _gather(mask, batch["guide_at"])


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, past_bias: Tensor | None, head: int) -> Tensor:
    """Attention of all positions. The questions use `bias` [B, 1, T, S].

    The first `head` positions use `past_bias` [B, 1, head, head]; None: they are causal.
    """
    first = (query[:, :, :head], key[:, :, :head], value[:, :, :head])
    past = F.scaled_dot_product_attention(*first, attn_mask=past_bias, is_causal=past_bias is None)
    asked = F.scaled_dot_product_attention(query[:, :, head:], key, value, attn_mask=bias)
    return torch.cat((past, asked), dim=2)


def _attention_at(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, places: Tensor) -> Tensor:
    """Attention of only the positions `places` [B, P] in the questions. `query` [B, H, P, E]: only these positions."""
    local = bias.gather(2, places[:, None, :, None].expand(-1, -1, -1, bias.shape[-1]))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=local)


def _bias(mask: Tensor) -> Tensor:
    """Return 0 where `mask` [B, T, S] is set and -inf elsewhere, [B, 1, T, S]."""
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))[:, None]


def _mlp(x: Tensor, layer: Any) -> Tensor:
    normed = _norm(x, layer.post_attention_layernorm)
    added: Tensor = layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
    return x + added


def _heads(x: Tensor, projection: Any, width: int) -> Tensor:
    """Project x [B, S, D] to heads [B, H, S, E]."""
    heads: Tensor = projection(x).view(len(x), x.shape[1], -1, width).transpose(1, 2)
    return heads


def answer(
    model: Model, family: str, batch: Batch, seen: Seen, prefix: list[int], guide: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logits [n, vocabulary], targets [n], guidance loss, visual tokens after the first layer [B, K, D]).

    The n positions predict the answer tokens.
    """
    packed = embed(model, family, batch, seen, prefix)
    x, head = packed.embedded, packed.head
    decoder: Any = decoder_of(model)
    rotary = decoder.rotary_emb(x, packed.positions)
    bias, past_bias = _bias(packed.mask), None if packed.past is None else _bias(packed.past)
    asked = batch["targets"] != -100
    most = max(1, int(asked.sum(1).max()))
    places = asked.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # answers first, then padding
    real = asked.gather(1, places)
    guided, (wanted, allowed) = x.new_zeros(()), _guidance(batch, packed.mask, packed.first, head)
    for index, layer in enumerate(decoder.layers):
        last, attention = index == len(decoder.layers) - 1, layer.self_attn
        normed = _norm(x, layer.input_layernorm)
        asking = _gather(normed[:, head:], places) if last else normed
        turn = tuple(_gather(part[:, head:], places) for part in rotary) if last else rotary
        query = _rotate(_heads(asking, attention.q_proj, attention.head_dim), turn)  # type: ignore[arg-type]
        key = _rotate(_heads(normed, attention.k_proj, attention.head_dim), rotary)
        if guide and index in GUIDED:
            guided = guided + _look_at(query[:, :, head:], key, batch["guide_at"], wanted, allowed, GUIDED[index])
        value = _heads(normed, attention.v_proj, attention.head_dim)
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        if last:
            mixed, x = _attention_at(query, key, value, bias, places), _gather(x[:, head:], places)
        else:
            mixed = _attention(query, key, value, bias, past_bias, head)
        x = _mlp(x + attention.o_proj(mixed.transpose(1, 2).flatten(2)), layer)
        if index == 0:
            early = x[:, packed.first : head]
    hidden: Tensor = _norm(x[real], decoder.norm)
    output: nn.Module = model.lm_head
    return output(hidden), batch["targets"].gather(1, places)[real], guided / len(GUIDED), early
