"""A mock model for the tests of the engine: bytes in, bytes out, random weights, all mechanisms of a real one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.configs.config import CacheConfig, Config, SchedulerConfig, VisionConfig
from foveate.engine.common import Grid, Image, Signal, Tower
from foveate.engine.engine import Engine, Event
from foveate.engine.geometry.base import Geometry, ModelSpec, Positions
from foveate.engine.models.base import Attention, Model, Rotary
from foveate.engine.vision import VisualInputs

IMAGE_ID, EOS_ID, CELL = 256, 257, 4
TOWER = Tower(has_cls=False, depth=2)
EVERYTHING = [Signal(kind, layer) for kind in ("recv", "keys", "hidden") for layer in (0, 1)]
NAN_PIXEL = 251  # a picture that starts with it has features that are not finite
RAISING_PIXEL = 252  # and one that starts with this makes the tower raise


class MockGeometry(Geometry):
    """Cells of 4 x 4 pixels; M-RoPE positions."""

    spec = ModelSpec(
        family="mock", n_layers=2, n_heads=8, n_kv_heads=4, head_dim=128, hidden_size=32, vocab_size=260,
        max_context=400, image_token_id=IMAGE_ID, eos_ids=(EOS_ID,), n_pos_axes=3,
        tower=TOWER,
    )  # fmt: skip

    def grid(self, height: int, width: int, original: tuple[int, int] | None = None) -> Grid:
        return Grid(height // CELL, width // CELL)

    def n_patches(self, height: int, width: int) -> int:
        return self.grid(height, width).n_tokens

    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Positions], int]:
        positions: list[Positions] = []
        at = 0
        for segment in segments:
            if isinstance(segment, Grid):
                places = [divmod(i, segment.cols) for i in range(segment.n_tokens)]
                positions.append(([at for _ in places], [at + y for y, _ in places], [at + x for _, x in places]))
                at += max(segment.rows, segment.cols)
            else:
                positions.append((range(at, at + segment),) * 3)
                at += segment
        return positions, at


class MockModel(Model):
    """Two attention layers over random embeddings plus a sine of the position; cells of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.geometry = MockGeometry()
        self.dtype, self.weights, self.n_parameters = torch.float32, "fp32", 0
        random = torch.Generator().manual_seed(7)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random) / shape[0] ** 0.5, requires_grad=False)

        self.table, self.head, self.pixels = weight(260, 32), weight(32, 260), weight(48, 32)
        self.q = nn.ParameterList([weight(32, 1024) for _ in range(2)])
        self.kv = nn.ParameterList([weight(32, 1024) for _ in range(2)])
        self.out = nn.ParameterList([weight(1024, 32) for _ in range(2)])
        self.n_forwards, self.n_rows, self.raise_on_token = 0, 0, -1
        self.encoded: list[int] = []  # pictures per call of the tower

    def encode(
        self,
        images: Sequence[Tensor],
        signals: frozenset[Signal],
        originals: Sequence[tuple[int, int] | None] | None = None,
    ) -> list[VisualInputs]:
        if any(int(image[0, 0, 0]) == RAISING_PIXEL for image in images):
            raise RuntimeError("the tower broke")
        self.encoded.append(len(images))
        return [self._encode(image) for image in images]

    def _encode(self, image: Tensor) -> VisualInputs:
        grid = self.geometry.grid(image.shape[0], image.shape[1])
        cells = image.float().div(128).sub(1).view(grid.rows, CELL, grid.cols, CELL, 3).transpose(1, 2)
        rows = cells.reshape(grid.n_tokens, -1) @ self.pixels
        if int(image[0, 0, 0]) == NAN_PIXEL:
            rows = rows * torch.nan
        taps = {signal: rows.norm(dim=-1) if signal.kind == "recv" else rows for signal in EVERYTHING}
        return VisualInputs(grid=grid, proj=rows, tower=TOWER, taps=taps)

    def embed(self, token_ids: Tensor) -> Tensor:
        if self.raise_on_token in token_ids.tolist():
            raise RuntimeError("the forward broke")
        return self.table[token_ids]

    def rotary(self, positions: Tensor) -> Rotary:
        phase = (positions[:, :, None] * torch.tensor([1.0, 0.3, 0.05, 0.01])).permute(1, 0, 2)
        return Rotary(phase.reshape(positions.shape[1], -1).cos(), phase.reshape(positions.shape[1], -1).sin())

    def run(
        self, rows: Tensor, rotary: Rotary, attention: Attention, layers: range, wanted: Tensor | None = None
    ) -> Tensor:
        if layers.start == 0:
            self.n_forwards += 1
            self.n_rows += len(rows)
            rows = rows + nn.functional.pad(torch.cat([rotary.sin, rotary.cos], dim=1), (0, 8))
        for i in layers:
            kv = (rows @ self.kv[i]).view(-1, 2, 4, 128)
            q, k = self.project(i, rows, rotary)
            if wanted is not None:
                q, rows = q[wanted], rows[wanted]
            y = attention.attend(i, q, k, kv[:, 1])
            rows = rows + torch.tanh(y.reshape(-1, 1024) @ self.out[i] * 3)
        return rows

    def project(self, layer: int, rows: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        n = rows.shape[0]
        return (rows @ self.q[layer]).view(n, 8, 128) * 2, (rows @ self.kv[layer]).view(n, 2, 4, 128)[:, 0]

    def logits(self, rows: Tensor) -> Tensor:
        return (rows @ self.head).float()


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def model() -> MockModel:
    return MockModel()


@pytest.fixture
def make_engine(model: MockModel) -> Iterator[Callable[..., Engine]]:
    """Engines on the mock model; every one is drained and counted when the test ends.

    A block of 4 tokens takes 32 KiB, so a pool of 1 MiB holds 128 tokens and the default one 1024.
    """
    engines: list[Engine] = []

    def make(cache: dict[str, Any] | None = None, **scheduler: int) -> Engine:
        config = Config(
            cache=replace(CacheConfig(memory_mb=8, block_tokens=4), **(cache or {})),
            scheduler=replace(SchedulerConfig(), **scheduler),
            vision=VisionConfig(feature_cache_mb=1),
        )
        engine = Engine(model, config)
        for pages in engine._kv.pages:  # a slot that is read before it is written shows
            pages.fill_(torch.nan)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.check()
        finish(engine)
        beat = engine.heartbeat()
        assert beat.free_blocks + beat.cached_blocks == beat.total_blocks and beat.used_blocks == 0
        assert beat.running == beat.waiting == 0


def finish(engine: Engine, limit: int = 5000) -> list[Event]:
    """Step until idle, checking every invariant on the way."""
    events: list[Event] = []
    for _ in range(limit):
        if not engine.has_work:
            return events
        events += engine.step()
        engine.check()
    raise AssertionError(f"still busy after {limit} steps")


@pytest.fixture
def run() -> Callable[[Engine], list[Event]]:
    return finish


@pytest.fixture
def picture() -> Callable[..., Image]:
    """Pictures by seed, of rows x cols visual tokens; `first` sets the first pixel."""

    def make(seed: int, rows: int = 4, cols: int = 4, *, first: int = 0) -> Image:
        random = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 250, (rows * CELL, cols * CELL, 3), generator=random, dtype=torch.uint8)
        pixels[0, 0, 0] = first
        digest = torch.randint(0, 256, (32,), generator=random, dtype=torch.uint8).numpy().tobytes()
        return Image(pixels=pixels.numpy().tobytes(), height=rows * CELL, width=cols * CELL, digest=digest)

    return make
