"""Text becomes tokens here: sources, calibration windows, the embedded world."""
