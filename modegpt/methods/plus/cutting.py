"""Cutting a saved checkpoint with nested ranks: slices and one triangular solve a module, no text, no activations."""

from pathlib import Path
from typing import Any

import torch

from modegpt.calibration.calibration import Calibration
from modegpt.data.tokens import CalibrationTokens
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.nested import FILE, read_orders
from modegpt.models import block_linear_parameters
from modegpt.models.checkpoints import check_destination, load_model, load_tokenizer, save_checkpoint
from modegpt.progress import Progress

NO_MATTER = {"query_key", "centred", "bias", "fisher"}
"""Options that decide no cut, and of which older checkpoints hold some that are no more."""


def cut_checkpoint(checkpoint: Path, sparsity: float, destination: Path) -> float:
    """Write the model of ``checkpoint`` at ``sparsity`` to ``destination``; returns the share of block-linear weights
    removed.

    Raises UserError for a checkpoint without orders, a rate out of range, or a destination that cannot be written.
    """
    if not (checkpoint / FILE).is_file():
        raise UserError(
            f"{checkpoint} has no {FILE}: save one with "
            "method=modegpt_plus method.nested=true compression.sparsity=0 output.save_model=DIR"
        )
    check_destination(destination)
    model = load_model(str(checkpoint), device="cpu")
    layers, costs, options = read_orders(checkpoint / FILE)
    options = {"temperature": False} | options  # older checkpoints do not name it
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name not in NO_MATTER
    }
    method = MoDeGPTPlus(**fields)
    no_tokens = CalibrationTokens(ids=torch.empty(0, 0, dtype=torch.long), sha256="", stream_tokens=0)
    task = CompressionTask(Calibration(model, no_tokens, progress=Progress(quiet=True)), sparsity)
    compressed: Compressed = method.cut(task, method.plan(task, costs=costs), layers)
    save_checkpoint(compressed.model, load_tokenizer(str(checkpoint)), destination, {})
    return 1 - block_linear_parameters(compressed.model) / block_linear_parameters(model)
