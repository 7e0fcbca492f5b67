"""What every registered variant promises, whatever it computes."""

import copy
from dataclasses import fields, is_dataclass, replace
from itertools import product

import pytest
import torch

from modegpt.calibration.statistics import STATISTICS
from modegpt.decompositions import MLP_VARIANTS, VALUE_OUTPUT_VARIANTS, VARIANTS
from modegpt.decompositions.modules import LowRank
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
