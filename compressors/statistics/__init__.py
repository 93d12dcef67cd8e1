"""Measure what a model computes on calibration text: activations, second moments, residual streams, predictions."""
