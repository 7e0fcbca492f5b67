"""MoDeGPT with sequential calibration that corrects errors, better selections and a measured allocation."""
