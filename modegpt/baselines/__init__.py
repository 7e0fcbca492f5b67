"""Compression methods to compare with, each written from its paper behind the one protocol of ``modegpt.compression.task``."""
