"""Ways to share one budget among several images, or among the tiles of one (`vlm.visual.split`): one way, one file."""
