"""``modegpt-export``: write a compressed checkpoint as its family's own, for engines that do not know this package."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from modegpt.errors import UserError, exit_status
from modegpt.models.checkpoints import check_destination, load_model, load_tokenizer, publish, quiet
from modegpt.models.export import ExportReport, stock_model

README = """# {name}, exported

The function of a model compressed by MoDeGPT in the form of its family ({model_type}), so that any engine for
that family runs it. {report}. Layers narrower than the widest, and heads smaller than the dense ones, are filled up
with zeros.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Export one checkpoint; returns the exit status: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="modegpt-export", description=__doc__.partition(": ")[2])
    parser.add_argument("checkpoint", help="a compressed model's directory")
    parser.add_argument("destination", type=Path, help="where the stock checkpoint goes")
    parser.add_argument(
        "--width-multiple",
        type=int,
        default=1,
        metavar="N",
        help="round the MLP width up to a multiple of this (default: 1)",
    )
    arguments = parser.parse_args(argv)

    def run() -> None:
        report = export(arguments.checkpoint, arguments.destination, width_multiple=arguments.width_multiple)
        print(f"{report}: {arguments.destination}")

    return exit_status(run, program="modegpt-export")


def export(checkpoint: str, destination: Path, *, width_multiple: int) -> ExportReport:
    """Load ``checkpoint``, check it, and write its stock form to ``destination``, whole or not at all.

    Raises UserError as ``load_model``, ``stock_model`` and ``check_destination`` do.
    """
    if width_multiple < 1:
        raise UserError(f"--width-multiple must be at least 1, got {width_multiple}")
    check_destination(destination)
    model, report = stock_model(load_model(checkpoint, device="cpu"), width_multiple=width_multiple)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        with quiet():
            model.save_pretrained(partial)
            load_tokenizer(checkpoint).save_pretrained(partial)
        readme = README.format(name=Path(checkpoint).name, model_type=model.config.model_type, report=report)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        publish(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
