"""Observing a dense model on calibration tokens: layer by layer, as sums, once for a whole sweep."""
