"""Running the command line: in this process with the main job replaced, or in a fresh one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modegpt.cli.main as cli
from modegpt.config import RunConfig

STAND_IN = '''
"""Replaces the main job in every process of a sweep: notes the run, fails or (once) dies where its sparsity says so."""
import os, signal, sys, time, types
from pathlib import Path

def run(config, *, command):
    if config.compression.sparsity == 0.5:
        raise ValueError("planned failure")
    place = Path(config.output.root) / f"done-{config.compression.sparsity}-{config.seed}"
    place.parent.mkdir(parents=True, exist_ok=True)
    died = place.with_name("died")
    if config.compression.sparsity == 0.6 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if config.compression.sparsity == 0.7:
        place.with_name(f"begun-{config.seed}").write_text(str(os.getpid()))
        time.sleep(300)
    print("said by", command)
    place.write_text(command)

module = types.ModuleType("modegpt.run")
module.run = run
sys.modules["modegpt.run"] = module
'''


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[tuple[RunConfig, str]]]]:
    """``job(*arguments)`` runs the command line here with a main job that only notes what it was called with."""
    calls: list[tuple[RunConfig, str]] = []
    module = type(sys)("modegpt.run")
    module.run = lambda config, *, command: calls.append((config, command))
    monkeypatch.setitem(sys.modules, "modegpt.run", module)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.delenv("MODEGPT_TRACEBACK", raising=False)
    return lambda *arguments: (cli.main(list(arguments)), calls)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Any]:
    """``process(*arguments)`` runs ``python -m modegpt`` in a fresh process, from a folder of its own.

    With ``timeout=None`` it is started and not waited for; with ``streams`` its output goes where they say.
    """
    site, folder = tmp_path / "site", tmp_path / "folder"
    site.mkdir()
    folder.mkdir()
    (site / "sitecustomize.py").write_text(STAND_IN, encoding="utf-8")
    repository = Path(cli.__file__).resolve().parents[2]

    def run(
        *arguments: str, timeout: float | None = 180, **streams: Any
    ) -> subprocess.CompletedProcess | subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(site), str(repository)))}
        command = [sys.executable, "-m", "modegpt", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        started = subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams)
        if timeout is None:
            return started
        with started:
            output, errors = started.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, started.returncode, output, errors)

    return run
