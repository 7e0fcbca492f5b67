import math
import random

import pytest

from modegpt.allocation.policies import entropic
from modegpt.allocation.ranks import ModuleBudget, free_sparsity, integer_ranks, missed_target
from modegpt.errors import UserError

SEEDS = range(30)


def layer(rank_multiple: int = 1, *, d_h: int = 64, n: int = 172, d: int = 16, H: int = 4, H_kv: int = 2, **options):
    """A gated layer: query-key in rotary pairs, value-output and MLP in single dims, all times the multiple."""
    heads = (H + H_kv) * d_h
    return {
        "mlp": ModuleBudget(size=n, unit=rank_multiple, parameters_per_dimension=3 * d_h, **options.get("mlp", {})),
        "query_key": ModuleBudget(
            size=d, unit=math.lcm(2, rank_multiple), parameters_per_dimension=heads, **options.get("query_key", {})
        ),
        "value_output": ModuleBudget(
            size=d, unit=rank_multiple, parameters_per_dimension=heads, **options.get("value_output", {})
        ),
    }


def draw(seed: int, rank_multiple: int = 1):
    r = random.Random(seed)
    H_kv = r.choice([1, 2, 4])
    shape = dict(
        d_h=r.choice([32, 64, 96]),
        n=r.randint(100, 300),
        d=r.choice([16, 32, 64]),
        H=H_kv * r.choice([1, 2, 3]),
        H_kv=H_kv,
    )
    layers = [layer(rank_multiple, **shape) for _ in range(r.randint(2, 12))]
    influence = [r.random() for _ in layers]
    phi = entropic(influence, r.uniform(0.02, 0.5), epsilon=r.choice([0.3, 1.0, 10.0]), cap=0.7)
    return phi, layers


def removed(ranks, layers) -> int:
    return sum(
        (m.size - kept[name]) * m.parameters_per_dimension
        for kept, modules in zip(ranks, layers, strict=True)
        for name, m in modules.items()
    )


def total(layers) -> int:
    return sum(m.size * m.parameters_per_dimension for modules in layers for m in modules.values())


def assert_allowed(ranks, layers):
    for kept, modules in zip(ranks, layers, strict=True):
        assert list(kept) == list(modules)
        for name, m in modules.items():
            assert kept[name] == m.size or (kept[name] % m.unit == 0 and 0 < kept[name] < m.size)


@pytest.mark.parametrize("rank_multiple", [1, 2, 4, 8])
def test_achieved_is_within_half_the_smallest_step(rank_multiple):
    for seed in SEEDS:
        phi, layers = draw(seed, rank_multiple)
        plan = integer_ranks(phi, layers)
        assert_allowed(plan.ranks, layers)
        target = math.fsum(p * total([modules]) for p, modules in zip(phi, layers, strict=True))
        step = min(m.unit * m.parameters_per_dimension for modules in layers for m in modules.values())
        assert abs(removed(plan.ranks, layers) - target) <= step / 2 + 1e-6
        assert plan.target == pytest.approx(target / total(layers), rel=1e-12)
        assert plan.achieved == removed(plan.ranks, layers) / total(layers)


def test_coarse_units_beside_a_small_target():
    """Where one unit of a head module outweighs what the layer should lose, the MLP must still reach the target."""
    for seed in SEEDS:
        r = random.Random(seed)
        layers = [layer(r.choice([2, 4, 8]), d_h=96, n=174, d=32, H=8, H_kv=8)] * r.randint(2, 9)
        phi = [r.uniform(0.01, 0.18) for _ in layers]
        plan = integer_ranks(phi, layers)
        assert_allowed(plan.ranks, layers)
        assert abs(plan.achieved - plan.target) * total(layers) <= layers[0]["mlp"].step / 2 + 1e-6


def test_every_module_stays_near_its_layer():
    """Coarse modules are within a unit of their own target; the finest moves by what they left and one step at most."""
    for seed in SEEDS:
        phi, layers = draw(seed)
        plan = integer_ranks(phi, layers)
        for p, kept, modules in zip(phi, plan.ranks, layers, strict=True):
            slack = 1.0
            finest = min(modules, key=lambda name: (modules[name].step, -modules[name].parameters))
            off = {name: abs(kept[name] - (1 - p) * m.size) * m.parameters_per_dimension for name, m in modules.items()}
            for name in set(modules) - {finest}:
                assert off[name] <= modules[name].step + 1e-6
                slack += off[name]
            assert off[finest] <= slack + 1.5 * modules[finest].step


def test_nearest_is_the_plain_rule():
    for seed in SEEDS:
        phi, layers = draw(seed)
        plan = integer_ranks(phi, layers, budget="nearest")
        for p, kept, modules in zip(phi, plan.ranks, layers, strict=True):
            for name, m in modules.items():
                assert kept[name] == round((1 - p) * m.size / m.unit) * m.unit or kept[name] == m.size
        assert plan.achieved == removed(plan.ranks, layers) / total(layers)


def test_exact_beats_nearest():
    worse = 0
    for seed in SEEDS:
        phi, layers = draw(seed)
        exact, nearest = integer_ranks(phi, layers), integer_ranks(phi, layers, budget="nearest")
        worse += abs(nearest.achieved - nearest.target) > abs(exact.achieved - exact.target)
    assert worse > 0.8 * len(SEEDS)


def test_zero_sparsity_keeps_everything():
    layers = [layer(8, n=173) for _ in range(3)]
    plan = integer_ranks([0.0] * 3, layers)
    assert plan.achieved == plan.target == 0.0
    assert plan.ranks == [{"mlp": 173, "query_key": 16, "value_output": 16}] * 3


def test_full_size_is_allowed_where_the_multiple_does_not_divide_it():
    module = ModuleBudget(size=173, unit=64, parameters_per_dimension=10)
    assert [module.nearest_rank(10 * r) for r in (0, 20, 30, 45, 76, 78, 109, 140, 142)] == [
        173,
        173,
        128,
        128,
        128,
        64,
        64,
        64,
        0,
    ]
    assert module.nearest_rank(10 * 22) == 173 and module.nearest_rank(10 * 23) == 128
    assert module.nearest_rank(-50) == 173
    assert module.move(173, -1) == 128 and module.move(128, 1) == 173 and module.move(173, 1) is None
    assert module.move(128, -1) == 64 and module.move(64, -1) is None
    one = ModuleBudget(size=1, unit=1, parameters_per_dimension=1)
    assert (one.nearest_rank(0), one.move(1, 1), one.move(1, -1)) == (1, None, None)
    assert ModuleBudget(size=16, unit=64, parameters_per_dimension=1).move(16, -1) is None


def test_frozen_overridden_and_skipped_do_not_compensate():
    for seed in SEEDS:
        r = random.Random(seed)
        layers = [layer(query_key=dict(frozen=True), value_output=dict(sparsity=0.5)) for _ in range(6)]
        phi = [r.uniform(0.1, 0.5) for _ in layers]
        phi[2] = 0.0  # a skipped layer: its free modules stay whole
        plan = integer_ranks(phi, layers)
        assert all(kept["query_key"] == 16 and kept["value_output"] == 8 for kept in plan.ranks)
        assert plan.ranks[2]["mlp"] == 172
        target = math.fsum(
            p * m["mlp"].parameters + 0.5 * m["value_output"].parameters for p, m in zip(phi, layers, strict=True)
        )
        assert abs(removed(plan.ranks, layers) - target) <= layers[0]["mlp"].step / 2 + 1e-6
        assert plan.target == pytest.approx(target / total(layers))


def test_skipped_layer_stays_whole_beside_coarser_ones():
    layers = [layer(), layer(8), layer(8)]
    for phi in (0.2, 0.23, 0.26, 0.29, 0.32, 0.35):  # what rounding leaves over is of either sign
        plan = integer_ranks([0.0, phi, phi], layers)
        assert plan.ranks[0] == {"mlp": 172, "query_key": 16, "value_output": 16}
        assert abs(plan.achieved - plan.target) * total(layers) <= layers[1]["mlp"].step / 2 + 1e-6


def test_override_of_zero_is_full():
    plan = integer_ranks([0.3] * 4, [layer(mlp=dict(sparsity=0.0)) for _ in range(4)])
    assert all(kept["mlp"] == 172 for kept in plan.ranks)


def test_free_sparsity_reaches_the_whole_target():
    for seed in SEEDS:
        r = random.Random(seed)
        layers = [layer(query_key=dict(frozen=True), value_output=dict(sparsity=0.2)) for _ in range(5)]
        sparsity = r.uniform(0.1, 0.5)
        phi = [free_sparsity(sparsity, layers)] * 5
        plan = integer_ranks(phi, layers)
        fixed = 5 * abs(round(0.8 * 16) - 0.8 * 16) * layers[0]["value_output"].parameters_per_dimension
        assert plan.target == pytest.approx(sparsity, rel=1e-12)
        assert abs(plan.achieved - sparsity) * total(layers) <= layers[0]["mlp"].step / 2 + fixed


def test_free_sparsity_refusals():
    layers = [layer(mlp=dict(frozen=True))]
    with pytest.raises(UserError, match="out of reach"):
        free_sparsity(0.9, layers)
    with pytest.raises(UserError, match="out of reach"):
        free_sparsity(0.1, [layer(mlp=dict(sparsity=0.9))])
    everything = {name: dict(frozen=True) for name in ("mlp", "query_key", "value_output")}
    with pytest.raises(UserError, match="out of reach"):
        free_sparsity(0.1, [layer(**everything)])
    assert free_sparsity(0.0, [layer(**everything)]) == 0.0


def test_rank_of_zero_names_layer_and_module():
    with pytest.raises(UserError, match=r"layer 1, query_key: .* leaves a rank of zero"):
        integer_ranks([0.1, 0.95], [layer(), layer()])
    with pytest.raises(UserError, match="layer 0, value_output"):
        integer_ranks([0.1], [layer(value_output=dict(sparsity=0.99))])
    with pytest.raises(UserError, match="layer 0, mlp"):
        integer_ranks(
            [0.7], [layer(128, query_key=dict(frozen=True), value_output=dict(frozen=True))], budget="nearest"
        )


def test_a_rank_of_zero_blames_no_cap_that_nobody_set():
    with pytest.raises(UserError, match=r"compression.sparsity") as refused:
        integer_ranks([0.999], [layer()])
    assert "cap" not in str(refused.value)


def test_sparsities_of_modules_that_are_the_whole_target_leave_nothing_to_the_others():
    """To rounding: 0.1 + 0.2 may be a little more than what was asked."""
    for percent in range(1, 90):
        layers = [layer(value_output=dict(sparsity=percent / 100))] * 3
        fixed = layers[0]["value_output"].parameters * 3
        assert free_sparsity(percent / 100 * fixed / total(layers), layers) == pytest.approx(0, abs=1e-9)


def test_a_target_is_met_to_a_tenth_of_a_percent():
    assert missed_target(0.3004, 0.3) is None and missed_target(0.2991, 0.3) is None
    assert missed_target(0.8926, 0.9) == (
        "the target is missed: 89.26% of the block-linear weights removed, 90 % asked"
    )
    assert "33.33% of" in missed_target(1 / 3, 0.3)


def test_a_small_absorbing_module_is_never_emptied():
    """Two heads make value-output the finest module; the others leave more than it has, so other layers take it."""
    layers = [layer(8, d_h=96, n=192, d=16, H=1, H_kv=1) for _ in range(5)]
    plan = integer_ranks([0.7, 0.7, 0.09, 0.12, 0.15], layers)
    assert_allowed(plan.ranks, layers)
    assert abs(plan.achieved - plan.target) * total(layers) <= layers[0]["value_output"].step / 2 + 1e-6


def test_refusals():
    with pytest.raises(UserError, match="2 layer sparsities given for 1 layers"):
        integer_ranks([0.1, 0.2], [layer()])
    with pytest.raises(UserError, match="layer 0: sparsity must be in"):
        integer_ranks([1.0], [layer()])
    with pytest.raises(UserError, match="budget must be one of exact, nearest"):
        integer_ranks([0.1], [layer()], budget="close")
    with pytest.raises(UserError, match="sparsity must be in"):
        layer(mlp=dict(sparsity=1.5))


def test_llama_2_7b_at_30_percent():
    layers = [layer(d_h=4096, n=11008, d=128, H=32, H_kv=32) for _ in range(32)]
    plan = integer_ranks([0.3] * 32, layers)
    assert abs(plan.achieved - 0.3) < 0.5 * 3 * 4096 / total(layers)
    assert {kept["query_key"] for kept in plan.ranks} == {90} and {kept["value_output"] for kept in plan.ranks} == {90}
