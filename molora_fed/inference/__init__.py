"""Using a fused or evolved model: open, read, write as a causal language model, evaluate texts."""
