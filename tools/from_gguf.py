"""Make a checkpoint that ``model=local`` reads of a GGUF file: ``python tools/from_gguf.py FILE FOLDER``.

The weights are what the file's quantised blocks stand for, in float32. Needs the package gguf, which the extra ``dev``
brings.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modegpt.errors import UserError, exit_status


def dequantise(file: Path, folder: Path) -> None:
    """Write ``folder``: configuration, weights and tokenizer of the GGUF ``file``.

    Raises:
        UserError: the file or the package gguf is missing, or the folder is there already.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; give a .gguf file")
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    if find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the package gguf: pip install gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del loaded.config.quantization_config  # of the file, not of these weights
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {type(model).__name__}")


def main() -> int:
    """Convert; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    return exit_status(lambda: dequantise(arguments.file, arguments.folder))


if __name__ == "__main__":
    sys.exit(main())
