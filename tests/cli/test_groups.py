"""Every option of every group composes, passes the schema and fits the class that implements it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from modegpt.allocation.policies import POLICIES
from modegpt.cli.schema import config_directory, config_groups
from modegpt.config import TEXT_SOURCES, RunConfig, build, defaults, options_of
from modegpt.data.texts import SOURCES
from modegpt.decompositions import MLP_VARIANTS, QUERY_KEY_VARIANTS, VALUE_OUTPUT_VARIANTS
from modegpt.methods.registry import DENSE, METHODS, make_method
from modegpt.recovery.job import RECOVERIES

REGISTRIES: dict[str, Mapping[str, type]] = {
    "decomposition/mlp": MLP_VARIANTS,
    "decomposition/query_key": QUERY_KEY_VARIANTS,
    "decomposition/value_output": VALUE_OUTPUT_VARIANTS,
    "allocation": POLICIES,
    "recovery": RECOVERIES,
    "method": METHODS,
}
FILES = {
    "local": ["model.path=x"],
    "gguf": ["model.path=x.gguf"],
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


PLACES = {"engine": "compression/engine"}
"""Where a group is put that is not a section by itself."""
OPTIONS = {group: options(group) for group in config_groups()}


@pytest.mark.parametrize("number", range(max(map(len, OPTIONS.values()))))
def test_every_option_composes(job: Callable, number: int) -> None:
    """The first option of every group together, the second of every group, and so on."""
    chosen = {group: names[number % len(names)] for group, names in OPTIONS.items()}
    if chosen["method"] not in ("modegpt", "dense"):
        chosen |= {
            "allocation": "uniform",
            "engine": "any",
        }  # the others refuse what they would ignore, such as compression.layer_sparsity
    needed = [argument for name in chosen.values() for argument in FILES.get(name, [])]
    config = composed(job, *(f"{group}={name}" for group, name in chosen.items()), *dict.fromkeys(needed))
    for group, name in chosen.items():
        node = config
        for part in PLACES.get(group, group).split("/"):
            node = getattr(node, part)
        if group in REGISTRIES:
            assert node["name"] == name
        if name in REGISTRIES.get(group, {}) and group != "method":
            built: Any = build(REGISTRIES[group], node, group.replace("/", "."))
            assert {"name": name} | vars(built) == node
        if group == "engine":
            assert node == name
        if group == "calibration":
            assert node.source == name
    method = make_method(config)
    assert (method is None) == (chosen["method"] == "dense")


@pytest.mark.parametrize("group", REGISTRIES)
def test_every_implementation_has_its_option(group: str) -> None:
    dense = {"method": {DENSE}, "allocation": set()}.get(group, {"none"})
    assert set(options(group)) == set(REGISTRIES[group]) | dense


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made(job: Callable, name: str) -> None:
    config = composed(job, f"method={name}")
    assert {"name": name} | defaults(METHODS[name]) == config.method, "with every option of its class"
    method = make_method(config)
    assert type(method) is METHODS[name] and method.choices()["method"] == config.method


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in REGISTRIES for name in options(group) if name not in ("none", DENSE)]
)
def test_a_file_explains_every_option_and_repeats_no_default(group: str, name: str) -> None:
    path = config_directory() / group / f"{name}.yaml"
    cls, written = REGISTRIES[group][name], OmegaConf.load(path)
    explained = re.findall(r"^# ([a-z_]+): ", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert explained == list(options_of(cls))
    assert set(written) - {"name"} == set(options_of(cls)) - set(defaults(cls)), "what the class leaves open"


def test_an_option_is_set_on_the_command_line_and_swept(job: Callable, tmp_path: Path) -> None:
    code, calls = job(
        "--multirun",
        "decomposition.mlp.ridge=0.5,1",
        "allocation.cap=0.9",
        "recovery=lora",
        "recovery.rank=2",
        f"output.root={tmp_path}",
    )
    assert code == 0
    assert [config.decomposition.mlp for config, _ in calls] == [{"name": "nystrom", "ridge": r} for r in (0.5, 1)]
    assert [type(config.decomposition.mlp["ridge"]) for config, _ in calls] == [float, int], "as given: it is identity"
    assert all(config.allocation == {"name": "entropic", "epsilon": 0.1, "cap": 0.9} for config, _ in calls)
    assert all(config.recovery == {"name": "lora"} | defaults(RECOVERIES["lora"]) | {"rank": 2} for config, _ in calls)


def test_a_file_of_the_users_own_is_completed(job: Callable, tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("name: sleb\nnum_last_kept: 2\n", encoding="utf-8")
    assert composed(job, "--config-dir", str(tmp_path), "method=mine", "method.num_first_kept=1").method == {
        "name": "sleb",
        "num_first_kept": 1,
        "num_last_kept": 2,
    }


def test_sources_are_the_readers() -> None:
    assert set(TEXT_SOURCES) == set(SOURCES)


def test_yaml_holds_values_only() -> None:
    for path in config_directory().rglob("*.yaml"):
        if path.parent.name != "launcher" and path != config_directory() / "config.yaml":  # Hydra wants them there
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
