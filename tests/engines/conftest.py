"""Real engines in an environment of their own, which ``make engines`` builds; without it these tests are skipped."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ENGINES = Path(os.environ.get("MODEGPT_ENGINES", HERE.parents[1] / ".venv-engines")).resolve()
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def engines() -> Path:
    """The folder of programs of the engines' environment."""
    if not (ENGINES / ".installed").is_file():
        pytest.skip(f"no engines in {ENGINES}: run `make engines`")
    return ENGINES / Path(sysconfig.get_path("scripts")).name


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an engine runs in: nothing of this package on its path."""
    home = {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm"))}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS | home


@pytest.fixture(scope="session")
def ask(engines: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Run a script of this folder on jobs; skips, with the end of what it said, where the engine cannot start."""

    def run(script: str, jobs: list[dict[str, Any]]) -> list[Any]:
        folder = tmp_path_factory.mktemp("answers")
        answers = folder / "answers.json"
        with (folder / "log").open("w") as log:
            subprocess.run(
                [engines / "python", HERE / script, answers],
                input=json.dumps(jobs),
                text=True,
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=log,
                check=False,
            )
        if not answers.is_file():
            pytest.skip(f"{script}: the engine cannot start here: {(folder / 'log').read_text()[-2000:]}")
        found = json.loads(answers.read_text())
        ended = {"error": f"the engine ended before this: {(folder / 'log').read_text()[-2000:]}"}
        return found + [ended] * (len(jobs) - len(found))

    return run
