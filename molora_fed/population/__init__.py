"""Populations of low-rank adapters: mixed inside the layers, measured, and evolved."""
