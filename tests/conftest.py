"""What every test shares: one thread, no network, and the optional folder of real models and data."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, which tests of Ctrl-C inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real models and data: ``MODEGPT_SHARED``, or ``shared`` beside the checkout. Skips without it."""
    directory = Path(os.environ.get("MODEGPT_SHARED", REPOSITORY.parent / "shared"))
    if not directory.is_dir():
        pytest.skip(f"real models and data are not here: {directory} (set MODEGPT_SHARED)")
    return directory


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for the records of a run, beside a cache of its own."""
    monkeypatch.setenv("MODEGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Every test starts from the same global random state, and leaves one thread to the next."""
    torch.manual_seed(0)
    yield
    assert torch.get_num_threads() == 1, "the test changed the number of threads of this process"
