"""A wheel holds everything a run needs, and works from any directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_wheel_runs_anywhere(repository: Path, tmp_path: Path) -> None:
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "else where"
    source.mkdir()
    elsewhere.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for name in ("modegpt", "conf"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)],
        cwd=source,
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)

    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"modegpt", "bin"}
    needed = {
        path.relative_to(source).as_posix()
        for folder, pattern in (("modegpt", "*"), ("conf", "*.yaml"))
        for path in (source / folder).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    installed = {
        path.relative_to(target).as_posix().replace("modegpt/conf/", "conf/")
        for path in (target / "modegpt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert installed == needed and "modegpt/py.typed" in installed

    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [
        sys.executable,
        "-c",
        "import sys, modegpt.cli.main as m; print(m.__file__); sys.exit(m.main(['--help']))",
    ]
    helped = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith(str(target)) and "decomposition/mlp: " in helped.stdout
