"""What a vision tower gives and what it can be asked for: signals, inputs of reducers, token transforms, cuts.

Other folders import these names from here."""

from foveate.engine.vision.inputs import LayerCut, RowCut, TowerCut, VisualInputs
from foveate.engine.vision.signals import (
    CAPTION,
    CELLS,
    ENC,
    OF_REQUEST,
    PIXELS,
    QUESTION,
    Kind,
    LayerRef,
    Signal,
    Tower,
    cls_cat,
    hidden,
    keys,
    recv,
    saliency,
    values,
)
from foveate.engine.vision.transform import Space, TokenTransform, concatenate, starts

__all__ = [
    "CAPTION",
    "CELLS",
    "ENC",
    "Kind",
    "LayerCut",
    "LayerRef",
    "OF_REQUEST",
    "PIXELS",
    "QUESTION",
    "RowCut",
    "Signal",
    "Space",
    "TokenTransform",
    "Tower",
    "TowerCut",
    "VisualInputs",
    "cls_cat",
    "concatenate",
    "hidden",
    "keys",
    "recv",
    "saliency",
    "starts",
    "values",
]
