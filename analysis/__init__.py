"""From records to the paper's tables and figures: ``python -m analysis``. Reads records, and nothing else of a run."""
