"""Every experiment composes, job by job, and its header says what a reader needs."""

import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import modegpt.cli.main as cli
from analysis.expected import DIRECTORY, experiment
from analysis.ingredients import combination, combinations, title
from analysis.runs import annotated, hashable, setting
from modegpt.cli.schema import config_directory, ingredients
from modegpt.config import RunConfig, build
from modegpt.decompositions import MLP_VARIANTS, QUERY_KEY_VARIANTS, VALUE_OUTPUT_VARIANTS
from modegpt.errors import UserError
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.switches import CHOICES, Switches
from modegpt.methods.registry import METHODS, make_method
from tests.scripts import load_script

FILES = sorted(path.stem for path in DIRECTORY.glob("*.yaml") if path.stem != "ingredients")


def jobs(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> list[RunConfig]:
    """What the jobs of a sweep would run."""
    calls: list[RunConfig] = []
    module = type(sys)("modegpt.run")
    module.run = lambda config, *, command: calls.append(config)
    monkeypatch.setitem(sys.modules, "modegpt.run", module)
    monkeypatch.chdir(folder)
    assert cli.main(list(arguments)) == 0
    return calls


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_composes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one multirun command, of which only the last job is kept to be quick."""
    each = experiment(name)
    last = each.settings[-1]
    cut = [f"{'+' * key.startswith('experiments/')}{key}={_spelt(value)}" for key, value in last.items()]
    [config] = jobs(monkeypatch, tmp_path, "--multirun", f"+experiments={name}", "model=tiny-llama", *cut)
    assert config.output.experiment == each.folder
    assert config.tracking.mode == "disabled"
    assert config.model.name == "tiny-llama"
    assert make_method(config) is not None
    assert all(hashable(setting(annotated(asdict(config)), key)) == value for key, value in last.items()), (
        "the analysis finds what was swept"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_header_says_it_all(name: str) -> None:
    text = (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.partition("\ndefaults:")[0]
    assert header.startswith("# @package _global_\n")
    assert f"modegpt --multirun +experiments={name}" in header
    assert re.search(r"GPU hours", header) and "Set beside:" in header
    announced = re.search(r"^# (\d+) runs", header, re.MULTILINE)
    assert announced is not None
    models = len(re.search(r"^      model: (.*)$", text, re.MULTILINE)[1].split(",")) if "      model: " in text else 1
    assert int(announced[1]) == models * len(experiment(name).settings)


def test_every_job_is_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = jobs(monkeypatch, tmp_path, "--multirun", "+experiments=layer_sparsity")
    assert [(config.method["name"], config.compression.sparsity) for config in configs] == [
        ("modegpt", rate) for rate in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]
    assert [(each["method"], each["compression.sparsity"]) for each in experiment("layer_sparsity").settings] == [
        ("modegpt", rate) for rate in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]


def test_the_tiny_plan_covers_every_experiment() -> None:
    module = load_script("experiments/tiny")
    sweeps = module.plan([])
    assert {sweep.experiment for sweep in sweeps} == set(FILES) - set(module.ELSEWHERE) - (
        set() if module.OTHER_DOMAIN else {"plus_domain"}
    )  # no other text without the shared folder
    assert {(sweep.experiment, sweep.model) for sweep in sweeps} < {
        (sweep.experiment, sweep.model) for sweep in module.plan([], full=True)
    }
    for sweep in sweeps:
        assert sweep.num_jobs == len(experiment(sweep.experiment).settings)
    assert {sweep.experiment for sweep in module.plan(["ridge"])} == {"ridge"}


def test_the_analysis_reads_combinations_as_hydra_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    some = ["paper", "only_refit", "all", "without_sequential"]
    configs = jobs(
        monkeypatch,
        tmp_path,
        "--multirun",
        "+experiments=plus_ablation",
        f"+experiments/ingredients={','.join(some)}",
        "compression.sparsity=0.3",
    )
    assert [config.method for config in configs] == [combinations()[name] for name in some]


@pytest.mark.parametrize("name", combinations())
def test_a_combination_can_be_run_and_recognised(name: str) -> None:
    assert combination(combinations()[name]) == name, "no two are the same"
    assert build({"modegpt_plus": MoDeGPTPlus}, combinations()[name], "method")
    assert title(name)


def test_every_ingredient_is_ablated() -> None:
    """Each switch that the paper's form turns off stands alone on top of it, and is turned off in all but one."""
    paper, everything = combinations()["paper"], combinations()["all"]
    turned = {key for key in paper if paper[key] != everything[key]}
    alone = {
        key
        for name, switches in combinations().items()
        if name.startswith("only_")
        for key in switches
        if switches[key] != paper[key]
    }
    missing = {
        key
        for name, switches in combinations().items()
        if name.startswith("with")
        for key in switches
        if switches[key] != everything[key]
    }
    assert alone == turned
    assert missing == turned | {"rounds", "nested"}, "off by default, but what they do is measured"
    assert set(combinations()) == {
        settings["experiments/ingredients"] for settings in experiment("plus_ablation").settings
    }
    switches = {
        option.name for option in fields(Switches) if option.name in CHOICES or isinstance(option.default, bool)
    }
    assert switches <= set(ingredients()["paper"]["switches"]), "what a new switch is in the paper is said there"
    for key, choices in CHOICES.items():
        assert {combined[key] for combined in combinations().values()} == set(choices)


def test_a_switch_that_a_record_does_not_know_was_off() -> None:
    recorded = combinations()["only_mlp"] | {}
    del recorded["temperature"]
    assert combination(recorded) == "only_mlp"
    assert combination({"name": "modegpt"}) is None and combination(combinations()["all"] | {"cap": 0.123}) is None


@pytest.mark.parametrize("switch", [{"centred": True}, {"fisher": [0.5]}, {"bias": "added"}, {"query_key": "rescaled"}])
def test_what_was_taken_out_is_no_combination_and_cannot_be_run(switch: dict) -> None:
    switches = combinations()["all"] | switch
    assert combination(switches) is None
    with pytest.raises(UserError, match=r"^method\.(centred|fisher|bias=added|query_key=rescaled) was taken out"):
        build({"modegpt_plus": MoDeGPTPlus}, switches, "method")


def test_nothing_is_forgotten() -> None:
    swept = {
        key: {settings[key] for name in FILES for settings in experiment(name).settings if key in settings}
        for key in ("method", "decomposition/mlp", "decomposition/query_key", "decomposition/value_output")
    }
    assert swept["method"] == set(METHODS)
    assert swept["decomposition/mlp"] == set(MLP_VARIANTS)
    assert swept["decomposition/query_key"] == set(QUERY_KEY_VARIANTS)
    assert swept["decomposition/value_output"] == set(VALUE_OUTPUT_VARIANTS)


def test_experiments_are_found_wherever_the_configuration_is() -> None:
    assert (config_directory() / "experiments" / "methods.yaml").is_file()


def _spelt(value: object) -> str:
    return "{" + ",".join(f"{key}:{member}" for key, member in value) + "}" if isinstance(value, tuple) else str(value)
