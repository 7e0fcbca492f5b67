"""Sparsity per layer at an exact mean: the allocation policies by name, and their maths.

``sparsity`` is the share removed. Source: MoDeGPT (arXiv 2408.09632), global sparsity allocation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from modegpt.errors import UserError

DEFAULT_CAP = 0.8
ROUNDING = 1e-9
"""A mean sparsity that exceeds the cap by no more than this is the cap: it was divided and multiplied on the way."""


def entropic(
    influence: Sequence[float], sparsity: float, *, epsilon: float, cap: float, weights: Sequence[float] | None = None
) -> list[float]:
    """Entropic allocation: ``phi_l = min(cap, c exp(-s_l / epsilon))`` with c such that the mean is ``sparsity``.

    It maximises ``sum w_l (s_l (1 - phi_l) - epsilon phi_l log phi_l)`` at that mean under ``phi_l <= cap``. While no
    layer reaches the cap it is the paper's ``L sparsity softmax(-s / epsilon)``; the cap and the redistribution of what
    it holds back are ours. The mean is met to 1e-12.

    Args:
        influence: s, one finite number a layer.
        sparsity: the mean to meet, in [0, 1).
        epsilon: the temperature; the larger, the more uniform.
        cap: the largest share a layer may lose, in [sparsity, 1), but for rounding.
        weights: the layers' parameter counts, by which the mean is weighted; equal by default.

    Raises:
        UserError: an input out of range.
    """
    check_epsilon(epsilon)
    check_reach(sparsity, cap)
    sparsity = min(sparsity, cap)
    weights = check_layers(influence, weights)
    phi = [0.0] * len(influence)
    free = list(range(len(influence)))
    budget = sparsity * math.fsum(weights)
    while free:
        nearest = min(influence[layer] for layer in free)
        share = {layer: math.exp((nearest - influence[layer]) / epsilon) for layer in free}
        level = budget / math.fsum(weights[layer] * share[layer] for layer in free)
        capped = [layer for layer in free if level * share[layer] > cap]
        if not capped:
            for layer in free:
                phi[layer] = level * share[layer]
            break
        for layer in capped:
            phi[layer] = cap
        budget = max(0.0, budget - cap * math.fsum(weights[layer] for layer in capped))
        free = [layer for layer in free if layer not in capped]
    return phi


def epsilon_for_cap(
    influence: Sequence[float], sparsity: float, *, cap: float, weights: Sequence[float] | None = None
) -> float:
    """The epsilon at which the most compressed layer of the uncapped entropic allocation just meets ``cap``.

    Found by bisection; the arguments are those of ``entropic``. Raises UserError where no epsilon does: the whole
    budget in the least influential layers stays under the cap.
    """
    check_reach(sparsity, cap)
    if sparsity >= cap - ROUNDING:
        raise UserError(f"allocation.cap={cap} is the mean sparsity itself: no epsilon meets it; raise it")
    weights = check_layers(influence, weights)
    lowest = min(influence)

    def most_compressed(epsilon: float) -> float:
        shares = [w * math.exp((lowest - s) / epsilon) for w, s in zip(weights, influence, strict=True)]
        return sparsity * math.fsum(weights) / math.fsum(shares)

    # bracket: most_compressed falls from its limit at epsilon -> 0 to `sparsity` at infinity
    limit = sparsity * math.fsum(weights) / math.fsum(w for w, s in zip(weights, influence, strict=True) if s == lowest)
    if limit <= cap:
        raise UserError(
            f"allocation: no epsilon brings a layer to allocation.cap={cap} at a mean sparsity of {sparsity:.6g} "
            f"(at most {limit:.4g}); lower allocation.cap, or use allocation=entropic"
        )
    low = high = max(max(influence) - lowest, 1e-12)
    while most_compressed(high) > cap:
        high *= 2
    while most_compressed(low) < cap:
        low /= 2
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if most_compressed(middle) > cap else (low, middle)
    return high


def entropic_cap(
    influence: Sequence[float], sparsity: float, *, cap: float, weights: Sequence[float] | None = None
) -> list[float]:
    """Entropic allocation whose most compressed layer just meets ``cap``; see ``epsilon_for_cap``."""
    epsilon = epsilon_for_cap(influence, sparsity, cap=cap, weights=weights)
    return entropic(influence, sparsity, epsilon=epsilon, cap=cap, weights=weights)


def most_taken(influence: Sequence[float], sparsity: float, *, epsilon: float) -> tuple[float, int]:
    """The largest share of one layer that the paper's formula takes, without a cap, and that layer. Above 1: more than
    the layer has.
    """
    lowest = min(influence)
    shares = [math.exp((lowest - s) / epsilon) for s in influence]
    return sparsity * len(influence) / math.fsum(shares), influence.index(lowest)


def check_reach(sparsity: float, cap: float) -> None:
    """UserError unless layers that lose no more than ``cap`` can lose ``sparsity`` on average."""
    check_cap(cap)
    check_sparsity(sparsity)
    if sparsity > cap + ROUNDING:
        default = ", its default," if cap == DEFAULT_CAP else ""
        raise UserError(
            f"a mean sparsity of {sparsity:.6g} over the layers is out of reach: allocation.cap={cap}{default} "
            "lets none lose more; lower compression.sparsity or raise allocation.cap"
        )


def check_sparsity(sparsity: float, where: str = "allocation") -> None:
    """UserError unless sparsity is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UserError(f"{where}: sparsity must be in [0, 1), got {sparsity}")


def check_layers(influence: Sequence[float], weights: Sequence[float] | None) -> Sequence[float]:
    """The layer weights, equal by default, after checking lengths and values."""
    if not len(influence) or not all(math.isfinite(s) for s in influence):
        raise UserError("allocation: the influence of every layer must be a finite number")
    if weights is None:
        return [1.0] * len(influence)
    if len(weights) != len(influence):
        raise UserError(f"allocation: {len(weights)} layer weights given for {len(influence)} layers")
    if not all(w > 0 and math.isfinite(w) for w in weights):
        raise UserError("allocation: every layer weight must be positive and finite")
    return weights


class Policy:
    """From block influence (L,) to one sparsity a layer whose mean is ``sparsity``.

    ``influence`` is None where ``needs_influence`` is False.
    """

    needs_influence: ClassVar[bool] = False

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        """Allocate ``sparsity``; ``generator`` decides what is random."""
        raise NotImplementedError

    def check(self, sparsity: float) -> None:
        """Raise UserError for a mean that no influence could make possible."""
        check_sparsity(sparsity)

    def warning(self, influence: Sequence[float], sparsity: float) -> str | None:
        """What a user should know of such an influence, or None."""
        return None


@dataclass(frozen=True)
class Uniform(Policy):
    """Every layer alike."""

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        """See ``Policy``."""
        check_sparsity(sparsity)
        return [sparsity] * num_layers


@dataclass(frozen=True)
class Explicit(Policy):
    """One sparsity a layer as given; the wanted mean is not consulted."""

    values: list[float]

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        """See ``Policy``."""
        if len(self.values) != num_layers:
            raise UserError(f"explicit allocation: {len(self.values)} sparsities given for {num_layers} layers")
        for index, value in enumerate(self.values):
            check_sparsity(value, where=f"explicit allocation, layer {index}")
        return [float(value) for value in self.values]


@dataclass(frozen=True)
class Entropic(Policy):
    """The paper's: ``L phi softmax(-s / epsilon)``, capped, the rest redistributed."""

    epsilon: float = 0.1
    cap: float = DEFAULT_CAP
    needs_influence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_cap(self.cap)

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        """See ``Policy``."""
        assert influence is not None
        return entropic(self.seen(influence, generator), sparsity, epsilon=self.epsilon, cap=self.cap)

    def seen(self, influence: Sequence[float], generator: torch.Generator) -> Sequence[float]:
        """The influence that is allocated by; controls change it."""
        return influence

    def check(self, sparsity: float) -> None:
        """See ``Policy``."""
        check_reach(sparsity, self.cap)

    def warning(self, influence: Sequence[float], sparsity: float) -> str | None:
        """Say so where the paper's formula takes more of a layer than it has: few layers then bear most."""
        if type(self) is not Entropic:
            return None  # a control is not meant to do well
        share, layer = most_taken(influence, sparsity, epsilon=self.epsilon)
        if share <= 1:
            return None
        return (
            f"allocation=entropic at epsilon={self.epsilon:g} wants {share:.0%} of layer {layer} (the cap holds it to "
            f"{self.cap:.0%}): the influences spread so far that few layers bear nearly everything, which was far "
            "worse than allocation=uniform on small models; raise allocation.epsilon or use allocation=uniform"
        )


@dataclass(frozen=True)
class EntropicCap(Policy):
    """Entropic with epsilon chosen so that the most compressed layer just meets the cap."""

    cap: float = DEFAULT_CAP
    needs_influence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_cap(self.cap)

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        """See ``Policy``."""
        assert influence is not None
        return entropic_cap(influence, sparsity, cap=self.cap)

    def check(self, sparsity: float) -> None:
        """See ``Policy``."""
        check_reach(sparsity, self.cap)


@dataclass(frozen=True)
class Inverse(Entropic):
    """Control: the entropic allocation of ``-influence``, which removes most from the most influential layers."""

    def seen(self, influence: Sequence[float], generator: torch.Generator) -> Sequence[float]:
        """Negated."""
        return [-s for s in influence]


@dataclass(frozen=True)
class Random(Entropic):
    """Control: the entropic allocation of the influences in random order, the same spread on other layers."""

    def seen(self, influence: Sequence[float], generator: torch.Generator) -> Sequence[float]:
        """Shuffled."""
        order = torch.randperm(len(influence), generator=generator, device=generator.device).tolist()
        return [influence[layer] for layer in order]


def check_epsilon(epsilon: float) -> None:
    """UserError unless epsilon is positive and finite."""
    if not 0 < epsilon < math.inf:
        raise UserError(
            f"allocation.epsilon={epsilon} must be positive and finite: it is the temperature of the allocation"
        )


def check_cap(cap: float) -> None:
    """UserError unless cap is in (0, 1)."""
    if not 0 < cap < 1:
        raise UserError(f"allocation.cap={cap} must lie between 0 and 1: it is the largest share a layer may lose")


POLICIES: dict[str, type[Policy]] = {
    "uniform": Uniform,
    "entropic": Entropic,
    "entropic_cap": EntropicCap,
    "explicit": Explicit,
    "inverse": Inverse,
    "random": Random,
}
