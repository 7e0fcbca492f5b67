"""Scores of a model: perplexity, zero-shot accuracy and speed, the same way for dense and compressed models."""
