"""What each rank costs does not depend on the rate: measured once, it serves a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modegpt.calibration.cache import StatisticsCache
from modegpt.files import json_sha256
from modegpt.methods.plus.sensitivity import Costs

VERSION = 1
"""Raised whenever ``rank_costs`` changes what it returns, so that what an older version kept is not found."""


@dataclass(frozen=True)
class KeptCosts:
    """The costs of ranks on the calibration behind ``cache``, beside its statistics.

    One float64 vector (size + 1,) for each layer and module.

    Args:
        modules, shares, skip_layers: as ``rank_costs`` takes them; they decide the costs.
    """

    cache: StatisticsCache
    modules: Mapping[str, frozenset[str]]
    shares: tuple[float, ...]
    skip_layers: tuple[int, ...]

    @property
    def _names(self) -> dict[str, str]:
        """What each module's costs are called in the cache."""
        decides = {
            "version": VERSION,
            "modules": {module: sorted(names) for module, names in self.modules.items()},
            "shares": list(self.shares),
            "skip_layers": list(self.skip_layers),
        }
        return {module: f"costs-{json_sha256(decides)[:32]}.{module}" for module in self.modules}

    def load(self, num_layers: int) -> Costs | None:
        """The costs of all layers; None if one is missing or damaged."""
        names, costs = self._names, []
        for index in range(num_layers):
            wanted = {} if index in self.skip_layers else names
            found = self.cache.load(index, frozenset(wanted.values()))
            if len(found) < len(wanted):
                return None
            costs.append({module: found[name].tolist() for module, name in wanted.items()})
        return costs

    def store(self, costs: Costs) -> None:
        """Keep the costs as far as they fit."""
        names = self._names
        for index, of_layer in enumerate(costs):
            self.cache.store(
                index, {names[module]: torch.tensor(curve, dtype=torch.float64) for module, curve in of_layer.items()}
            )
