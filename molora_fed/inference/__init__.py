"""Using a model: open, read and write as a causal language model, evaluate texts."""
