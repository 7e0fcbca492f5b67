"""What every registered variant promises, whatever it computes."""

import copy
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from modegpt.decompositions import MLP_VARIANTS, QUERY_KEY_VARIANTS, VALUE_OUTPUT_VARIANTS
from modegpt.decompositions.modules import LowRank
from modegpt.errors import UserError
from tests.decompositions.cases import generator, mlp_case, query_key_case, value_output_case


def build(module: str, name: str, group: str):
    heads = {"multi-head": (4, 4), "grouped-query": (6, 2)}[group]
    if module == "mlp":
        return mlp_case(gated=group == "grouped-query", bias=True)
    if module == "query_key":
        return query_key_case(heads=heads, bias=True, rope=name != "svd")
    return value_output_case(heads=heads, bias=True)


REGISTRIES = {"mlp": MLP_VARIANTS, "query_key": QUERY_KEY_VARIANTS, "value_output": VALUE_OUTPUT_VARIANTS}
ALL = [(module, name) for module, registry in REGISTRIES.items() for name in registry]
variants = pytest.mark.parametrize("module,name", ALL, ids=[f"{module}-{name}" for module, name in ALL])
groups = pytest.mark.parametrize("group", ["multi-head", "grouped-query"])


def tensors(value) -> list[torch.Tensor]:
    """Every tensor of a weights or statistics object, low-rank factors included."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for f in fields(value) for t in tensors(getattr(value, f.name))] if is_dataclass(value) else []


def cast(weights, dtype):
    values = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return replace(
        weights, **{name: value.to(dtype) for name, value in values.items() if isinstance(value, torch.Tensor)}
    )


@variants
@groups
def test_full_rank_returns_the_same_tensors(module, name, group):
    case = build(module, name, group)
    result = REGISTRIES[module][name]()(case.weights, case.statistics, case.weights.inner_size, generator())
    assert result.weights is case.weights
    assert result.relative_error == 0.0 and result.numerics == {}


@variants
@groups
def test_inputs_are_untouched(module, name, group):
    case = build(module, name, group)
    statistics = case.statistics
    before = copy.deepcopy((case.weights, statistics))
    REGISTRIES[module][name]()(case.weights, statistics, case.weights.inner_size // 2, generator())
    for new, old in zip(
        tensors(case.weights) + tensors(statistics), tensors(before[0]) + tensors(before[1]), strict=True
    ):
        assert torch.equal(new, old)


@variants
@groups
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_weights_keep_dtype_and_share_no_memory(module, name, group, dtype):
    case = build(module, name, group)
    weights = cast(case.weights, dtype)
    rank = case.weights.inner_size // 2
    result = REGISTRIES[module][name]()(weights, case.statistics, rank, generator())
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
        REGISTRIES[module][name]()(case.weights, case.statistics, rank, generator()).relative_error
        for rank in (full - 2, full // 2, max(2, full // 4))
    ]
    assert errors == sorted(errors) and errors[0] < errors[2]


@variants
def test_bad_requests_are_refused_in_one_line(module, name):
    case = build(module, name, "grouped-query")
    variant, rank = REGISTRIES[module][name](), case.weights.inner_size // 2
    for wrong in (0, -2, case.weights.inner_size + 2):
        with pytest.raises(UserError, match=f"rank {wrong} is not between 1 and"):
            variant(case.weights, case.statistics, wrong, generator())
    for field_name in variant.required:
        with pytest.raises(UserError, match=f"needs the statistics {field_name}"):
            variant(case.weights, replace(case.statistics, **{field_name: None}), rank, generator())
        spoilt = getattr(case.statistics, field_name).clone()
        spoilt.view(-1)[0] = torch.nan
        with pytest.raises(UserError, match=f"statistic {field_name} holds NaN"):
            variant(case.weights, replace(case.statistics, **{field_name: spoilt}), rank, generator())


@variants
def test_docstring_states_optimum_cost_and_source(module, name):
    doc = REGISTRIES[module][name].__doc__
    assert all(word in doc.lower() for word in ("optimum", "cost", "source"))


@pytest.mark.parametrize(
    "registry,name,field",
    [
        (MLP_VARIANTS, "nystrom", "ridge"),
        (MLP_VARIANTS, "nystrom_bias", "ridge"),
        (MLP_VARIANTS, "columns", "ridge"),
        (MLP_VARIANTS, "elimination", "ridge"),
        (MLP_VARIANTS, "elimination", "block"),
        (VALUE_OUTPUT_VARIANTS, "columns", "ridge"),
    ],
)
def test_hyper_parameters_are_checked(registry, name, field):
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"{field} must be"):
            registry[name](**{field: wrong})
