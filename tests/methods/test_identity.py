"""What a run is identified by does not change: records of all kinds, made by every version so far, keep their identity.

``recorded_identities.jsonl`` holds, of one record of each kind, the part of its configuration and of its identity that
the method decides.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from modegpt.config import (
    CompressionConfig,
    DecompositionConfig,
    ModelConfig,
    ModuleSparsity,
    RankMultiple,
    RunConfig,
    build,
    decisive,
    options_of,
    spelled,
)
from modegpt.errors import UserError
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.registry import METHODS, decides, make_method

RECORDED = [
    json.loads(line)
    for line in (Path(__file__).parent / "recorded_identities.jsonl").read_text(encoding="utf-8").splitlines()
]


TAKEN_OUT = [
    [key for key, left in (("centred", False), ("fisher", []), ("measured", "paper")) if method.get(key, left) != left]
    if (method := each["config"]["method"])["name"] == "modegpt_plus"
    else []
    for each in RECORDED
]
"""What of each is no more, so that it cannot be run again."""


def rebuilt(recorded: dict[str, Any]) -> RunConfig:
    """The configuration as today's, what its version did not know yet set to what that version did.

    And without what was taken out since, where nothing is left to turn on.
    """
    method, compression = dict(recorded["method"]), dict(recorded["compression"])
    cls = METHODS.get(method["name"])
    if cls is not None:
        for key, option in options_of(cls).items():
            if key not in method:
                method[key] = option.metadata["before"]
        for key, value in {**cls.retired, "fisher": []}.items():
            if cls.retired and method.get(key) == value:
                del method[key]
        if "rank_multiple" not in cls.reads:
            compression["rank_multiple"] = {}  # was 1 for every method
    compression["module_sparsity"] = ModuleSparsity(**compression["module_sparsity"])
    compression["rank_multiple"] = RankMultiple(**compression["rank_multiple"])
    return RunConfig(
        seed=recorded["seed"],
        model=ModelConfig(name="m", path="m"),
        method=method,
        decomposition=DecompositionConfig(**recorded["decomposition"]),
        allocation=recorded["allocation"],
        compression=CompressionConfig(**compression),
    )


def paper() -> RunConfig:
    """The configuration of a run of the paper's method."""
    return rebuilt(next(each["config"] for each in RECORDED if each["config"]["method"]["name"] == "modegpt"))


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_records_keep_their_identity(number: int) -> None:
    recorded = RECORDED[number]
    if gone := [f"method.{option}" for option in TAKEN_OUT[number]]:
        refusal = f"^({'|'.join(gone)}) was taken out in November 2026: .*docs/plus_choices.md"
        with pytest.raises(UserError, match=refusal):
            decides(rebuilt(recorded["config"]))
        return
    ours = decides(rebuilt(recorded["config"]))
    assert json.dumps(ours, sort_keys=True) == json.dumps(recorded["decides"], sort_keys=True), "to the byte"


def test_what_is_left_of_the_former_switches_keeps_its_identity() -> None:
    """Of plus as it is by default now, and of what stands alone on top of the paper's method."""
    plus = [index for index, each in enumerate(RECORDED) if each["config"]["method"]["name"] == "modegpt_plus"]
    left = [RECORDED[index]["config"]["method"] for index in plus if not TAKEN_OUT[index]]
    assert {(each["query_key"], each["mlp"]) for each in left} == {("checked", "elimination"), ("paper", "leverage")}


def test_every_method_is_among_them() -> None:
    assert {recorded["config"]["method"]["name"] for recorded in RECORDED} == set(METHODS)


@dataclass(frozen=True)
class Grown:
    old: tuple[float, ...] = (1.0,)
    new: bool = field(default=True, metadata={"before": False})
    elsewhere: int = field(default=3, metadata={"key": "compression.elsewhere"})


def test_a_younger_option_is_named_where_it_changes_something() -> None:
    choices = {"grown": Grown}
    assert decisive(choices, Grown(new=False)) == {"name": "grown", "old": [1.0]}
    assert decisive(choices, Grown()) == {"name": "grown", "old": [1.0], "new": True}
    assert spelled(choices, Grown(new=False)) == {"name": "grown", "old": [1.0], "new": False}
    again: Any = build(choices, spelled(choices, Grown(new=False)), "method")  # type: ignore[arg-type]
    assert again == Grown(old=[1.0], new=False)


def test_a_mended_method_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records from before are not taken for runs of today."""
    flap = METHODS["flap"]()
    today = flap.identity(sparsity=0.3, seed=0)
    monkeypatch.setattr(type(flap), "revision", 1)
    before = flap.identity(sparsity=0.3, seed=0)
    assert before["method"] == {"name": "flap", "compensate": True}
    assert today == before | {"method": before["method"] | {"revision": 2}}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "modegpt_plus", "skip_layers": [0]}, "method.skip_layers is not known: set compression.skip_layers"),
        ({"name": "modegpt", "mlp": "svd"}, "method.mlp is not known: set decomposition/mlp"),
        ({"name": "random", "ridge": 1.0}, "method.ridge: random has no options"),
    ],
)
def test_what_is_set_elsewhere_says_where(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method(replace(paper(), method=method))


@pytest.mark.parametrize("name", ["modegpt_plus", "random", "magnitude"])
def test_layer_sparsities_are_for_the_papers_method(name: str) -> None:
    asked = replace(paper(), method={"name": name}, compression=CompressionConfig(layer_sparsity=[0.1, 0.2]))
    with pytest.raises(UserError, match=f"compression.layer_sparsity has no effect with method={name}; leave it out"):
        make_method(asked)


def test_only_sums_of_statistics_are_shared_and_streamed() -> None:
    shared = {name for name, method in METHODS.items() if method.shared}
    assert shared == {"modegpt", "modegpt_plus", "random", "magnitude"}
    assert shared == {name for name, method in METHODS.items() if method.streamed}
    assert all(issubclass(METHODS[name], MoDeGPT) for name in shared - {"modegpt_plus"})
