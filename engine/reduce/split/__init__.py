"""How one budget is shared among several images, or among the tiles of one: one way, one file (`vlm.visual.split`)."""
