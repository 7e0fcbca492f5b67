import math
import random as standard_random

import pytest
import torch

from modegpt.allocation.policies import (
    DEFAULT_CAP,
    POLICIES,
    Entropic,
    EntropicCap,
    Explicit,
    Inverse,
    Random,
    Uniform,
    check_reach,
    entropic,
    entropic_cap,
    epsilon_for_cap,
    most_taken,
)
from modegpt.allocation.ranks import ModuleBudget, free_sparsity
from modegpt.errors import UserError

SEEDS = range(30)


def draw(seed: int) -> tuple[list[float], float, float, float, list[float]]:
    """influence, sparsity, epsilon, cap, weights"""
    r = standard_random.Random(seed)
    influence = [r.expovariate(8.0) for _ in range(r.randint(2, 40))]
    sparsity = r.uniform(0.05, 0.6)
    return (
        influence,
        sparsity,
        10 ** r.uniform(-3, 1),
        r.uniform(sparsity, 0.95),
        [r.uniform(0.5, 2.0) for _ in influence],
    )


def mean(phi, weights=None):
    weights = weights or [1.0] * len(phi)
    return math.fsum(w * p for w, p in zip(weights, phi, strict=True)) / math.fsum(weights)


@pytest.mark.parametrize("weighted", [True, False])
def test_entropic_meets_budget_and_cap_and_order(weighted):
    for seed in SEEDS:
        influence, sparsity, epsilon, cap, weights = draw(seed)
        weights = weights if weighted else None
        phi = entropic(influence, sparsity, epsilon=epsilon, cap=cap, weights=weights)
        assert abs(mean(phi, weights) - sparsity) < 1e-12
        assert all(0 <= p <= cap for p in phi)
        by_influence = [p for _, p in sorted(zip(influence, phi, strict=True))]
        assert by_influence == sorted(by_influence, reverse=True)


def test_entropic_is_the_papers_softmax_under_the_cap_and_optimal_at_it():
    for seed in SEEDS:
        influence, sparsity, epsilon, cap, _ = draw(seed)
        phi = entropic(influence, sparsity, epsilon=epsilon, cap=cap)
        softmax = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / epsilon, dim=0)
        paper = (len(influence) * sparsity * softmax).tolist()
        if max(paper) <= cap:
            assert phi == pytest.approx(paper, rel=1e-10)
        # stationarity: s + epsilon (log phi + 1) is one number over the layers under the cap, and no larger at the cap
        levels = [(s + epsilon * math.log(p), p) for s, p in zip(influence, phi, strict=True) if p > 1e-250]
        free = [level for level, p in levels if p < cap]
        if free:
            assert max(free) - min(free) < 1e-9 * max(1, abs(free[0]))
            assert all(level <= min(free) + 1e-9 for level, p in levels if p == cap)


def test_published_form_by_hand():
    phi = entropic([0.0, math.log(3)], 0.2, epsilon=1.0, cap=0.8)
    assert phi == pytest.approx([0.3, 0.1])
    capped = entropic([0.0, math.log(3)], 0.2, epsilon=1.0, cap=0.25)
    assert capped == pytest.approx([0.25, 0.15])


def test_extremes_of_epsilon():
    influence = [0.4, 0.1, 0.2, 0.3]
    assert entropic(influence, 0.3, epsilon=1e9, cap=0.8) == pytest.approx([0.3] * 4)
    assert entropic(influence, 0.3, epsilon=1e-9, cap=0.8) == pytest.approx([0, 0.8, 0.4, 0])
    assert entropic(influence, 0.0, epsilon=0.1, cap=0.8) == [0.0] * 4
    assert entropic(influence, 0.3, epsilon=0.1, cap=0.3) == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("weighted", [True, False])
def test_epsilon_for_cap_just_meets_it(weighted):
    for seed in SEEDS:
        influence, sparsity, _, cap, weights = draw(seed)
        weights = weights if weighted else [1.0] * len(influence)
        lowest = weights[influence.index(min(influence))]
        if sparsity * math.fsum(weights) / lowest <= cap:
            with pytest.raises(UserError, match=r"no epsilon brings a layer to allocation\.cap"):
                epsilon_for_cap(influence, sparsity, cap=cap, weights=weights)
            continue
        phi = entropic_cap(influence, sparsity, cap=cap, weights=weights)
        assert max(phi) == pytest.approx(cap, rel=1e-12)
        assert abs(mean(phi, weights) - sparsity) < 1e-12
        epsilon = epsilon_for_cap(influence, sparsity, cap=cap, weights=weights)
        looser = entropic(influence, sparsity, epsilon=1.01 * epsilon, cap=0.999, weights=weights)
        tighter = entropic(influence, sparsity, epsilon=0.99 * epsilon, cap=0.999, weights=weights)
        assert max(looser) < cap < max(tighter)


def allocated(policy, sparsity, *, influence=None, num_layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return policy(influence, num_layers=num_layers, sparsity=sparsity, generator=generator)


def test_uniform_and_explicit():
    assert allocated(Uniform(), 0.25) == [0.25] * 3
    assert allocated(Explicit([0.1, 0, 0.5]), 0.25) == [0.1, 0.0, 0.5]
    with pytest.raises(UserError, match="2 sparsities given for 3 layers"):
        allocated(Explicit([0.1, 0.2]), 0.25)
    with pytest.raises(UserError, match="layer 1"):
        allocated(Explicit([0.1, 1.0, 0.2]), 0.25)


@pytest.mark.parametrize("cap", [0.5, 0.7])
def test_each_policy_by_its_name_is_its_own_formula_under_its_own_cap(cap):
    """Influences so far apart that each of them takes something else of every layer."""
    influence, sparsity, epsilon = [0.0, 0.3, 0.1, 0.28], 0.3, 0.1
    order = torch.randperm(4, generator=torch.Generator().manual_seed(2)).tolist()
    expected = {
        "uniform": [sparsity] * 4,
        "entropic": entropic(influence, sparsity, epsilon=epsilon, cap=cap),
        "entropic_cap": entropic_cap(influence, sparsity, cap=cap),
        "inverse": entropic([-s for s in influence], sparsity, epsilon=epsilon, cap=cap),
        "random": entropic([influence[layer] for layer in order], sparsity, epsilon=epsilon, cap=cap),
        "explicit": [0.1, 0.2, 0.3, 0.4],
    }
    options = {"uniform": {}, "entropic_cap": {"cap": cap}, "explicit": {"values": [0.1, 0.2, 0.3, 0.4]}}
    assert expected.keys() == POLICIES.keys() and len(set(map(tuple, expected.values()))) == len(expected)
    assert max(expected["entropic"]) == cap, "the cap shows"
    for name, phi in expected.items():
        policy = POLICIES[name](**options.get(name, {"epsilon": epsilon, "cap": cap}))
        assert allocated(policy, sparsity, influence=influence, num_layers=4, seed=2) == pytest.approx(phi), name
        assert policy.needs_influence == (name not in ("uniform", "explicit"))


def test_inverse_compresses_the_most_influential():
    phi = allocated(Inverse(epsilon=0.2, cap=0.8), 0.3, influence=[0.4, 0.1, 0.2])
    assert phi[0] > phi[2] > phi[1]
    assert abs(mean(phi) - 0.3) < 1e-12


def test_random_has_the_spread_of_entropic_in_another_order():
    influence = [0.4, 0.1, 0.2, 0.35, 0.05, 0.6]
    options = dict(epsilon=0.2, cap=0.8)
    draws = [allocated(Random(**options), 0.3, influence=influence, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(phi) for phi in draws}) >= 3
    for phi in draws:
        assert sorted(phi) == pytest.approx(sorted(entropic(influence, 0.3, **options)))


GOOD = dict(influence=[0.1, 0.2], sparsity=0.3, epsilon=0.1, cap=0.8)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(sparsity=1.0), r"sparsity must be in \[0, 1\)"),
        (dict(sparsity=-0.1), r"sparsity must be in \[0, 1\)"),
        (dict(sparsity=math.nan), r"sparsity must be in \[0, 1\)"),
        (dict(epsilon=0.0), "allocation.epsilon=0.0 must be positive"),
        (dict(epsilon=math.nan), "allocation.epsilon=nan must be positive"),
        (dict(epsilon=math.inf), "allocation.epsilon=inf must be positive and finite"),
        (dict(cap=0.2), "a mean sparsity of 0.3 .* out of reach: allocation.cap=0.2 lets none lose more"),
        (dict(cap=1.0), "allocation.cap=1.0 must lie between 0 and 1"),
        (dict(cap=0.0, sparsity=0.0), "allocation.cap=0.0 must lie between 0 and 1"),
        (dict(cap=-0.5, sparsity=0.0), "allocation.cap=-0.5 must lie between 0 and 1"),
        (dict(influence=[0.1, math.nan]), "finite"),
        (dict(influence=[]), "finite"),
        (dict(weights=[1.0]), "1 layer weights given for 2 layers"),
        (dict(weights=[1.0, 0.0]), "weight must be positive"),
    ],
)
def test_refusals(wrong, message):
    options = GOOD | wrong
    with pytest.raises(UserError, match=message):
        entropic(options.pop("influence"), options.pop("sparsity"), **options)


def test_equal_influences_meet_no_cap():
    with pytest.raises(UserError, match=r"lower allocation.cap, or use allocation=entropic"):
        epsilon_for_cap([0.2] * 4, 0.3, cap=0.8)
    for sparsity in (0.3, 0.3 + 1e-16, 0.3 - 1e-16):
        with pytest.raises(UserError, match=r"allocation.cap=0.3 is the mean sparsity itself"):
            epsilon_for_cap([0.1, 0.2], sparsity, cap=0.3)


def test_a_mean_that_rounding_lifts_above_the_cap_is_the_cap():
    """The share that free modules lose is a quotient: at many rates and shapes it comes out an ulp above the cap."""
    shapes = [(172, 64), (688, 192), (1536, 576), (11008, 4096), (14336, 4096)]
    lifted = 0
    for width, hidden in shapes:
        layer = {
            "mlp": ModuleBudget(size=width, unit=1, parameters_per_dimension=3 * hidden),
            "query_key": ModuleBudget(size=64, unit=2, parameters_per_dimension=2 * hidden),
        }
        for percent in range(3, 97):
            cap = percent / 100
            mean = free_sparsity(cap, [layer] * 6)
            lifted += mean > cap
            for policy in (Entropic(cap=cap), Inverse(cap=cap), Random(cap=cap)):
                policy.check(mean)
                phi = allocated(policy, mean, influence=[0.1 * k for k in range(6)], num_layers=6)
                assert phi == pytest.approx([cap] * 6, rel=1e-12) and max(phi) <= cap
            EntropicCap(cap=cap).check(mean)
    assert lifted > 10, "these rates and shapes no longer show the rounding"
    for excess in (1e-6, 0.1):
        with pytest.raises(UserError, match="out of reach"):
            Entropic(cap=0.8).check(0.8 + excess)


def test_a_cap_that_nobody_set_is_called_the_default():
    for policy in (Entropic(), EntropicCap(), Inverse(), Random()):
        with pytest.raises(UserError, match=r"sparsity of 0.999 .* allocation.cap=0.8, its default, lets none"):
            policy.check(0.999)
    with pytest.raises(UserError, match=r"allocation.cap=0.7 lets none"):
        Entropic(cap=0.7).check(0.999)
    Uniform().check(0.999)


def test_influences_too_far_apart_for_epsilon_are_warned_of():
    """Where the formula wants a whole layer and more, however the cap spreads it, and there alone."""
    far, near = [0.0, 0.5, 0.6, 0.7], [0.20, 0.22, 0.25, 0.21]
    share, layer = most_taken(far, 0.3, epsilon=0.1)
    assert (share, layer) == (pytest.approx(entropic(far, 0.05, epsilon=0.1, cap=0.8)[0] * 6), 0) and share > 1
    assert "wants 119% of layer 0 (the cap holds it to 80%)" in Entropic().warning(far, 0.3)
    assert "allocation=uniform" in Entropic().warning(far, 0.3)
    assert Entropic().warning(near, 0.3) is None and Entropic(epsilon=1.0).warning(far, 0.3) is None
    assert Uniform().warning(far, 0.3) is None and Inverse().warning(far, 0.3) is None


def test_a_cap_out_of_reach_is_called_a_default_only_where_it_is_one() -> None:
    for cap in (DEFAULT_CAP - 0.1, DEFAULT_CAP, DEFAULT_CAP + 0.1):
        with pytest.raises(UserError, match="lets none lose more") as raised:
            check_reach(0.999, cap)
        assert ("its default" in str(raised.value)) == (cap == DEFAULT_CAP)
