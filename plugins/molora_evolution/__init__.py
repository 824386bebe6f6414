"""Evolutionary mixture of LoRA (arXiv 2605.11153) on molora-fed's public hooks."""
