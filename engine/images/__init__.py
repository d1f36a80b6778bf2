"""From a picture to prepared pixels: sizes, tiles, resizing. The server uses this folder too, so no torch."""
