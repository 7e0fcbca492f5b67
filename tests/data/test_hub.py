"""The hub path on a hub: models, data sets and tasks fetched, refused, and found again in the cache offline.

The libraries read ``HF_ENDPOINT`` on import, so the commands run in processes of their own: one that reaches the hub,
and one after it that does not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from modegpt.data.embedded import TINY_MODELS
from modegpt.evaluation.local_tasks import CONVERTERS
from modegpt.records.store import load_record
from tests.evaluation.task_rows import ROWS
from tests.hub import Hub, Repository, checkpoint, dataset

SCRIPT = """
import contextlib, io, json, sys
from modegpt.cli.main import main
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line.split())
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}))
"""
SMALL = (
    "calibration=wikitext2 calibration.num_samples=4 calibration.sequence_length=128 "
    "evaluation.perplexity.windows=[128] tracking=disabled output.pictures=false threads=1 cache.max_bytes=0"
)
TASKS = {
    "piqa": ("baber/piqa", "default", "validation"),
    "hellaswag": ("Rowan/hellaswag", "default", "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
}
COMMANDS = {
    "paper": f"model=hub model.path=acme/tiny-llama model.revision=v1 evaluation=paper {SMALL}",
    "named": f"model=opt-125m method=dense evaluation=wikitext2 quiet=true {SMALL}",
    "revision": f"model=hub model.path=acme/tiny-llama model.revision=v9 evaluation=wikitext2 {SMALL}",
    "missing": f"model=hub model.path=acme/mistyped evaluation=wikitext2 {SMALL}",
    "gated": f"model=llama2-7b evaluation=wikitext2 {SMALL}",
    "no access": f"model=llama3-8b evaluation=wikitext2 {SMALL}",
    "gated data": f"model=hub model.path=acme/tiny-llama calibration=alpaca evaluation=wikitext2 "
    f"{SMALL.replace('calibration=wikitext2', '')}",
    "local": f"model=local model.path=checkpoints/mistyped evaluation=wikitext2 {SMALL}",
    "quiet": f"model=opt-1.3b evaluation=wikitext2 quiet=true {SMALL}",
}


class Answer(NamedTuple):
    """What one command came to."""

    code: int
    out: str
    err: str


class World(NamedTuple):
    """The hub, what every command came to with it and without it, and where they ran."""

    hub: Hub
    online: dict[str, Answer]
    offline: dict[str, Answer]
    folder: Path


def repositories() -> dict[str, list[Repository]]:
    """Two models, one of them with an older state; two gated ones; a data set for every task and text."""
    llama, opt = (checkpoint(TINY_MODELS[name]) for name in ("tiny-llama", "tiny-opt"))
    rows = [{"text": "The old baker walked to the market and bought two apples . " * 30 + "\n"}] * 3
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    found = {
        "models/acme/tiny-llama": [Repository(llama, tags=("v1",)), Repository(llama | {"NEWS.md": b"v2"})],
        "models/facebook/opt-125m": [Repository(opt)],
        "models/meta-llama/Llama-2-7b-hf": [Repository(llama, gated=401)],
        "models/meta-llama/Meta-Llama-3-8B": [Repository(llama, gated=403)],
        "datasets/tatsu-lab/alpaca": [Repository({"README.md": b""}, gated=401)],
        "datasets/Salesforce/wikitext": [Repository(dataset({"wikitext-2-raw-v1": splits}))],
    }
    configurations: dict[str, dict[str, Any]] = {}
    for task, (name, configuration, split) in TASKS.items():
        given = [row | {"label": 0} if task == "piqa" else row for row in ROWS[task]]
        converted = [CONVERTERS[task](row, task) for row in given]
        configurations.setdefault(name, {})[configuration] = {split: converted}
    return found | {f"datasets/{name}": [Repository(dataset(each))] for name, each in configurations.items()}


def answers(commands: dict[str, str], folder: Path, url: str) -> dict[str, Answer]:
    """Run the commands in one process whose hub is at ``url``."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "huggingface")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(list(commands.values())),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return {name: Answer(**json.loads(line)) for name, line in zip(commands, done.stdout.splitlines(), strict=True)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder, hub = tmp_path_factory.mktemp("hub"), Hub(repositories())
    with hub.serve() as url:
        online = answers(COMMANDS, folder, url)
    again = ("paper", "named", "quiet")
    offline = answers({name: f"{COMMANDS[name]} output.root=offline quiet=true" for name in again}, folder, url)
    return World(hub, online, offline, folder)


def record_of(world: World, root: str, name: str) -> dict[str, Any]:
    [path] = (world.folder / root / "runs").glob(f"{name}*/record.json")
    return load_record(path)


def test_everything_of_the_paper_comes_from_the_hub(world: World) -> None:
    answer = world.online["paper"]
    assert answer.code == 0, answer.err
    assert answer.err == "", "no bar, no warning where no one watches a terminal"
    record = record_of(world, "results", "tiny-llama")
    assert record["metrics"]["dense"]["zeroshot"].keys() == {*TASKS, "mean"}
    assert list(record["metrics"]["compressed"]["perplexity"]) == ["ppl_wikitext2_128"]
    assert record["calibration"]["source"] == "wikitext2"


def test_the_commits_are_recorded_and_decide_nothing(world: World) -> None:
    record = record_of(world, "results", "tiny-llama")
    states = world.hub.repositories
    data = {name for name in states if name.startswith("datasets/") and "alpaca" not in name}
    assert record["provenance"]["hub"] == {
        "models/acme/tiny-llama": states["models/acme/tiny-llama"][0].commit,  # v1 and not main
        **{name: states[name][-1].commit for name in data},
    }
    decides = json.dumps(record["identity"]["decides"])
    assert not any(commit in decides for commit in record["provenance"]["hub"].values())


def test_a_named_model_is_quiet(world: World) -> None:
    answer = world.online["named"]
    assert answer.code == 0 and answer.err == ""
    assert answer.out.startswith("opt-125m, dense"), "the summary alone"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("revision", "its repository has no such revision"),
        ("missing", "no repository of this name, or it is private: then log in with `hf auth login`"),
    ],
)
def test_what_the_hub_has_not_is_said_in_a_line(world: World, command: str, said: str) -> None:
    answer = world.online[command]
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert said in answer.err and "model=local model.path=DIRECTORY" in answer.err


@pytest.mark.parametrize(
    ("command", "page"),
    [
        ("gated", "/meta-llama/Llama-2-7b-hf,"),
        ("no access", "/meta-llama/Meta-Llama-3-8B,"),
        ("gated data", "/datasets/tatsu-lab/alpaca,"),
    ],
)
def test_a_gated_repository_names_the_licence_and_the_login(world: World, command: str, page: str) -> None:
    answer = world.online[command]
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert "is gated: accept its licence at http://127.0.0.1:" in answer.err
    assert page in answer.err and "`hf auth login`" in answer.err


def test_a_local_model_is_not_asked_of_the_hub(world: World) -> None:
    answer = world.online["local"]
    assert answer.code == 1
    assert answer.err == "error: no model directory at checkpoints/mistyped; to ask the hub, set model=hub\n"
    assert not any("checkpoints/mistyped" in asked for asked in world.hub.asked)


def test_a_warm_cache_gives_the_same_numbers_offline_and_quietly(world: World) -> None:
    for command, name in (("paper", "tiny-llama"), ("named", "opt-125m")):
        answer = world.offline[command]
        assert answer.code == 0 and answer.err == ""
        first, again = record_of(world, "results", name), record_of(world, "offline", name)
        assert again["metrics"] == first["metrics"] and again["identity"] == first["identity"]
        assert again["provenance"]["hub"] == first["provenance"]["hub"]


def test_a_cold_cache_is_one_quiet_line_offline(world: World) -> None:
    answer = world.offline["quiet"]
    assert answer.code == 1 and answer.out == "" and answer.err.count("\n") == 1
    assert "cannot be reached, and its cache here has no copy" in answer.err
