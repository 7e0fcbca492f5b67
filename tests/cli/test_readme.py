"""Every command and every setting in the README, in CONTRIBUTING and in the pages of docs/ is one that works."""

import contextlib
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from modegpt.cli import cut, export
from modegpt.records import cli as records

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
EVERY_PAGE = [
    *PAGES,
    REPOSITORY / "CHANGELOG.md",
    *sorted(page for page in REPOSITORY.glob("[!.]*/**/*.md") if page not in PAGES),
]
"""The Markdown outside ``docs`` too: results, examples."""
GROUPS = (
    "model",
    "method",
    "decomposition",
    "allocation",
    "calibration",
    "recovery",
    "evaluation",
    "tracking",
    "engine",
)
SECTIONS = ("compression", "output", "cache", "out_of_core", "seed", "threads", "quiet")
SETTING = re.compile(rf"'?\+?(?:{'|'.join(GROUPS + SECTIONS)})[\w/.]*=\S")
PROGRAMS = {"modegpt-records": records.main, "modegpt-cut": cut.main, "modegpt-export": export.main}
ELSEWHERE = ("lm_eval run", "git clone", "cd ", "pre-commit ", "wandb sync ")
"""How commands of other programs begin, which are not checked."""


def shell_lines(pages: Iterable[Path] = PAGES) -> list[str]:
    """Every command of every ``sh`` block, its continuation lines joined and its comment cut."""
    blocks = [
        block for page in pages for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    ]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def settings(pages: Iterable[Path] = PAGES) -> list[str]:
    """Every inline piece of code that sets something, such as ``method=slicegpt`` or ``compression.sparsity=0.4``."""
    texts = [re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S) for page in pages]
    return sorted({code for text in texts for code in re.findall(r"`([^`\n]+)`", text) if SETTING.match(code)})


COMMANDS = list(dict.fromkeys(shell_lines()))
OWN = [line for line in COMMANDS if re.match(r"(\.venv/bin/)?modegpt |torchrun .* -m modegpt ", line)]
SWEEPS = [line for line in OWN if "--multirun" in line]


def arguments_of(line: str) -> list[str]:
    """What follows the program's name."""
    return shlex.split(re.sub(r"^.*?\bmodegpt ", "", line), comments=True)


def test_each_page_is_read() -> None:
    assert len(settings()) > 30 and len(OWN) > 15 and len(SWEEPS) > 5


@pytest.mark.parametrize("line", [line for line in OWN if line not in SWEEPS])
def test_command(job: Callable, line: str) -> None:
    arguments = arguments_of(line)
    code, calls = job(*arguments)
    assert code == 0 and len(calls) == (not {"--help", "--cfg"} & set(arguments))


def together(found: Iterable[str]) -> list[str]:
    """Commands that make all of these settings, in each at most one of a group or section: few are quicker."""
    commands: list[dict[str, str]] = []
    for setting in found:
        section = re.split(r"[./=]", setting.lstrip("'+"), maxsplit=1)[0]
        whole = f"method=modegpt_plus {setting}" if section == "method" and "method=" not in setting else setting
        free = next((command for command in commands if section not in command), None)
        if free is None or " " in setting:
            commands.append(free := {})
        free[section] = whole
    return [" ".join(command.values()) for command in commands]


@pytest.mark.parametrize("line", together(settings()))
def test_settings(job: Callable, line: str) -> None:
    code, calls = job(*shlex.split(line))
    assert code == 0 and len(calls) == 1


@pytest.mark.parametrize("line", SWEEPS)
def test_sweep_composes(job: Callable, line: str, tmp_path: Path) -> None:
    """Each as a sweep in this process, its launcher's configuration apart; an experiment, whose jobs
    ``tests/experiments`` composes, as one job.
    """
    arguments = arguments_of(line)
    own = [argument for argument in arguments if not argument.startswith("hydra")]
    if "+experiments=" in line:
        assert job(*(argument for argument in own if argument != "--multirun"), "--cfg", "job")[0] == 0
    else:
        code, calls = job(*own, f"output.root={tmp_path}")
        assert code == 0 and len(calls) > 1
    launcher = [argument for argument in arguments if argument.startswith("hydra")]
    assert job("--cfg", "hydra", "-p", "hydra.launcher", *launcher)[0] == 0


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in OWN])
def test_other_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line, comments=True)
    program = program.removeprefix(".venv/bin/")
    if program in PROGRAMS:
        monkeypatch.chdir(tmp_path)
        with contextlib.suppress(FileNotFoundError):  # of the placeholders; argparse would raise SystemExit
            PROGRAMS[program](arguments)
    elif program == "make":
        assert subprocess.run(["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True).returncode == 0
    elif arguments[:2] == ["-m", "pytest"]:
        for name in (argument for argument in arguments if argument.startswith("tests")):
            check_test_exists(name)
    elif program == "python":
        script = REPOSITORY / arguments[0]
        assert script.exists()
        source = "".join(path.read_text("utf-8") for path in script.parent.glob("*.py"))  # scripts share some options
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert re.search(rf"[\"'](--)?{option.removeprefix('--')}[\"']", source), option
    elif program == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        named = re.findall(r"\[(.*?)\]", line)
        assert {extra for names in named for extra in names.split(",")} <= extras.keys()
    elif program in ("ruff", "mypy", "mkdocs"):
        assert program in (REPOSITORY / "constraints.txt").read_text("utf-8")
    else:
        assert line.startswith(ELSEWHERE), f"nothing checks {line!r}"


def check_test_exists(name: str) -> None:
    path, *function = name.split("::")
    assert (REPOSITORY / path).exists(), path
    assert all(f"def {each}(" in (REPOSITORY / path).read_text("utf-8") for each in function), name


@pytest.mark.parametrize("code", list(dict.fromkeys([*shell_lines(EVERY_PAGE), *settings(EVERY_PAGE)])))
def test_quoted_for_zsh(code: str) -> None:
    """An open bracket, star or question mark outside quotes is a pattern to zsh, which stops where nothing matches."""
    assert not re.search(r"[\[*?]", re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", code))
