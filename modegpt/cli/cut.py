"""``modegpt-cut``: cut a checkpoint with nested ranks to any rate, without calibration."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from modegpt.errors import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="modegpt-cut", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "checkpoint", type=Path, help="saved by method=modegpt_plus method.nested=true compression.sparsity=0"
    )
    parser.add_argument("sparsity", type=float, help="share of the block-linear weights to remove, in [0, 1)")
    parser.add_argument("destination", type=Path, help="directory for the smaller checkpoint")
    arguments = parser.parse_args(argv)
    # here and not above: --help should not wait for PyTorch
    from modegpt.allocation.ranks import missed_target
    from modegpt.methods.plus.cutting import cut_checkpoint

    def cut() -> None:
        achieved = cut_checkpoint(arguments.checkpoint, arguments.sparsity, arguments.destination)
        print(f"{arguments.destination}: {100 * achieved:.2f} % of the block-linear weights removed")
        if missed := missed_target(achieved, arguments.sparsity):
            print(f"warning: {missed}")

    return exit_status(cut, program="modegpt-cut")
