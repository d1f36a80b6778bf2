"""What one picture loses before and inside its vision tower, as the tower carries it out."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal
from foveate.engine.vision.transform import TokenTransform


class RowCut(Protocol):
    """A method that cuts the tower's rows; `EncoderCut` of engine/reduce/cut.py documents each function."""

    @abstractmethod
    def signals_at(self, layer: int) -> frozenset[Signal]: ...

    @abstractmethod
    def is_weighing(self) -> bool: ...

    @abstractmethod
    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform: ...

    @abstractmethod
    def spread(self, rows: Tensor, reduced: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerCut:
    """After one layer: rows are mixed into fewer, or all come back."""

    layer: int
    method: RowCut
    n_rows: int
    comes_back: bool  # afterwards there are n_rows again, as before the method began
    will_come_back: bool


@dataclass(frozen=True, slots=True)
class TowerCut:
    """What one picture loses before and inside the tower; known before it is encoded."""

    cells: Tensor | None  # [n] int64, increasing: those the tower reads; None: all
    layers: tuple[LayerCut, ...]  # ascending
    signals: frozenset[Signal]  # read on the way, resolved

    @property
    def key(self) -> bytes:
        """What the tower's rows depend on beside the picture."""
        cells = b"all" if self.cells is None else self.cells.numpy().tobytes()
        return repr([(c.layer, c.method, c.n_rows, c.will_come_back) for c in self.layers]).encode() + cells
