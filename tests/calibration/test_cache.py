"""The statistics cache: exact, checked, bounded."""

import os
import time
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modegpt.calibration.cache import StatisticsCache
from modegpt.files import STALE_SECONDS
from tests.processes import CLEAN, ended_well

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


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def of_another_shape(path: Path) -> None:
    """The same bytes and checksum under another shape."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"value": load_file(path)["value"].reshape(4, 16)}, path, metadata=metadata)


def of_another_layer(path: Path) -> None:
    path.write_bytes(path.with_name("layer001.mlp.C.safetensors").read_bytes())


def of_another_key(path: Path) -> None:
    other = cache_at(path.parents[2], "b")
    other.store(0, {"mlp.C": STATISTICS["mlp.C"] + 1})
    path.write_bytes((other.directory / path.name).read_bytes())


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_a_header_of_any_length_is_refused_before_the_file_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_at(tmp_path)
    cache.store(0, STATISTICS)
    path = cache.directory / "layer000.mlp.C.safetensors"
    path.write_bytes((20 * 2**30).to_bytes(8, "little"))
    os.truncate(path, 8 + 20 * 2**30)
    monkeypatch.setattr("modegpt.cache.safe_open", lambda *_, **__: pytest.fail("20 GiB are mapped"))
    with pytest.warns(UserWarning, match="damaged .its header would have 21474836480 bytes"):
        assert cache.load(0, frozenset({"mlp.C"})) == {}


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        flipped,
        without_metadata,
        of_another_shape,
        of_another_layer,
        of_another_key,
        a_folder,
        a_pipe,
    ],
)
def test_what_is_damaged_or_in_anothers_place_is_warned_of_once_and_not_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache = cache_at(tmp_path)
    cache.store(0, STATISTICS)
    cache.store(1, {"mlp.C": STATISTICS["mlp.C"] + 1})
    damage(cache.directory / "layer000.mlp.C.safetensors")
    with pytest.warns(UserWarning, match=r"layer000.mlp.C.safetensors is damaged") as warned:
        assert cache.load(0, NAMES).keys() == {"layer.influence"}
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    cache.store(0, STATISTICS)
    assert torch.equal(cache.load(0, NAMES)["mlp.C"], STATISTICS["mlp.C"])


def test_a_cache_of_another_format_is_left_alone_until_its_room_is_needed(tmp_path: Path) -> None:
    """A folder that is named by the key alone was written by a version whose checksums bind no identity."""
    cache = cache_at(tmp_path)
    cache.store(0, STATISTICS)
    former = cache.directory.rename(cache.directory.with_name("a"))
    os.utime(former, (1000, 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(0, NAMES) == {}
        cache.store(0, STATISTICS)
        size = sum(file.stat().st_size for file in cache.directory.iterdir())
        cache_at(tmp_path, "new", max_bytes=5 * size // 2).store(0, STATISTICS)
    assert not former.exists() and cache.directory.exists()


def test_the_bound_evicts_the_least_recently_used_other_calibration(tmp_path: Path) -> None:
    for age, key in enumerate(("old", "older")):
        cache = cache_at(tmp_path, key)
        cache.store(0, {"mlp.C": STATISTICS["mlp.C"]})
        os.utime(cache.directory, (1000 - age, 1000 - age))
    size = sum(file.stat().st_size for file in cache.directory.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_at(tmp_path, "new", max_bytes=5 * size // 2).store(0, {"mlp.C": STATISTICS["mlp.C"]})
    assert sorted(folder.name for folder in (tmp_path / "objects").iterdir()) == ["new-2", "old-2"]


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
def test_processes_share_the_cache(tmp_path: Path, own_key: bool) -> None:
    barrier, num_rounds = CLEAN.Barrier(3), 25
    max_bytes = 2000 if own_key else 10**6
    ended_well(
        [
            CLEAN.Process(target=share, args=(barrier, tmp_path, f"k{number * own_key}", max_bytes, num_rounds))
            for number in range(3)
        ]
    )
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
