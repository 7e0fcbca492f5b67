"""What every registered variant promises, whatever it computes."""

import copy
import weakref
from dataclasses import fields, is_dataclass, replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modegpt.calibration.statistics import STATISTICS
from modegpt.decompositions import MLP_VARIANTS, VALUE_OUTPUT_VARIANTS, VARIANTS
from modegpt.decompositions.modules import LowRank, Sizes
from modegpt.errors import UserError
from tests.decompositions.cases import generator, mlp_case, query_key_case, value_output_case

GROUPS = {"multi-head": (4, 4), "grouped-query": (6, 2)}
ALL = [(module, name) for module, registry in VARIANTS.items() for name in registry]
variants = pytest.mark.parametrize("module,name", ALL, ids=[f"{module}-{name}" for module, name in ALL])


def build(module: str, name: str, group: str):
    if module == "mlp":
        return mlp_case(gated=group == "grouped-query", bias=True)
    if module == "query_key":
        return query_key_case(heads=GROUPS[group], bias=True, rope=name != "svd")
    return value_output_case(heads=GROUPS[group], bias=True)


def tensors(value) -> list[torch.Tensor]:
    """Every tensor of weights or statistics, low-rank factors included."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [value[name] for name in sorted(value)]
    return [t for f in fields(value) for t in tensors(getattr(value, f.name))] if is_dataclass(value) else []


def cast(weights, dtype):
    values = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return replace(
        weights, **{name: value.to(dtype) for name, value in values.items() if isinstance(value, torch.Tensor)}
    )


@variants
def test_full_rank_returns_the_same_tensors(module, name):
    for group in GROUPS:
        case = build(module, name, group)
        result = VARIANTS[module][name]()(case.weights, case.statistics, case.weights.inner_size, generator())
        assert result.weights is case.weights
        assert result.relative_error == 0.0 and result.numerics == {}


@variants
def test_inputs_are_untouched(module, name):
    for group in GROUPS:
        case = build(module, name, group)
        statistics = case.statistics
        before = copy.deepcopy((case.weights, statistics))
        VARIANTS[module][name]()(case.weights, statistics, case.weights.inner_size // 2, generator())
        for new, old in zip(
            tensors(case.weights) + tensors(statistics), tensors(before[0]) + tensors(before[1]), strict=True
        ):
            assert torch.equal(new, old)


@variants
def test_reduced_weights_keep_dtype_and_share_no_memory(module, name):
    for group, dtype in product(GROUPS, (torch.float32, torch.bfloat16)):
        case = build(module, name, group)
        weights = cast(case.weights, dtype)
        rank = case.weights.inner_size // 2
        result = VARIANTS[module][name]()(weights, case.statistics, rank, generator())
        assert 0 < result.relative_error < 1.5
        for tensor in tensors(result.weights):
            assert torch.isfinite(tensor).all()
            assert tensor.dtype in (dtype, torch.int64)
        if not isinstance(getattr(result.weights, "W_D", None), LowRank):
            assert result.weights.inner_size == rank
        matrices = {t.data_ptr() for t in tensors(result.weights) if t.ndim > 1}
        assert not matrices & {t.data_ptr() for t in tensors(weights)}


class Held(TorchDispatchMode):
    """The most bytes of tensors that live at once among those that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[int, list[weakref.ref]]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(values):
            return [(t.untyped_storage(), t) for t in tree_leaves(values) if isinstance(t, torch.Tensor)]

        given = {storage.data_ptr() for storage, _ in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage, tensor in storages(result):
            if storage.data_ptr() in self.made or storage.data_ptr() not in given:
                _, views = self.made.get(storage.data_ptr(), (0, []))
                self.made[storage.data_ptr()] = storage.nbytes(), [*views, weakref.ref(tensor)]
        self.made = {key: held for key, held in self.made.items() if any(view() is not None for view in held[1])}
        self.most = max(self.most, sum(size for size, _ in self.made.values()))
        return result


@variants
def test_what_it_holds_grows_as_predicted(module, name):
    """In width, in heads and in head size; solvers hold room of their own, so the prediction may be the larger one."""
    shares = []
    for wide, heads, d, full in ((1, (4, 4), 16, 96), (3, (4, 4), 16, 96), (1, (12, 4), 16, 192), (1, (4, 4), 32, 192)):
        d_h, rank = 48 * wide, (3 * full // 4 if module == "mlp" else 3 * d // 4)
        case = {
            "mlp": lambda d_h=d_h, full=full: mlp_case(T=300, d_h=d_h, n=full),
            "query_key": lambda **given: query_key_case(**given, rope=name != "svd"),
            "value_output": value_output_case,
        }[module](**({} if module == "mlp" else {"heads": heads, "d_h": d_h, "d": d}))
        statistics, sizes = dict(case.statistics), Sizes(d_h=d_h, n=full, H=heads[0], H_kv=heads[1], d=d)
        variant = VARIANTS[module][name]()
        with Held() as held:
            variant(case.weights, statistics, rank, generator())
        shares.append(held.most / 8 / variant.solver_elements(sizes, rank))
    assert min(shares) > 0.15 and max(shares) < 1.25, shares
    assert max(shares) < 4 * min(shares), shares


@pytest.mark.parametrize("module,name", [pair for pair in ALL if pair[1] != "random"])
def test_error_grows_with_sparsity(module, name):
    case = build(module, name, "grouped-query")
    full = case.weights.inner_size
    errors = [
        VARIANTS[module][name]()(case.weights, case.statistics, rank, generator()).relative_error
        for rank in (full - 2, full // 2, max(2, full // 4))
    ]
    assert errors == sorted(errors) and errors[0] < errors[2]


@variants
def test_bad_requests_are_refused_in_one_line(module, name):
    case = build(module, name, "grouped-query")
    variant, rank = VARIANTS[module][name](), case.weights.inner_size // 2
    for wrong in (0, -2, case.weights.inner_size + 2):
        with pytest.raises(UserError, match=f"rank {wrong} is not between 1 and"):
            variant(case.weights, case.statistics, wrong, generator())
    for statistic in variant.required:
        others = {key: value for key, value in case.statistics.items() if key != statistic}
        with pytest.raises(UserError, match=f"needs the statistics {statistic}"):
            variant(case.weights, others, rank, generator())
        spoilt = torch.full_like(case.statistics[statistic], torch.nan, dtype=torch.float64)
        spoilt.view(-1)[1:] = case.statistics[statistic].view(-1)[1:]
        with pytest.raises(UserError, match=f"statistic {statistic} holds NaN"):
            variant(case.weights, others | {statistic: spoilt}, rank, generator())


def test_every_class_says_what_it_is_what_it_reads_and_what_it_holds():
    labels = {}
    for module, name in ALL:
        variant = VARIANTS[module][name]
        assert all(word in variant.__doc__.lower() for word in ("optimum", "cost", "source")), variant
        assert variant.required <= STATISTICS.keys(), variant
        assert labels.setdefault(name, variant.label) == variant.label, "one name, one label in every module"
        assert len({other.label for other in VARIANTS[module].values()}) == len(VARIANTS[module])


@pytest.mark.parametrize(
    "registry,name,field,zero",
    [
        (MLP_VARIANTS, "nystrom", "ridge", False),
        (MLP_VARIANTS, "nystrom_bias", "ridge", False),
        (MLP_VARIANTS, "columns", "ridge", False),
        (MLP_VARIANTS, "elimination", "ridge", True),
        (MLP_VARIANTS, "elimination", "block", False),
        (VALUE_OUTPUT_VARIANTS, "columns", "ridge", True),
    ],
)
def test_hyper_parameters_are_checked(registry, name, field, zero):
    for wrong in (-1, float("nan"), float("inf"), *([] if zero else [0])):
        with pytest.raises(UserError, match=f"{field} must be {'at least 0' if zero else 'positive'} and finite"):
            registry[name](**{field: wrong})
    if zero:
        assert getattr(registry[name](**{field: 0}), field) == 0
