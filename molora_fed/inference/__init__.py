"""Using a fused or evolved model: open, read and write as a causal language model, evaluate texts."""
