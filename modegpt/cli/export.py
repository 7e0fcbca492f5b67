"""``modegpt-export``: write a compressed checkpoint in the form that an engine runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from modegpt.errors import UserError, exit_status, shortened
from modegpt.escaping import markdown
from modegpt.models.checkpoints import check_destination, load_model, load_tokenizer, publish, quiet, saving
from modegpt.models.deci import DeciCheckpoint
from modegpt.models.export import ExportReport, paged_model, stock_model
from modegpt.models.families import family_of
from modegpt.models.gguf import SUFFIX
from modegpt.models.gguf_file import TYPES, write_gguf
from modegpt.models.integrity import check_files
from modegpt.models.quantised import BITS, described, quantised

README = """# {name}, exported

{about}

{report}
"""
STOCK = """The function of a model compressed by MoDeGPT in the form of its family ({model_type}), so that any engine
for that family runs it."""
VLLM = """A model compressed by MoDeGPT, every size kept, with a page size for each layer's cache ({pages}):
`vllm serve PATH --trust-remote-code{eager}`."""
DECI = """The function of a model compressed by MoDeGPT, with an MLP width for each layer, as DeciLM (nemotron-nas):
`vllm serve PATH --trust-remote-code`, which is for the configuration alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export one checkpoint; returns the exit status: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="modegpt-export", description=__doc__.partition(": ")[2])
    parser.add_argument("checkpoint", help="a compressed model's directory")
    parser.add_argument(
        "destination",
        type=Path,
        nargs="?",
        help="where the export goes; a name that ends in .gguf is a file for llama.cpp; none: see --push",
    )
    parser.add_argument(
        "--engine",
        choices=("stock", "vllm", "deci"),
        default="stock",
        help="stock: the family's own model, for any engine (default); vllm: every size kept, with this package's "
        "code; deci: an MLP width for each layer, for engines with a DeciLM class",
    )
    parser.add_argument("--pages", choices=("gpu", "cpu"), default="gpu", help="vllm: where it will run (default: gpu)")
    parser.add_argument(
        "--type",
        choices=tuple(TYPES),
        default="f16",
        dest="kind",
        help="of weights in a GGUF file (default: f16)",
    )
    parser.add_argument(
        "--quantization",
        choices=("none", *BITS),
        default="none",
        help="of weights in a checkpoint, in the form of compressed-tensors; int8 rounds states too (default: none)",
    )
    parser.add_argument(
        "--width-multiple",
        type=int,
        metavar="N",
        help="all but vllm: round MLP widths up to a multiple of this (default: 1, or what the type wants)",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="put the export on the hub, or without a destination the checkpoint itself"
    )
    parser.add_argument("--force", action="store_true", help="write it though zeros make it no smaller than dense")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(**vars(arguments)), program="modegpt-export")


def _run(checkpoint: str, destination: Path | None, push: str | None, **options: Any) -> None:
    if destination is None and push is None:
        raise UserError("name a destination, or --push OWNER/NAME to put the checkpoint itself on the hub")
    if destination is not None:
        export(checkpoint, destination, **options)
    if push is not None:
        put_on_hub(Path(checkpoint) if destination is None else destination, push)


def export(
    checkpoint: str,
    destination: Path,
    *,
    engine: str = "stock",
    pages: str = "gpu",
    kind: str = "f16",
    quantization: str = "none",
    width_multiple: int | None = None,
    force: bool = False,
) -> None:
    """Load ``checkpoint``, check it, say what its form for ``engine`` costs, and write that to ``destination``.

    It is written whole or not at all. Raises UserError as ``load_model``, ``stock_model``, ``paged_model``,
    ``write_gguf`` and ``check_destination`` do, and where zeros make it no smaller than the dense model, unless
    ``force``.
    """

    def accept(report: ExportReport) -> None:
        print(report)
        if report.gains_nothing and not force:
            raise UserError(f"{destination} would be no smaller than the dense model; --force writes it all the same")

    if width_multiple is not None and width_multiple < 1:
        raise UserError(f"--width-multiple must be at least 1, got {width_multiple}")
    if destination.suffix == SUFFIX:
        if quantization != "none":
            raise UserError("--quantization is for checkpoints; how weights are stored in a GGUF file is --type")
        if destination.exists():
            raise UserError(f"{destination} is there already; name a new file or remove it")
        destination.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
        write_gguf(model, tokenizer, destination, kind=kind, width_multiple=width_multiple, accept=accept)
    else:
        _export_checkpoint(checkpoint, destination, engine, pages, quantization, width_multiple or 1, accept)
    print(f"written: {destination}")


def _export_checkpoint(
    checkpoint: str,
    destination: Path,
    engine: str,
    pages: str,
    quantization: str,
    width_multiple: int,
    accept: Callable[[ExportReport], object],
) -> None:
    check_destination(destination)
    compressed = load_model(checkpoint, device="cpu")
    layers, tensors = family_of(compressed.config).layers, None
    model: Any
    if engine == "vllm":
        model, report = paged_model(compressed, pages=pages)
        experts = family_of(compressed.config).experts_path is not None  # how many tokens each sees is not compiled
        about = VLLM.format(pages=pages, eager=" --enforce-eager" if experts else "")
    elif engine == "deci":
        model = DeciCheckpoint(compressed, width_multiple=width_multiple)
        report, about = model.report, DECI
    else:
        model, report = stock_model(compressed, width_multiple=width_multiple)
        about = STOCK.format(model_type=model.config.model_type)
    if quantization != "none":
        tensors = quantised(model.state_dict(), quantization, layers=layers)
        model.config.quantization_config = described(quantization)
        report = report.with_tensors(tensors, tied=model.config.tie_word_embeddings)
    accept(report)
    with saving(destination) as partial:
        with quiet():
            model.save_pretrained(partial, state_dict=tensors)
            load_tokenizer(checkpoint).save_pretrained(partial)
        readme = README.format(name=markdown(Path(checkpoint).name), about=about, report=report)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        publish(partial, destination)


def put_on_hub(path: Path, name: str) -> None:
    """Put the checkpoint or GGUF file at ``path`` in the hub's repository ``name``, which is made if it is not there.

    A checkpoint goes with the card that lies in it. Raises UserError for a damaged checkpoint, and for what the hub
    refuses.
    """
    if path.is_dir():
        check_files(path)
    elif not path.is_file():
        raise UserError(f"no checkpoint and no file at {path}")
    try:
        hub = huggingface_hub.HfApi()
        address = hub.create_repo(name, exist_ok=True)
        if path.is_dir():
            hub.upload_folder(repo_id=name, folder_path=path)
        else:
            hub.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot put {path} on the hub as {name}: {shortened(str(error))}") from None
    print(f"on the hub: {address}")


if __name__ == "__main__":
    sys.exit(main())
