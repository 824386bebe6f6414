"""Fused models, evolved ones and specialists in the forms that other programs load."""
