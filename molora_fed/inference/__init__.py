"""Using a fused or evolved model: open, generate, evaluate texts."""
