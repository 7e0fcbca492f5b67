"""MoDeGPT with sequential, error-correcting calibration, output-aware selection and an allocation that measures the loss."""
