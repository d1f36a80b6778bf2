"""What every folder of the engine may use: errors, messages, grids, config sections, finding methods. No torch."""
