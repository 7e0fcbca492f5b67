"""What a run will write beside its record, from shapes alone, and whether the disk has room for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.statistics import STATISTICS, sizes_of
from modegpt.models import block_linear_parameters
from modegpt.prepare import Run

FLOAT64 = 8


def space_warnings(run: Run) -> Iterator[str]:
    """A line for what will not be kept: statistics beyond the cache's limit or its disk, a checkpoint beyond its."""
    if run.method is None or run.task is None:
        return
    if (cache := run.task.calibration.cache) is not None:
        yield from _of_statistics(run, cache)
    if (directory := run.target.directory) is not None and not directory.exists():
        model = run.backend.model
        kept = model.num_parameters() - run.task.sparsity * block_linear_parameters(model)
        needed, free = round(kept * model.dtype.itemsize), free_bytes(directory)
        if needed > free:
            then = (
                "the run will stop where it is full, and go on from there when there is room"
                if run.config.out_of_core.enabled
                else "as it is, only the record will be kept"
            )
            yield f"the checkpoint will take about {gb(needed)}, and {directory.parent} has {gb(free)} free: {then}"


def _of_statistics(run: Run, cache: StatisticsCache) -> Iterator[str]:
    assert run.method is not None and run.task is not None
    sizes, num_layers = sizes_of(run.backend.model.config), run.task.calibration.num_layers
    names = run.method.required_statistics(run.task.family)
    of_layer = FLOAT64 * sum(STATISTICS[name].num_elements(sizes) for name in names)
    needed, stored = num_layers * of_layer, bytes_in(cache.directory)
    for limit, where in (
        (cache.max_bytes, f"cache.max_bytes is {gb(cache.max_bytes)}"),
        (free_bytes(cache.root) + stored, f"{cache.root} has {gb(free_bytes(cache.root))} free"),
    ):
        if needed > limit:
            lost = num_layers - limit // of_layer
            yield (
                f"the statistics of this calibration take {gb(needed)}, and {where}: those of {lost} of {num_layers} "
                "layers will not be kept for other runs"
            )


def free_bytes(path: Path) -> int:
    """Free space where ``path`` is or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def bytes_in(folder: Path) -> int:
    """The size of the files in ``folder``, 0 without one."""
    return sum(path.stat().st_size for path in folder.glob("*"))


def gb(num_bytes: int) -> str:
    """In GB, as ``cache.max_bytes`` counts."""
    return f"{num_bytes / 1e9:.1f} GB"
