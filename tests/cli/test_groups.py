"""Every option of every group composes, passes the schema and fits the class that implements it."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from modegpt.allocation.policies import POLICIES
from modegpt.cli.schema import config_directory, config_groups
from modegpt.config import TEXT_SOURCES, RunConfig, build
from modegpt.data.texts import SOURCES
from modegpt.decompositions import MLP_VARIANTS, QUERY_KEY_VARIANTS, VALUE_OUTPUT_VARIANTS
from modegpt.methods.registry import METHODS, make_method
from modegpt.recovery.job import RECOVERIES

REGISTRIES: dict[str, Mapping[str, type]] = {
    "decomposition/mlp": MLP_VARIANTS,
    "decomposition/query_key": QUERY_KEY_VARIANTS,
    "decomposition/value_output": VALUE_OUTPUT_VARIANTS,
    "allocation": POLICIES,
    "recovery": RECOVERIES,
}
FILES = {
    "local": ["model.path=x"],
    "hub": ["model.path=x/y"],
    "jsonl": ["calibration.path=x"],
    "text": ["calibration.path=x"],
    "explicit": ["compression.layer_sparsity=[0.1,0.2]"],
}
"""What some options cannot do without."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))


def composed(job: Callable, *arguments: str) -> RunConfig:
    code, calls = job(*arguments)
    assert code == 0
    [(config, _)] = calls
    return config


OPTIONS = {group: options(group) for group in config_groups()}


@pytest.mark.parametrize("number", range(max(map(len, OPTIONS.values()))))
def test_every_option_composes(job: Callable, number: int) -> None:
    """The first option of every group together, the second of every group, and so on."""
    chosen = {group: names[number % len(names)] for group, names in OPTIONS.items()}
    if chosen["method"] not in ("modegpt", "random", "magnitude", "dense"):
        chosen["allocation"] = "uniform"  # a baseline refuses what it would ignore, such as compression.layer_sparsity
    needed = [argument for name in chosen.values() for argument in FILES.get(name, [])]
    config = composed(job, *(f"{group}={name}" for group, name in chosen.items()), *dict.fromkeys(needed))
    for group, name in chosen.items():
        node = config
        for part in group.split("/"):
            node = getattr(node, part)
        if group in REGISTRIES or group == "method":
            assert node["name"] == name
        if name in REGISTRIES.get(group, {}):
            built = build(REGISTRIES[group], node, group.replace("/", "."))
            assert {"name": name} | vars(built) == node
        if group == "calibration":
            assert node.source == name
    method = make_method(config)
    assert (method is None) == (chosen["method"] == "dense")


@pytest.mark.parametrize("group", REGISTRIES)
def test_every_implementation_has_its_option(group: str) -> None:
    dense = {"none"} if group.startswith("decomposition/") or group == "recovery" else set()
    assert set(options(group)) == set(REGISTRIES[group]) | dense


def test_every_method_has_its_option() -> None:
    assert set(options("method")) == set(METHODS)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_every_method_is_made(job: Callable, name: str) -> None:
    assert make_method(composed(job, f"method={name}")) is not None


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in REGISTRIES for name in options(group) if name != "none"]
)
def test_options_name_every_hyper_parameter(group: str, name: str) -> None:
    written = OmegaConf.load(config_directory() / group / f"{name}.yaml")
    assert set(written) - {"name"} == {option.name for option in fields(REGISTRIES[group][name])}


def test_sources_are_the_readers() -> None:
    assert set(TEXT_SOURCES) == set(SOURCES)


def test_yaml_holds_values_only() -> None:
    for path in config_directory().rglob("*.yaml"):
        if path != config_directory() / "config.yaml":  # Hydra demands a _target_ for its callbacks
            assert "_target_" not in path.read_text(encoding="utf-8"), path


def test_the_configuration_arrives_as_written(job: Callable) -> None:
    code, [(config, command)] = job(
        "model=tiny-opt",
        "compression.sparsity=0.5",
        "compression.module_sparsity.mlp=0.2",
        "compression.skip_layers=[0,5]",
        "decomposition/mlp=elimination",
        "decomposition.mlp.block=64",
        "calibration.sequence_length=512",
        "seed=7",
        "tracking=disabled",
    )
    assert code == 0
    assert config.model.name == "tiny-opt"
    assert (config.compression.sparsity, config.compression.module_sparsity.mlp, config.compression.skip_layers) == (
        0.5,
        0.2,
        [0, 5],
    )
    assert config.decomposition.mlp == {"name": "elimination", "ridge": 1e-6, "block": 64}
    assert (config.calibration.sequence_length, config.calibration.seed, config.seed) == (512, 7, 7)
    assert command.startswith("modegpt model=tiny-opt compression.sparsity=0.5")
    assert config.tracking.mode == "disabled"


def test_nothing_is_left_behind(job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job("seed=1")[0] == 0
    assert job("--multirun", "seed=1,2")[0] == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
