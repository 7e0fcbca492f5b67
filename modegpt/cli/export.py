"""``modegpt-export``: write a compressed checkpoint as its family's own, for engines that do not know this package."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from modegpt.errors import UserError, exit_status
from modegpt.escaping import markdown
from modegpt.models.checkpoints import check_destination, load_model, load_tokenizer, publish, quiet, saving
from modegpt.models.export import stock_model

README = """# {name}, exported

The function of a model compressed by MoDeGPT in the form of its family ({model_type}), so that any engine for
that family runs it.

{report}
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
    parser.add_argument("--force", action="store_true", help="write it though zeros make it no smaller than dense")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: export(**vars(arguments)), program="modegpt-export")


def export(checkpoint: str, destination: Path, *, width_multiple: int = 1, force: bool = False) -> None:
    """Load ``checkpoint``, check it, say what its stock form costs, and write that to ``destination``, whole or not.

    Raises UserError as ``load_model``, ``stock_model`` and ``check_destination`` do, and where zeros make the stock
    form no smaller than the dense model, unless ``force``.
    """
    if width_multiple < 1:
        raise UserError(f"--width-multiple must be at least 1, got {width_multiple}")
    check_destination(destination)
    model, report = stock_model(load_model(checkpoint, device="cpu"), width_multiple=width_multiple)
    print(report)
    if report.gains_nothing and not force:
        raise UserError(f"{destination} would be no smaller than the dense model; --force writes it all the same")
    with saving(destination) as partial:
        with quiet():
            model.save_pretrained(partial)
            load_tokenizer(checkpoint).save_pretrained(partial)
        readme = README.format(name=markdown(Path(checkpoint).name), model_type=model.config.model_type, report=report)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        publish(partial, destination)
    print(f"written: {destination}")


if __name__ == "__main__":
    sys.exit(main())
