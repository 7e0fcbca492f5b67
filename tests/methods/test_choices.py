"""Configuration in, fields out: what is asked for reaches the method, its identity, its task and the weights."""

import functools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from modegpt.allocation import policies
from modegpt.config import (
    CompressionConfig,
    DecompositionConfig,
    ModelConfig,
    ModuleSparsity,
    RankMultiple,
    RunConfig,
)
from modegpt.cost.metering import CostMeter
from modegpt.decompositions import VARIANTS, MLPMagnitude, MLPRandom, QueryKeyCR
from modegpt.methods.base import CompressionTask, Method, RankMethod, make_task
from modegpt.methods.modegpt import MODULES, MoDeGPT
from modegpt.methods.registry import METHODS, decides, make_method, settled
from modegpt.methods.slimgpt import eliminate_batches
from modegpt.progress import Progress
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model

PAPER = {"mlp": {"name": "nystrom"}, "query_key": {"name": "cr"}, "value_output": {"name": "svd"}}
RANKS: dict[str, Any] = {
    "module_sparsity": {"mlp": 0.1, "query_key": None, "value_output": 0.4},
    "rank_multiple": {"mlp": 3, "query_key": 4, "value_output": 5},
    "budget": "nearest",
    "skip_layers": [2, 1],
}
"""Each option about ranks away from its default, and the modules apart."""

OPTIONS: dict[str, dict[str, Any]] = {
    "modegpt_plus": {
        "sequential": True,
        "refit": False,
        "beta": 0.5,
        "align": False,
        "mlp": "leverage",
        "query_key": "paper",
        "value_output": "values",
        "bias": "none",
        "allocation": "entropic",
        "shares": [0.3],
        "cap": 0.7,
        "rounds": 0,
        "temperature": False,
        "nested": False,
        "queries_per_window": 7,
        "query_key_windows": 9,
    },
    "asvd": {},
    "llm_surgeon": {"shots": 2, "damping": 0.5, "coupling": "both", "batch_size": 3},
}
"""Options of some methods, each at another value than its default where that can be."""


def config(name: str = "modegpt", compression: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    wanted = dict(compression or {})
    for option, cls in (("module_sparsity", ModuleSparsity), ("rank_multiple", RankMultiple)):
        if option in wanted:
            wanted[option] = cls(**wanted[option])
    return RunConfig(
        model=ModelConfig(name="m", path="m"),
        **{
            "method": {"name": name, **changes.pop("method", {})},
            "decomposition": DecompositionConfig(**PAPER),
            "allocation": {"name": "uniform"},
            "compression": CompressionConfig(**wanted),
            **changes,
        },
    )


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


RANK_METHODS = [name for name, method in METHODS.items() if issubclass(method, RankMethod)]


@pytest.mark.parametrize("name", RANK_METHODS)
def test_what_rules_the_ranks_reaches_the_method_and_its_identity(name: str) -> None:
    method = make_method(config(name, RANKS))
    assert isinstance(method, RankMethod)
    assert as_json({option: getattr(method, option) for option in RANKS}) == RANKS
    decided = decides(config(name, RANKS))["compression"]
    assert {option: decided[option] for option in RANKS} == RANKS


@pytest.mark.parametrize("name", RANK_METHODS)
@pytest.mark.parametrize("option", RANKS)
def test_each_of_them_alone_makes_another_run(name: str, option: str) -> None:
    assert decides(config(name, {option: RANKS[option]})) != decides(config(name))


@pytest.mark.parametrize("name", METHODS)
def test_sparsity_and_seed_make_another_run(name: str) -> None:
    runs = [config(name), config(name, {"sparsity": 0.25}), config(name, seed=7)]
    decided = [decides(run) for run in runs]
    assert [each["seed"] for each in decided] == [0, 0, 7]
    assert [each["compression"]["sparsity"] for each in decided] == [0.3, 0.25, 0.3]
    assert len({each["method"]["name"] for each in decided} | {name}) == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_its_field_and_the_identity(name: str) -> None:
    options = OPTIONS[name]
    method = make_method(config(name, method=options))
    assert type(method) is METHODS[name]
    assert as_json({option: getattr(method, option) for option in options}) == options
    base = decides(config(name))
    for option, value in options.items():
        default = as_json({each.name: each.default for each in fields(METHODS[name]) if each.name in options})[option]
        if value != default:
            assert decides(config(name, method={option: value})) != base, option


@pytest.mark.parametrize("module", MODULES)
def test_each_decomposition_is_the_one_of_its_name(module: str) -> None:
    for name, variant in VARIANTS[module].items():
        run = config(decomposition=DecompositionConfig(**{**PAPER, module: {"name": name}}))
        method = make_method(run)
        assert isinstance(method, MoDeGPT)
        assert {each: type(getattr(method, each)) for each in MODULES} == {
            **{each: VARIANTS[each][PAPER[each]["name"]] for each in MODULES},
            module: variant,
        }
        assert decides(run)["decomposition"][module]["name"] == name
    left = make_method(config(decomposition=DecompositionConfig(**{**PAPER, module: {"name": "none"}})))
    assert getattr(left, module) is None
    scored = make_method(
        config(decomposition=DecompositionConfig(**{**PAPER, "query_key": {"name": "cr", "score": "pairs"}}))
    )
    assert scored.query_key == QueryKeyCR(score="pairs")


@pytest.mark.parametrize(
    ("allocation", "policy"),
    [
        ({"name": "uniform"}, policies.Uniform()),
        ({"name": "entropic", "epsilon": 0.3, "cap": 0.6}, policies.Entropic(epsilon=0.3, cap=0.6)),
        ({"name": "entropic_cap", "cap": 0.6}, policies.EntropicCap(cap=0.6)),
        ({"name": "inverse", "epsilon": 0.3, "cap": 0.6}, policies.Inverse(epsilon=0.3, cap=0.6)),
        ({"name": "random", "epsilon": 0.3, "cap": 0.6}, policies.Random(epsilon=0.3, cap=0.6)),
        ({"name": "explicit", "values": [0.1, 0.2]}, policies.Explicit([0.1, 0.2])),
    ],
)
def test_each_allocation_is_the_one_of_its_name(allocation: dict, policy: policies.Policy) -> None:
    asked = {key: value for key, value in allocation.items() if key != "values"}
    run = config(compression={"layer_sparsity": allocation.get("values")}, allocation=asked)
    method = make_method(run)
    assert type(method.allocation) is type(policy) and method.allocation == policy
    assert decides(run)["allocation"] == allocation
    assert decides(run)["compression"]["layer_sparsity"] == getattr(policy, "values", None)
    assert settled(run, device="cpu", model_config=dense_model("llama").config).allocation == allocation


@pytest.mark.parametrize("name", ["random", "magnitude"])
def test_a_control_cuts_every_module_by_its_own_criterion(name: str) -> None:
    method = make_method(config(name))
    assert [type(getattr(method, module)) for module in MODULES] == [VARIANTS[module][name] for module in MODULES]
    assert method.allocation == policies.Uniform()
    assert type(method.mlp) is {"random": MLPRandom, "magnitude": MLPMagnitude}[name]


def test_a_task_is_of_the_tokens_rate_seed_and_arithmetic_asked_for() -> None:
    dense, meter, progress = task_of(dense_model("llama"), 0.0).calibration, CostMeter(), Progress(quiet=True)
    task = make_task(
        Method(),
        dense.model,
        dense.tokens,
        method_name="m",
        sparsity=0.15,
        seed=11,
        batch_size=5,
        precision="float32",
        progress=progress,
        meter=meter,
    )
    assert (task.sparsity, task.seed) == (0.15, 11) and task.model is dense.model
    calibration = task.calibration
    assert calibration.tokens is dense.tokens and calibration.meter is meter and calibration.progress is progress
    assert (calibration.batch_size, calibration.precision, calibration.cache) == (5, torch.float32, None)
    drawn = torch.rand(3, generator=torch.Generator().manual_seed(11))
    assert torch.equal(torch.rand(3, generator=task.generator()), drawn), "of its own seed, from the start each time"
    assert torch.equal(torch.rand(3, generator=task.generator()), drawn)


def method_of(run: RunConfig) -> Any:
    """The method that ``run`` ends up with on a CPU."""
    method = make_method(settled(run, device="cpu", model_config=dense_model("llama").config))
    assert method is not None
    return method


def weights_of(method: Method, task: CompressionTask) -> tuple:
    model: PreTrainedModel = method.compress(task).model
    return tuple((name, tuple(value.flatten().tolist())) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["random", "modegpt"])
def test_the_seed_of_the_task_decides_what_is_random(name: str) -> None:
    """The dims of the control; the layers of the random allocation."""
    run = config(name) if name == "random" else config(allocation={"name": "random", "epsilon": 0.05})
    method, task = method_of(run), task_of(dense_model("llama"), 0.3)
    one, again, *others = (weights_of(method, replace(task, seed=seed)) for seed in (3, 3, 4, 5, 6))
    assert one == again
    assert any(one != other for other in others)


@pytest.mark.parametrize(
    "changes",
    [
        {"skip_layers": (0,)},
        {"budget": "nearest"},
        {"module_sparsity": {"mlp": 0.1}},
        {"rank_multiple": {"mlp": 16}},
        {"allocation": policies.Entropic()},
        {"allocation": policies.EntropicCap(cap=0.4)},
        {"allocation": policies.Inverse()},
        {"allocation": policies.Explicit([0.5, 0.3, 0.1])},
    ],
    ids=str,
)
def test_each_choice_makes_another_model(changes: dict) -> None:
    base, task = method_of(config()), task_of(dense_model("llama"), 0.3)
    plans = [replace(base, **each).plan(task, [0.3, 0.1, 0.2]).ranks for each in ({}, changes)]
    assert plans[0] != plans[1]


RECORDED = [
    json.loads(line)["decides"]
    for line in (Path(__file__).parent / "recorded_identities.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_by_default_what_its_records_did(name: str) -> None:
    """Of every option; a default that moves makes other runs of the same command."""
    assert decides(config(name))["method"] in [recorded["method"] for recorded in RECORDED]


@pytest.mark.parametrize("module", MODULES)
def test_a_decomposition_does_by_default_what_its_records_did(module: str) -> None:
    recorded = [each["decomposition"][module] for each in RECORDED if "decomposition" in each]
    for name in {each["name"] for each in recorded} - {"none"}:
        run = config(decomposition=DecompositionConfig(**{**PAPER, module: {"name": name}}))
        assert decides(run)["decomposition"][module] in recorded


def test_an_allocation_does_by_default_what_its_records_did() -> None:
    recorded = [each["allocation"] for each in RECORDED if "allocation" in each]
    for name in {each["name"] for each in recorded} - {"explicit"}:
        assert decides(config(allocation={"name": name}))["allocation"] in recorded


ANOTHER: dict[str, dict[str, Any]] = {
    "asvd": {"alpha": 0.1, "rank_search": True},
    "svd_llm": {"update": True},
    "slicegpt": {
        "budget": "slicing",
        "calibrate_on": "dense",
        "signal": "normalised",
        "slice_head": True,
        "multiple": 5,
    },
    "sleb": {"num_first_kept": 0, "num_last_kept": 1},
    "flap": {"compensate": False},
    "llm_pruner": {"importance": "vector", "aggregation": "max", "protect_first": 0.4, "protect_last": 0.4},
    "llm_surgeon": {"shots": 1, "damping": 10.0, "coupling": "both"},
    "obc": {"damping": 10.0},
    "slimgpt": {"first": 1.0, "batch": 1.0, "last_batch": 16, "damping": 10.0},
    "lems": {"windows": 1, "trials": 0, "measured": 0.6, "multiple": 3, "kfac": True},
    "2ssp": {"alpha": 4.0, "search_tokens": 20},
    "tyr": {"rounds": 2, "generations": 6, "offspring": 12, "step": 0.3, "windows": [2, 6], "survivors": [4]},
}
"""A value of each option that makes another model; those of modegpt_plus are in ``test_plus.py``."""
ONLY_HOW = {
    "asvd": {"search_windows"},
    **{name: {"batch_size"} for name in ("llm_pruner", "llm_surgeon", "lems")},
}
"""Options of which the tests below see what they are handed on as."""
ELSEWHERE: dict[str, dict[str, Any]] = {
    "asvd": {"rank_search": False},
    "sleb": {"num_first_kept": 1},
    "slimgpt": {"batch": 0.02, "last_batch": 1},
    "lems": {"trials": 1},
    "tyr": {"rounds": 1, "generations": 4, "offspring": 8, "windows": [1, 6], "survivors": [1]},
}
"""What the others are tried beside: ranks that are not searched, or little, which takes time; one channel at a time."""


def test_every_option_of_every_method_is_looked_at() -> None:
    for name, method in METHODS.items():
        own = {each.name for each in fields(cast(Any, method)) if "key" not in each.metadata}
        if name != "modegpt_plus":
            assert own == ANOTHER.get(name, {}).keys() | ONLY_HOW.get(name, set()), name


def thirds() -> CompressionTask:
    """Of one layer of three, on few tokens."""
    return task_of(dense_model("llama"), 1 / 3, num_samples=6, sequence_length=12)


@functools.cache
def without(name: str) -> tuple:
    return weights_of(method_of(config(name, method=ELSEWHERE.get(name, {}))), thirds())


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in ANOTHER.items() for option in options]
)
def test_each_option_makes_another_model(name: str, option: str) -> None:
    changed = method_of(config(name, method={**ELSEWHERE.get(name, {}), option: ANOTHER[name][option]}))
    assert weights_of(changed, thirds()) != without(name)


@pytest.mark.parametrize("name", ["llm_pruner", "llm_surgeon"])
def test_gradients_are_of_so_many_windows_at_a_time(name: str) -> None:
    task = thirds()
    seen: list[int] = []
    task.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    method_of(config(name, method={"batch_size": 4})).compress(task)
    assert set(seen) == {4, 2}


@pytest.mark.parametrize(
    ("name", "place", "option", "options"),
    [
        ("asvd", "asvd.truncated_losses", "num_windows", {"search_windows": 3}),
        ("lems", "lems.curvature_of", "batch_size", {"kfac": True, "batch_size": 3}),
    ],
)
def test_so_many_windows_are_handed_on(
    name: str, place: str, option: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception): ...

    def asked(*args: Any, **given: Any) -> None:
        raise Asked(given[option])

    monkeypatch.setattr(f"modegpt.methods.{place}", asked)
    with pytest.raises(Asked, match=r"^3$"):
        method_of(config(name, method=options)).compress(thirds())


def test_batches_of_channels_begin_at_a_share_of_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def noted(*args: Any, first: int, last: int) -> torch.Tensor:
        asked.append((first, last))
        return eliminate_batches(*args, first=first, last=last)

    monkeypatch.setattr("modegpt.methods.slimgpt.eliminate_batches", noted)
    for batch in (0.25, 0.01):
        method_of(config("slimgpt", method={"batch": batch, "last_batch": 3})).compress(thirds())
    assert asked == [(10, 3)] * 3 + [(3, 3)] * 3, "of 40 channels, and no fewer than the last batch has"
