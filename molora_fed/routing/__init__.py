"""Gate maths, fitting on a bank, the fused model and decoding."""
