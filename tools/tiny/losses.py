"""Forward pass of the towers, and their auxiliary losses, which are discarded after training.

The losses train the tower to describe each patch and the CLS token to describe the whole image. They also move the
visual tokens near the embeddings of the matching words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tiny import labels, models
from tiny.models import Model

Batch = dict[str, Tensor]


@dataclass
class Seen:
    """The tower's output for a batch: patch features [B, N, C], visual tokens [B, N, D], and LLaVA's CLS token."""

    patches: Tensor
    tokens: Tensor
    summary: Tensor | None
    summary_attention: Tensor | None


def _normalise(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(models.CLIP_MEAN), torch.tensor(models.CLIP_STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def qwen_patches(images: Tensor) -> Tensor:
    """Flatten images [B, 3, H, W] like the processor: [B * H/8 * W/8, 3 * 2 * 8 * 8], merge groups adjacent."""
    patch, merge, times = models.QWEN_PATCH, models.QWEN_MERGE, models.QWEN_TEMPORAL
    size, _, height, width = images.shape
    rows, cols = height // (patch * merge), width // (patch * merge)
    blocks = images.view(size, 3, rows, merge, patch, cols, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    doubled = blocks.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, times, -1, -1)
    return doubled.reshape(size * rows * cols * merge**2, 3 * times * patch**2)


def _look_qwen(model: Model, images: Tensor, grid: Tensor) -> Seen:
    """Run Qwen2-VL's tower on images of one size, as a dense batch."""
    visual, merge = model.model.visual, models.QWEN_MERGE
    size, tokens = len(images), int(grid.prod())
    hidden = visual.patch_embed(qwen_patches(images)).view(size, tokens * merge**2, -1)
    rows, columns = torch.meshgrid(*(torch.arange(int(side)) for side in grid), indexing="ij")
    inner = torch.arange(merge**2)
    high = (rows.reshape(-1, 1) * merge + inner // merge).flatten()
    wide = (columns.reshape(-1, 1) * merge + inner % merge).flatten()
    cos, sin = visual.rotary_pos_emb(hidden, torch.stack((high, wide), dim=-1))
    for block in visual.blocks:
        attention = block.attn
        parts = attention.qkv(block.norm1(hidden)).view(size, hidden.shape[1], 3, attention.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        first, second = query.chunk(2, dim=-1)
        query = query * cos + torch.cat((-second, first), dim=-1) * sin
        first, second = key.chunk(2, dim=-1)
        key = key * cos + torch.cat((-second, first), dim=-1) * sin
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + attention.proj(mixed)
        hidden = hidden + block.mlp(block.norm2(hidden))
    tokens_out = visual.merger(hidden).view(size, tokens, -1)
    return Seen(hidden.view(size, tokens, -1), tokens_out, None, None)


def look(model: Model, family: str, batch: Batch) -> Seen:
    """Run the tower and the projector on the images of a batch."""
    images = _normalise(batch["pixels"])
    size = len(images)
    if family == "qwen2_vl":
        return _look_qwen(model, images, batch["grid"])
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(images))
    before = hidden
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
        before, hidden = hidden, layer(hidden, attention_mask=None)
    attention, heads = layer.self_attn, model.config.vision_config.num_attention_heads
    source = layer.layer_norm1(before)
    query = attention.q_proj(source[:, :1]).view(size, 1, heads, -1).transpose(1, 2)
    key = attention.k_proj(source).view(size, source.shape[1], heads, -1).transpose(1, 2)
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:]
    return Seen(hidden[:, 1:], model.model.multi_modal_projector(hidden[:, 1:]), hidden[:, 0], weights.mean(1))


class Heads(nn.Module):
    """Parameters of the auxiliary losses on the tower and the projector."""

    sizes = (3, len(labels.COLOURS), len(labels.SHAPES), len(labels.REGIONS), len(labels.CHARS), labels.MAX_GLYPHS)

    def __init__(self, model: Model, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        # Qwen2-VL's tower has only relative positions: the decoder finds the region, see `place`.
        self.skipped = () if family == "llava" else (labels.FIELDS.index("region"),)
        width = model.config.vision_config.hidden_size if family == "llava" else 4 * 128
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))
        self.whole = nn.Linear(width, len(labels.COLOURS) * len(labels.SHAPES) + len(labels.CHARS))
        self.scale = nn.Parameter(torch.tensor(10.0))
        ids = tokenizer.convert_tokens_to_ids
        self.words = {}
        for mark in ("", "Ġ"):
            self.words["colour" + mark] = (1, torch.tensor(ids([mark + word for word in labels.COLOURS])))
            self.words["shape" + mark] = (2, torch.tensor(ids([mark + word for word in labels.SHAPES])))
        self.words["char"] = (4, torch.tensor(ids(list(labels.CHARS))))
        parts = ("top", "bottom", "left", "right", "center")
        self.parts = torch.tensor(ids(list(parts)) + ids(["Ġ" + part for part in parts]))
        self.regions = torch.tensor([[part in region.split() for part in parts] * 2 for region in labels.REGIONS])

    def forward(self, seen: Seen, batch: Batch, table: Tensor) -> dict[str, Tensor]:
        """Return the losses. `table`: embedding table of the decoder."""
        dense = batch["dense"].transpose(1, 2)  # [B, N, fields]
        out: dict[str, Tensor] = {}
        total = seen.tokens.new_zeros(())
        for field, logits in enumerate(self.patch(seen.patches).split(self.sizes, dim=-1)):
            here = dense[..., field] >= 0
            if here.any() and field not in self.skipped:
                total = total + F.cross_entropy(logits[here], dense[..., field][here])
        out["patch"] = total
        tokens, rows = F.normalize(seen.tokens, dim=-1), F.normalize(table, dim=-1)
        total = seen.tokens.new_zeros(())
        for field, words in self.words.values():
            here = dense[..., field] >= 0
            if here.any():
                total = total + F.cross_entropy(self.scale * tokens[here] @ rows[words].T, dense[..., field][here])
        if not self.skipped:
            here = dense[..., 3] >= 0
            total = total + self._regions(tokens[here], rows, dense[..., 3][here])
        out["tie"] = total
        if seen.summary is not None and seen.summary_attention is not None:
            out["cls"] = 5 * F.binary_cross_entropy_with_logits(self.whole(seen.summary), batch["whole"])
            on_items = (seen.summary_attention * (batch["dense"][:, 0] != 0)).sum(-1)
            out["cls_look"] = -(on_items + 1e-6).log().mean()
        return out

    def _regions(self, tokens: Tensor, rows: Tensor, regions: Tensor) -> Tensor:
        logits = self.scale * (tokens @ rows[self.parts].T - 0.15)
        return F.binary_cross_entropy_with_logits(logits, self.regions[regions].float())

    def place(self, early: Tensor, batch: Batch, table: Tensor) -> Tensor:
        """Loss that ties visual tokens after the first decoder layer, [B, K, D], to the words for their region."""
        grid, keep = batch["grid"], batch["keep"]
        middle = torch.stack((keep // grid[1] + 0.5, keep % grid[1] + 0.5)) / grid[:, None, None]
        third = (middle * 3).long().clamp(max=2)
        regions = (3 * third[0] + third[1])[batch["kept"]]
        tokens, rows = F.normalize(early[batch["kept"]], dim=-1), F.normalize(table, dim=-1)
        return self._regions(tokens, rows, regions)
