"""The statistics cache: exact, checked, bounded."""

import os
import time
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from modegpt.calibration.cache import StatisticsCache
from modegpt.files import STALE_SECONDS
from tests.processes import CLEAN

STATISTICS = {
    "mlp.C": torch.eye(8, dtype=torch.float64) * 3,
    "layer.influence": torch.tensor(0.25, dtype=torch.float64),
}
NAMES = frozenset(STATISTICS)


def cache_at(root: Path, key: str = "a", max_bytes: int = 10**6) -> StatisticsCache:
    return StatisticsCache(root=root, key=key, max_bytes=max_bytes)


def test_stored_statistics_come_back_bit_identical(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    assert cache.load(0, NAMES) == {}
    cache.store(0, STATISTICS)
    loaded = cache.load(0, NAMES | {"mlp.mean"})
    assert loaded.keys() == NAMES
    assert all(torch.equal(loaded[name], STATISTICS[name]) for name in NAMES)
    assert cache.load(1, NAMES) == {}


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_file_is_warned_of_and_not_used(tmp_path: Path, damage: str) -> None:
    cache = cache_at(tmp_path)
    cache.store(0, STATISTICS)
    path = cache.directory / "layer000.mlp.C.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-9]
    else:
        content[-3] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load(0, NAMES).keys() == {"layer.influence"}
    cache.store(0, STATISTICS)
    assert cache.load(0, NAMES).keys() == NAMES


def test_the_bound_evicts_the_least_recently_used_other_calibration(tmp_path: Path) -> None:
    for age, key in enumerate(("old", "older")):
        cache = cache_at(tmp_path, key)
        cache.store(0, {"mlp.C": STATISTICS["mlp.C"]})
        os.utime(cache.directory, (1000 - age, 1000 - age))
    size = sum(file.stat().st_size for file in cache.directory.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_at(tmp_path, "new", max_bytes=5 * size // 2).store(0, {"mlp.C": STATISTICS["mlp.C"]})
    assert sorted(folder.name for folder in (tmp_path / "objects").iterdir()) == ["new", "old"]


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    cache = cache_at(tmp_path, max_bytes=100)
    cache.store(0, STATISTICS)
    assert "mlp.C" not in cache.load(0, NAMES)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 100


def share(barrier: Barrier, root: Path, key: str, max_bytes: int, num_rounds: int) -> None:
    """A worker: whatever it finds is right, whatever it misses it computes and keeps, and nothing makes it fail."""
    cache = cache_at(root, key, max_bytes)
    barrier.wait()
    for index in range(num_rounds):
        missing = NAMES - cache.load(index, NAMES).keys()
        cache.store(index, {name: STATISTICS[name] + index for name in missing})
        for name, value in cache.load(index, NAMES).items():
            assert torch.equal(value, STATISTICS[name] + index)


@pytest.mark.parametrize("own_key", [False, True], ids=["one calibration", "each evicts the others"])
def test_eight_processes_share_the_cache(tmp_path: Path, own_key: bool) -> None:
    barrier, num_rounds = CLEAN.Barrier(8), 15
    max_bytes = 5000 if own_key else 10**6
    workers = [
        CLEAN.Process(target=share, args=(barrier, tmp_path, f"k{number * own_key}", max_bytes, num_rounds))
        for number in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert all(name.startswith("layer") for name in files)
    if not own_key:
        assert len(files) == num_rounds * len(NAMES)


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.store(0, STATISTICS)
    young, old = tmp_path / "partial" / "young", tmp_path / "partial" / "old"
    for left in (young, old):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    cache.store(1, STATISTICS)
    assert young.exists() and not old.exists()
