"""Forecasts of the fusion gain, with intervals, recorded before the outcome."""
