"""Statistics on disk, so that one calibration serves a sweep."""

import torch

from modegpt.cache import Cache
from modegpt.calibration.statistics import Statistics


class StatisticsCache(Cache):
    """The statistics of one calibration, each layer's under a name of its own.

    The key names weights, tokens, dtype, device, precision and batch size.
    """

    def load(self, index: int, names: frozenset[str], *, device: torch.device | str = "cpu") -> Statistics:
        """The statistics ``names`` of layer ``index``, without those that are missing or damaged."""
        found = {name: self.load_tensor(_file_name(index, name), device=device) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def store(self, index: int, statistics: Statistics) -> None:
        """Keep the statistics of layer ``index`` as far as they fit."""
        for name, value in statistics.items():
            self.store_tensor(_file_name(index, name), value)


def _file_name(index: int, name: str) -> str:
    return f"layer{index:03d}.{name}"
