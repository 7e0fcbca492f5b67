"""Integer ranks from layer sparsities, under an exact budget of removed parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modegpt.allocation.policies import ROUNDING, check_sparsity
from modegpt.errors import UserError

BUDGETS = ("exact", "nearest")
TARGET_TOLERANCE = 1e-3
"""A target is met where the share of the weights that is removed differs from it by no more."""


def missed_target(achieved: float, target: float) -> str | None:
    """What to say where the share removed, ``achieved``, is not the ``target``; None where it is."""
    if abs(achieved - target) <= TARGET_TOLERANCE:
        return None
    return f"the target is missed: {achieved:.2%} of the block-linear weights removed, {100 * target:g} % asked"


@dataclass(frozen=True)
class ModuleBudget:
    """One module of one layer as the budget sees it.

    size: its full inner size. unit: granularity of the kept rank (2 for rotary pairs, times any rank multiple); the
    full size is always allowed, whether or not the unit divides it. parameters_per_dimension: weights removed with each
    dimension.
    sparsity: its own target instead of the layer's. frozen: left at full size.
    """

    size: int
    unit: int
    parameters_per_dimension: int
    sparsity: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        assert self.size >= 1 and self.unit >= 1 and self.parameters_per_dimension >= 1, self
        if self.sparsity is not None:
            check_sparsity(self.sparsity, where="module sparsity")

    @property
    def step(self) -> int:
        """Parameters in one unit."""
        return self.unit * self.parameters_per_dimension

    @property
    def parameters(self) -> int:
        """Weights at full size."""
        return self.size * self.parameters_per_dimension

    def removed(self, rank: int) -> int:
        """Weights removed at ``rank``."""
        return (self.size - rank) * self.parameters_per_dimension

    def nearest_rank(self, removed: float) -> int:
        """The allowed rank that removes closest to ``removed`` parameters: a multiple of the unit or the full size.

        0 where less than half a unit should stay; that rank is nobody's to keep. The full size where there is no unit
        in it.
        """
        if self.unit > self.size:
            return self.size
        wanted = min(self.size - removed / self.parameters_per_dimension, float(self.size))
        rank = min(round(wanted / self.unit), self.size // self.unit) * self.unit
        return self.size if self.size - wanted < abs(wanted - rank) else max(rank, 0)

    def move(self, rank: int, direction: int) -> int | None:
        """The next allowed rank above (direction 1) or below (-1), or None."""
        if direction > 0:
            return min(rank + self.unit, self.size) if rank < self.size else None
        lower = (rank - 1) // self.unit * self.unit
        return lower if lower >= self.unit else None


@dataclass(frozen=True)
class RankPlan:
    """``ranks[layer][module]``: kept inner size. target, achieved: share of all parameters given that is removed."""

    ranks: list[dict[str, int]]
    target: float
    achieved: float


def free_sparsity(sparsity: float, layers: Sequence[Mapping[str, ModuleBudget]]) -> float:
    """Mean sparsity the free modules must reach for the whole to reach ``sparsity``.

    Frozen modules remove nothing and overridden ones remove their own share.
    Raises UserError where that is out of [0, 1).
    """
    check_sparsity(sparsity)
    modules = [module for layer in layers for module in layer.values()]
    free = sum(module.parameters for module in modules if is_free(module))
    fixed = math.fsum(module.parameters * own_sparsity(module) for module in modules if not is_free(module))
    wanted = sparsity * sum(module.parameters for module in modules) - fixed
    needed = wanted / free if free else math.inf if wanted > 0 else 0.0
    if -ROUNDING < needed < 0:
        needed = 0.0
    if not 0 <= needed < 1:
        raise UserError(
            f"sparsity {sparsity} is out of reach: the modules that are neither frozen nor given their own sparsity "
            f"would need {needed:.4g}"
        )
    return needed


def is_free(module: ModuleBudget) -> bool:
    """Whether the module takes part in the common budget: neither frozen nor given a sparsity of its own."""
    return not module.frozen and module.sparsity is None


def own_sparsity(module: ModuleBudget) -> float:
    """The share a module that is not free removes."""
    return 0.0 if module.frozen or module.sparsity is None else module.sparsity


def integer_ranks(
    sparsities: Sequence[float],
    layers: Sequence[Mapping[str, ModuleBudget]],
    *,
    budget: str = "exact",
    alike: bool = False,
) -> RankPlan:
    """Kept ranks per layer and module.

    sparsities (L,): share to remove from the free modules of each layer; layers (L,): module name to ModuleBudget.
    Modules with their own sparsity are rounded to it, frozen ones stay full, and neither compensates for the others;
    nor does a layer at sparsity 0. budget="exact": within a layer, modules are rounded from the coarsest parameter step
    to the finest, which absorbs the layer's remainder; then single units move, where a layer's own deviation grows
    least, until the total is within half the smallest step of the target; but where layers stay ``alike``, which were
    given the same, none moves alone. budget="nearest": every module rounds
    ``(1 - phi) size`` on its own (the k of docs/method.md).
    Raises UserError for a sparsity out of [0, 1), unequal lengths, or a rank that would reach zero (layer and module
    named).
    """
    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if len(sparsities) != len(layers):
        raise UserError(f"{len(sparsities)} layer sparsities given for {len(layers)} layers")
    ranks = [
        layer_ranks(index, phi, layer, budget)
        for index, (phi, layer) in enumerate(zip(sparsities, layers, strict=True))
    ]
    targets = [layer_target(phi, layer) for phi, layer in zip(sparsities, layers, strict=True)]
    if budget == "exact" and not alike:
        settle(ranks, targets, sparsities, layers)
    total = sum(module.parameters for layer in layers for module in layer.values())
    removed = sum(removed_parameters(kept, layer) for kept, layer in zip(ranks, layers, strict=True))
    return RankPlan(ranks=ranks, target=math.fsum(targets) / total, achieved=removed / total)


def layer_target(phi: float, layer: Mapping[str, ModuleBudget]) -> float:
    """Parameters to remove from a layer, over all its modules."""
    return math.fsum(m.parameters * (phi if is_free(m) else own_sparsity(m)) for m in layer.values())


def removed_parameters(ranks: Mapping[str, int], layer: Mapping[str, ModuleBudget]) -> int:
    """Weights removed from a layer whose modules keep ``ranks``."""
    return sum(module.removed(ranks[name]) for name, module in layer.items())


def layer_ranks(index: int, phi: float, layer: Mapping[str, ModuleBudget], budget: str) -> dict[str, int]:
    """Ranks of one layer.

    Under budget="exact" the finest free module (of equals the largest) absorbs what the others leave.
    """
    check_sparsity(phi, where=f"layer {index}")
    free = [name for name, module in layer.items() if is_free(module)]
    free.sort(key=lambda name: (-layer[name].step, layer[name].parameters))
    ranks = {}
    for name, module in layer.items():
        if not is_free(module):
            ranks[name] = nonzero(index, name, module, module.parameters * own_sparsity(module))
    remaining = phi * sum(layer[name].parameters for name in free)
    for name in free:
        module = layer[name]
        ranks[name] = nonzero(index, name, module, phi * module.parameters)
        if budget == "exact" and name == free[-1]:
            ranks[name] = max(module.nearest_rank(remaining), min(module.unit, module.size))
        elif budget == "exact" and module.removed(ranks[name]) > remaining:
            larger = module.move(ranks[name], 1)
            assert larger is not None, "a module that removes too much is not at its full size"
            ranks[name] = larger  # else a finer module would have to grow beyond its size
        remaining -= module.removed(ranks[name])
    return {name: ranks[name] for name in layer}


def nonzero(index: int, name: str, module: ModuleBudget, removed: float) -> int:
    """The nearest allowed rank. Raises UserError where that is zero."""
    rank = module.nearest_rank(removed)
    if rank == 0:
        raise UserError(
            f"layer {index}, {name}: removing {removed / module.parameters:.1%} of {module.size} dimensions leaves a "
            f"rank of zero (ranks are multiples of {module.unit}); lower what this module loses (compression.sparsity"
            f"{'' if module.sparsity is None else f', compression.module_sparsity.{name}'}) or its rank multiple"
        )
    return rank


def settle(
    ranks: list[dict[str, int]],
    targets: Sequence[float],
    sparsities: Sequence[float],
    layers: Sequence[Mapping[str, ModuleBudget]],
) -> None:
    """Move single units of ``ranks``, in place, until the total is within half the smallest step of its target."""
    movable = [
        (index, name, module)
        for index, (phi, layer) in enumerate(zip(sparsities, layers, strict=True))
        for name, module in layer.items()
        if phi > 0 and is_free(module)
    ]
    excess = [
        removed_parameters(kept, layer) - target for kept, layer, target in zip(ranks, layers, targets, strict=True)
    ]
    while movable:
        total = math.fsum(excess)
        if 2 * abs(total) <= min(module.step for _, _, module in movable):
            return
        direction = 1 if total > 0 else -1
        best = None
        for index, name, module in movable:
            rank = module.move(ranks[index][name], direction)
            if rank is None:
                continue
            change = module.removed(rank) - module.removed(ranks[index][name])
            if abs(total + change) >= abs(total):
                continue
            harm = (abs(excess[index] + change) - abs(excess[index]), abs(change))
            if best is None or harm < best[0]:
                best = (harm, index, name, rank, change)
        if best is None:
            return
        _, index, name, rank, change = best
        ranks[index][name] = rank
        excess[index] += change
