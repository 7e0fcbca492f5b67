"""How much each module's reduction moves the model's predictions, measured; and what every rank would cost by that."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.statistics import Statistics
from modegpt.calibration.world import ALONE
from modegpt.data.tokens import CalibrationTokens
from modegpt.files import json_sha256
from modegpt.methods.divergence import Departures, even_positions
from modegpt.methods.prospects import PROSPECTS
from modegpt.models import decoder_layers, read_mlps

Costs = list[dict[str, list[float]]]
"""costs[layer][module][k]: what removing k of a module's dims is expected to cost."""

ENOUGH_TOKENS, FEWEST_TOKENS = 1024, 256
"""Divergences are measured on about so many calibration tokens; on fewer where that would cost more than a pass and a
half over all, but not on fewer than so many."""

MOST_ENTRIES, FEWEST_PREDICTIONS = 2**21, 128
"""So many log probabilities are compared a measurement (1365 predictions over 1536 tokens, 128 over 49152), at no fewer
positions than that."""

TOKENS_PER_CHANNEL = 4
"""Closed-form errors come from so many tokens for each MLP channel (of an expert: on average), or from a quarter of all
where that is more."""


def rank_costs(
    calibration: Calibration,
    modules: Mapping[str, frozenset[str]],
    shares: tuple[float, ...],
    skip_layers: tuple[int, ...],
) -> Costs:
    """costs[layer][module][k]: KL divergence expected from removing k dims of that module alone.

    Each of ``modules`` (with the statistics it needs) loses each of ``shares`` of its dims (closed form, statistics of
    the dense stream), the rest of the model runs dense on a few calibration windows, and the divergence from the dense
    model's predictions is measured, in float32 whatever the model's dtype. ``expected`` carries it to all ranks. One
    statistics pass over a quarter of the windows (more where they are short of ``TOKENS_PER_CHANNEL``), and for each
    module and share ``L^2 / 2`` layer passes over ``measured_windows``, for which each layer is needed once; no
    evaluation data, no gradient. Several processes take the changes of layers by turns, and the windows whole.
    """
    model, ids, world = calibration.model, calibration.tokens.ids, calibration.world
    layers, own = decoder_layers(model), _own_layers(calibration)
    measured = measured_windows(ids, num_layers=len(layers))
    departures = Departures.of(calibration.stored, measured, batch_size=calibration.batch_size)
    curves: Costs = []
    for index, (layer, statistics) in enumerate(zip(layers, curve_statistics(calibration, modules, own), strict=True)):
        wanted = () if index in skip_layers or index not in own else modules
        prospects = {module: PROSPECTS[module](calibration.family, layer, statistics) for module in wanted}
        changes = (
            ((index, module, removed), prospect.map(removed))
            for module, prospect in prospects.items()
            for removed in sorted({prospect.removed(share) for share in shares})
        )
        departures.advance(index, layer, changes)
        if index in own:
            curves.append({module: prospect.curve for module, prospect in prospects.items()})
    positions = compared_positions(measured, vocabulary=len(model.get_output_embeddings().weight))
    points: dict[tuple[int, str], dict[int, float]] = {}
    for (index, module, removed), divergence in departures.divergences(positions).items():
        points.setdefault((index, module), {})[removed] = divergence
    costs = [
        {module: expected(curve, points[index, module]) for module, curve in of_layer.items()}
        for index, of_layer in zip(own, curves, strict=True)
    ]
    return list(world.in_order(costs, "cpu"))


def curve_statistics(
    calibration: Calibration, modules: Mapping[str, frozenset[str]], only: Sequence[int] | None = None
) -> Iterator[Statistics]:
    """The statistics of each layer that closed-form errors of ``modules`` come from, on the first windows.

    ``only``: layers that have any; None: all.
    """
    tokens = _first(calibration.tokens, curve_windows(calibration))
    some = replace(calibration, tokens=tokens, precision=torch.float32, cache=None, world=ALONE)
    return some.statistics(frozenset().union(*modules.values()), loop="measured loss", only=only)


def measured_windows(ids: Tensor, *, num_layers: int) -> Tensor:
    """The first calibration windows, whole, or the beginning of the first.

    Whole, because queries and keys do more the more tokens are in front of them. So many tokens that all measurements
    together cost about three eighths of a pass over all windows, with two shares. More where that is short of
    ``ENOUGH_TOKENS``, but not above a pass and a half, unless that were fewer than ``FEWEST_TOKENS``.
    """
    num_samples, length = ids.shape
    tokens = max(
        num_samples // (8 * num_layers) * length,
        min(ENOUGH_TOKENS, ids.numel() // (2 * num_layers)),
        FEWEST_TOKENS,
    )
    return ids[: max(tokens // length, 1), :tokens]


def compared_positions(measured: Tensor, *, vocabulary: int) -> Tensor | None:
    """Where in each of the ``measured`` windows predictions are compared, evenly spaced.

    None: everywhere, where the vocabulary is small.
    """
    num_windows, length = measured.shape
    count = -(-max(MOST_ENTRIES // vocabulary, FEWEST_PREDICTIONS) // num_windows)
    return None if count >= length else even_positions(length, count).to(measured.device)


def perturbed_passes(calibration: Calibration, modules: Collection[str], *, num_shares: int) -> float:
    """Passes over all calibration windows that the forwards of ``rank_costs`` amount to, without those of its
    statistics; in this process.
    """
    ids, L = calibration.tokens.ids, calibration.num_layers
    measured = measured_windows(ids, num_layers=L)
    run = len(modules) * num_shares * sum(L - index for index in _own_layers(calibration))
    return (1 + run / L) * measured.numel() / ids.numel()


def _own_layers(calibration: Calibration) -> range:
    """Those whose modules this process measures."""
    return range(calibration.num_layers)[calibration.world.rank :: calibration.world.size]


def curve_windows(calibration: Calibration) -> int:
    """How many of the first windows closed-form errors come from."""
    num_samples, length = calibration.tokens.ids.shape
    channels = read_mlps(calibration.family, decoder_layers(calibration.model)[0]).inner_size
    needed = math.ceil(TOKENS_PER_CHANNEL * channels / calibration.family.seen_share(calibration.model.config))
    return min(num_samples, max(num_samples // 4, -(-needed // length)))


def _first(tokens: CalibrationTokens, num_samples: int) -> CalibrationTokens:
    return replace(tokens, ids=tokens.ids[:num_samples])


def expected(curve: list[float], points: Mapping[int, float]) -> list[float]:
    """Divergence at each k from the closed-form squared error ``curve[k]`` and the measured ``points`` (k: divergence).

    Proportional to the error up to the first point; beyond, log divergence is linear in log error through the points,
    and never falls. Points below ``SMALLEST`` are not measured: if all are, the last one stands at that, and the
    divergence is proportional to the error.
    """
    reduced = [k for k in sorted(points) if curve[k] > 0]
    measured = {k: points[k] for k in reduced if points[k] > SMALLEST} or dict.fromkeys(reduced[-1:], SMALLEST)
    known = [(math.log(curve[k]), math.log(divergence)) for k, divergence in measured.items()]
    values = [0.0]
    for error in curve[1:]:
        if error <= 0 or not known:
            values.append(values[-1])
            continue
        x = math.log(error)
        place = sum(point[0] <= x for point in known)
        if place == 0 or len(known) == 1:
            y = known[0][1] + x - known[0][0]
        else:
            (x_0, y_0), (x_1, y_1) = known[place - 1 : place + 1] if place < len(known) else known[-2:]
            slope = (y_1 - y_0) / (x_1 - x_0) if x_1 > x_0 else 1.0
            y = y_0 + (x - x_0) * slope
        values.append(max(math.exp(y), values[-1]))
    return values


SMALLEST = 1e-12
"""A divergence below this is the rounding of float32 logits."""

VERSION = 6
"""Raised whenever ``rank_costs`` changes what it returns, so that what an older version kept is not found."""


@dataclass(frozen=True)
class KeptCosts:
    """The costs of the calibration behind ``cache``, which do not depend on the rate: measured once, they serve a
    sweep.

    One float64 vector (size + 1,) a layer and module, kept as the calibration's statistics are.

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
        names = self._names
        costs: Costs = []
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
