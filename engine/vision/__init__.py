"""What a vision tower gives: the inputs of reducers, token transforms, and cuts inside the tower.

Other folders import these names from here."""

from foveate.engine.vision.inputs import LayerCut, RowCut, TowerCut, VisualInputs
from foveate.engine.vision.transform import Space, TokenTransform, concatenate, starts

__all__ = [
    "LayerCut",
    "RowCut",
    "Space",
    "TokenTransform",
    "TowerCut",
    "VisualInputs",
    "concatenate",
    "starts",
]
