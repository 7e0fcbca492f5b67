"""Sparsity per layer at an exact mean.

``sparsity`` is the share removed. Every function returns one float per layer whose mean, weighted by the layers' parameter counts
``weights`` where given, is the target to 1e-12, and raises UserError for an input out of range.
"""

import math
from collections.abc import Sequence

import torch

from modegpt.errors import UserError


def uniform(num_layers: int, sparsity: float) -> list[float]:
    """The same sparsity for every layer."""
    check_sparsity(sparsity)
    return [sparsity] * num_layers


def explicit(values: Sequence[float], num_layers: int) -> list[float]:
    """Sparsities as given, one per layer."""
    if len(values) != num_layers:
        raise UserError(f"explicit allocation: {len(values)} sparsities given for {num_layers} layers")
    for index, value in enumerate(values):
        check_sparsity(value, where=f"explicit allocation, layer {index}")
    return [float(value) for value in values]


def entropic(
    influence: Sequence[float], sparsity: float, *, epsilon: float, cap: float, weights: Sequence[float] | None = None
) -> list[float]:
    """Entropic allocation: ``phi_l = min(cap, c exp(-s_l / epsilon))`` with c such that the mean is ``sparsity``.

    It maximises ``sum w_l (s_l (1 - phi_l) - epsilon phi_l log phi_l)`` at that mean under ``phi_l <= cap``; while no layer
    reaches the cap it is the paper's ``L sparsity softmax(-s / epsilon)``. influence s (L,); cap in [sparsity, 1).
    Source: MoDeGPT (arXiv 2408.09632), global sparsity allocation; the cap and its redistribution are ours.
    """
    check_sparsity(sparsity)
    if not epsilon > 0:
        raise UserError(f"allocation: epsilon must be positive, got {epsilon}")
    if not sparsity <= cap < 1:
        raise UserError(f"allocation: cap must be at least the sparsity {sparsity} and below 1, got {cap}")
    weights = check_layers(influence, weights)
    phi = [0.0] * len(influence)
    free = list(range(len(influence)))
    budget = sparsity * math.fsum(weights)
    while free:
        nearest = min(influence[l] for l in free)
        share = {l: math.exp((nearest - influence[l]) / epsilon) for l in free}
        level = budget / math.fsum(weights[l] * share[l] for l in free)
        capped = [l for l in free if level * share[l] > cap]
        if not capped:
            phi = [level * share[l] if l in share else phi[l] for l in range(len(phi))]
            break
        for l in capped:
            phi[l] = cap
        budget = max(0.0, budget - cap * math.fsum(weights[l] for l in capped))
        free = [l for l in free if l not in capped]
    return phi


def epsilon_for_cap(
    influence: Sequence[float], sparsity: float, *, cap: float, weights: Sequence[float] | None = None
) -> float:
    """The epsilon at which the most compressed layer of the uncapped entropic allocation just meets ``cap``, by bisection.

    Raises UserError where no epsilon does: the whole budget in the least influential layers stays under the cap.
    """
    check_sparsity(sparsity)
    if not sparsity < cap < 1:
        raise UserError(f"allocation: cap must lie between the sparsity {sparsity} and 1, got {cap}")
    weights = check_layers(influence, weights)
    lowest = min(influence)

    def most_compressed(epsilon: float) -> float:
        shares = [w * math.exp((lowest - s) / epsilon) for w, s in zip(weights, influence)]
        return sparsity * math.fsum(weights) / math.fsum(shares)

    # bracket: most_compressed falls from its limit at epsilon -> 0 to `sparsity` at infinity
    limit = sparsity * math.fsum(weights) / math.fsum(w for w, s in zip(weights, influence) if s == lowest)
    if limit <= cap:
        raise UserError(
            f"allocation: no epsilon brings a layer to the cap {cap} at sparsity {sparsity} (at most {limit:.4g}); "
            "lower the cap or give epsilon"
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
    """Entropic allocation with epsilon chosen so that the most compressed layer just meets ``cap``; see epsilon_for_cap."""
    epsilon = epsilon_for_cap(influence, sparsity, cap=cap, weights=weights)
    return entropic(influence, sparsity, epsilon=epsilon, cap=cap, weights=weights)


def inverse(
    influence: Sequence[float], sparsity: float, *, epsilon: float, cap: float, weights: Sequence[float] | None = None
) -> list[float]:
    """Control: the entropic allocation of ``-influence``, which removes most from the most influential layers."""
    return entropic([-s for s in influence], sparsity, epsilon=epsilon, cap=cap, weights=weights)


def random(
    influence: Sequence[float],
    sparsity: float,
    *,
    epsilon: float,
    cap: float,
    generator: torch.Generator,
    weights: Sequence[float] | None = None,
) -> list[float]:
    """Control: the entropic allocation of the influences in random order, the same spread on layers that did not earn it."""
    order = torch.randperm(len(influence), generator=generator, device=generator.device).tolist()
    return entropic([influence[l] for l in order], sparsity, epsilon=epsilon, cap=cap, weights=weights)


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
