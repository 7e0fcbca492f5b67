"""Mutation testing: a seeded sample of small wrong changes to the sources, each of which some test should see.

``python -m tools.mutants --count 210 --seed 2`` takes up where it stopped and writes ``tests/mutants.md``. The changes
are Cosmic Ray's, and keyword arguments left out; its own runner starts an interpreter a change and cannot draw a
sample, so this one forks: each change is made in a copy of the checkout and tried in a child that has PyTorch and
Transformers imported already, by the tests that mirror the module.
"""

import argparse
import ast
import difflib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cosmic_ray.operators.operator
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

CHECKOUT = Path(__file__).resolve().parent.parent
STATE = CHECKOUT / "tests" / "mutants.jsonl"
REPORT = CHECKOUT / "tests" / "mutants.md"
PACKAGES = ("decompositions", "allocation", "calibration", "methods", "evaluation", "records", "analysis")

ALSO = {
    "modegpt/calibration/statistics.py": ("calibration/test_calibration.py",),
    "modegpt/calibration/stream.py": ("calibration/test_calibration.py",),
    "modegpt/decompositions/modules.py": ("decompositions/test_*.py",),
    "modegpt/decompositions/selection.py": ("decompositions/test_*.py",),
    "modegpt/evaluation/harness_model.py": ("evaluation/test_zeroshot.py",),
    "modegpt/evaluation/isolation.py": ("evaluation/test_zeroshot.py",),
    "modegpt/evaluation/likelihood.py": ("evaluation/test_*.py",),
    "modegpt/evaluation/spec.py": ("evaluation/test_evaluate.py", "evaluation/test_zeroshot.py"),
    "modegpt/evaluation/tasks.py": ("evaluation/test_local_tasks.py", "evaluation/test_zeroshot.py"),
    "modegpt/methods/base.py": ("methods/test_choices.py", "methods/test_identity.py"),
    "modegpt/methods/controls.py": ("methods/test_choices.py", "methods/test_identity.py"),
    "modegpt/methods/layer_dropping.py": ("methods/test_shortgpt.py", "methods/test_sleb.py"),
    "modegpt/methods/low_rank.py": ("methods/test_svd.py", "methods/test_asvd.py", "methods/test_svd_llm.py"),
    "modegpt/methods/modegpt.py": ("methods/test_choices.py",),
    "modegpt/methods/registry.py": ("methods/test_choices.py", "methods/test_identity.py"),
    "modegpt/methods/structures.py": ("methods/test_llm_pruner.py", "methods/test_llm_surgeon.py"),
    "modegpt/records/archive.py": ("records/test_packing.py", "records/test_store.py"),
    "modegpt/records/benchmark.py": ("records/test_summary.py",),
    "modegpt/records/cli.py": ("records/test_records_cli.py",),
    "modegpt/records/paths.py": ("records/test_store.py",),
    "modegpt/records/scores.py": ("records/test_summary.py", "records/test_frame.py"),
}
"""Tests, beside the one of its name, of modules whose tests are called otherwise."""

PLUS = {"cutting": ("nested",), "method": ("kept_costs",), "streams": ("sums", "query_key")}
"""The tests, ``test_plus_<name>.py``, of modules of plus that share one with another."""

HEAVY = ("torch", "transformers", "pandas", "matplotlib.pyplot", "pydantic", "omegaconf", "jinja2", "pytest")
"""What children need not import again."""
MOST_BYTES = 12 << 30


class LeaveOutKeyword(cosmic_ray.operators.operator.Operator):
    """An operator that leaves a keyword argument out of a call."""

    def mutation_positions(self, node: Any) -> Iterator[tuple]:
        """Of each keyword argument."""
        for argument in self._keywords(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Without the argument and the comma that parts it from the others."""
        place = node.children.index(self._keywords(node)[index])
        commas = [each for each in (place + 1, place - 1) if self._is(node.children[each : each + 1], ",")]
        for each in sorted((place, *commas[:1]), reverse=True):
            del node.children[each]
        return node

    @staticmethod
    def _is(nodes: list, value: str) -> bool:
        return [getattr(node, "value", "") for node in nodes] == [value]

    @staticmethod
    def _keywords(node: Any) -> list:
        if node.type not in ("arglist", "trailer"):
            return []
        return [
            each for each in node.children if each.type == "argument" and getattr(each.children[1], "value", "") == "="
        ]

    @classmethod
    def examples(cls) -> tuple:
        """None beside the tests."""
        return ()


@dataclass(frozen=True)
class Mutant:
    """A change: the ``occurrence``-th place of ``operator`` in module ``path``; ``line``, ``change`` for readers."""

    path: str
    operator: str
    occurrence: int
    line: int
    change: str


def operators() -> dict[str, Any]:
    """Every operator without arguments, by name, but those that no test can see: ``is`` for ``==``, which is the same
    for small integers and short words.
    """
    provider = OperatorProvider()
    found = {
        name: provider[name]
        for name in provider
        if not provider[name].arguments() and not name.endswith(("_Eq_Is", "_NotEq_IsNot"))
    }
    return {name: operator() for name, operator in found.items()} | {"LeaveOutKeyword": LeaveOutKeyword()}


OPERATORS = operators()


def modules() -> list[str]:
    """The modules that are changed."""
    listing = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    folders = tuple(f"modegpt/{package}/" if package != "analysis" else "analysis/" for package in PACKAGES)
    return [path for path in listing.split() if path.startswith(folders) and path.endswith(".py")]


def tests_of(path: str) -> list[str]:
    """The tests that mirror the module ``path``."""
    place = Path(path).relative_to("modegpt") if path.startswith("modegpt/") else Path(path)
    patterns = [f"{place.parent}/test_{place.stem}.py", *ALSO.get(path, ())]
    if place.parts[0] == "analysis":
        patterns = ["analysis/test_[!b]*.py"]
    if place.parts[:2] == ("methods", "plus"):
        patterns = [f"methods/test_plus_{each}.py" for each in (place.stem, *PLUS.get(place.stem, ()))]
        patterns += [] if place.stem in ("cutting", "nested", "temperature") else ["methods/test_plus.py"]
    if place.parts[0] in ("methods", "decompositions", "allocation"):
        patterns.append("methods/test_choices.py")
    found = [
        str(test.relative_to(CHECKOUT)) for pattern in patterns for test in sorted((CHECKOUT / "tests").glob(pattern))
    ]
    return list(dict.fromkeys(found))


def annotations(source: str) -> set[tuple[int, int]]:
    """Lines and columns of what stands in an annotation, which nothing evaluates for its value."""
    places: set[tuple[int, int]] = set()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                last = annotation.end_lineno
                for line in range(annotation.lineno, last + 1):
                    start = annotation.col_offset if line == annotation.lineno else 0
                    end = annotation.end_col_offset if line == last else len(lines[line - 1])
                    places |= {(line, column) for column in range(start, end)}
    return places


UNSEEN = ("strict", "frozen", "device")
"""Arguments that change nothing where the code is right, or where there is no GPU."""


def unseen(source: str) -> set[tuple[int, int]]:
    """Lines and columns of ``UNSEEN`` arguments and of their values."""
    return {
        place
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword) and node.arg in UNSEEN
        for place in ((node.lineno, node.col_offset), (node.value.lineno, node.value.col_offset))
    }


def places(path: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """By line and column, the changes that can be made there: operator and occurrence."""
    source = (CHECKOUT / path).read_text(encoding="utf-8")
    nodes, excluded = list(ast_nodes(get_ast(source))), annotations(source) | unseen(source)
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name, operator in OPERATORS.items():
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if start not in excluded:
                found.setdefault(start, []).append((name, occurrence))
    return found


def mutated(path: str, operator: str, occurrence: int) -> str | None:
    """The source of ``path`` with the change; None where it is none, or no Python."""
    source = (CHECKOUT / path).read_text(encoding="utf-8")
    changed = mutate_code(source, OPERATORS[operator], occurrence)
    try:
        same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    return None if same else changed


def change_of(path: str, changed: str) -> str:
    """The changed lines, before and after."""
    before = (CHECKOUT / path).read_text(encoding="utf-8").splitlines()
    marked = [line for line in difflib.ndiff(before, changed.splitlines()) if line[:2] in ("- ", "+ ")]
    old, new = (" ".join(line[2:].strip() for line in marked if line[0] == sign) for sign in "-+")
    return f"{old} -> {new}"


def sample(count: int, seed: int, packages: Iterable[str]) -> list[Mutant]:
    """``count`` changes at as many places, drawn alike from all of ``packages``; at each place one of the operators."""
    paths = [path for path in modules() if path.startswith(tuple(packages))]
    everywhere = [(path, start, choices) for path in paths for start, choices in sorted(places(path).items())]
    drawn, chance = [], random.Random(seed)
    for path, start, choices in chance.sample(everywhere, len(everywhere)):
        operator, occurrence = chance.choice(choices)
        changed = mutated(path, operator, occurrence)
        if changed is not None:
            drawn.append(Mutant(path, operator, occurrence, start[0], change_of(path, changed)))
        if len(drawn) == count:
            break
    return drawn


def copied(destination: Path) -> None:
    """The files of the project as they are now."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listing.split("\0")):
        if (CHECKOUT / name).is_file() or (CHECKOUT / name).is_symlink():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, destination / name, follow_symlinks=False)


def put(module: Path, source: str) -> None:
    """Make ``source`` that of ``module``, of which nothing compiled is left."""
    module.write_text(source, encoding="utf-8")
    for compiled in module.parent.glob(f"__pycache__/{module.stem}.*"):
        compiled.unlink()


def attempt(tree: Path, tests: list[str], cpu_seconds: int, log: Path) -> tuple[str, float]:
    """Run ``tests`` in a child inside ``tree``: ``passed``, ``failed`` or ``timeout``, and its processor time."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(tree, tests, cpu_seconds, log)
    _, status, usage = _waited(child, deadline=started + 20 * cpu_seconds)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests have left
    seconds = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        return ("timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "failed"), seconds
    code = os.WEXITSTATUS(status)
    if code not in (0, 1, 2, 3):
        sys.exit(f"pytest ended with {code} on {' '.join(tests)}: see {log}")
    return ("passed" if code == 0 else "failed"), seconds


def _waited(child: int, *, deadline: float) -> tuple[int, int, resource.struct_rusage]:
    while True:
        ended = os.wait4(child, os.WNOHANG)
        if ended[0]:
            return ended
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)


def _child(tree: Path, tests: list[str], cpu_seconds: int, log: Path) -> None:
    """Never returns."""
    import pytest

    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
        with open(log, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        sys.path[:] = [str(tree), *(place for place in sys.path if Path(place or ".").resolve() != CHECKOUT)]
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tests'}", *tests])
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        os._exit(3)


def tried(state: Path) -> list[dict[str, Any]]:
    """What ``state`` holds: baselines of tests and outcomes of mutants."""
    if not state.exists():
        return []
    return [json.loads(line) for line in state.read_text(encoding="utf-8").splitlines()]


def run(mutants: list[Mutant], state: Path) -> None:
    """Try each of ``mutants`` that ``state`` does not know yet."""
    for name in HEAVY:
        __import__(name)
    done = tried(state)
    needs = {entry["test"]: entry["seconds"] for entry in done if "test" in entry}
    known = {(entry["path"], entry["operator"], entry["change"]) for entry in done if "outcome" in entry}

    def note(entry: dict[str, Any]) -> None:
        with state.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, log = Path(folder) / "checkout", Path(folder) / "log"
        copied(tree)
        for number, mutant in enumerate(mutants, 1):
            if (mutant.path, mutant.operator, mutant.change) in known:
                continue
            tests = tests_of(mutant.path)
            for test in tests:
                if test not in needs:
                    outcome, needs[test] = attempt(tree, [test], 1200, log)
                    if outcome != "passed":
                        sys.exit(f"{test} fails without any change:\n{log.read_text()[-3000:]}")
                    note({"test": test, "seconds": round(needs[test], 1)})
            changed = mutated(mutant.path, mutant.operator, mutant.occurrence)
            assert changed is not None
            put(tree / mutant.path, changed)
            outcome, seconds = attempt(tree, tests, int(2 * sum(needs[test] for test in tests)) + 20, log)
            put(tree / mutant.path, (CHECKOUT / mutant.path).read_text(encoding="utf-8"))
            note({**asdict(mutant), "outcome": {"passed": "survived"}.get(outcome, "killed"), "why": ""})
            print(
                f"{number}/{len(mutants)} {outcome} {seconds:.0f} s {mutant.path}:{mutant.line} {mutant.change[:150]}",
                flush=True,
            )


def package_of(path: str) -> str:
    """The package of ``PACKAGES`` that a module is in."""
    return next(part for part in Path(path).parts if part in PACKAGES)


def wrapped(text: str, *, hang: str = "") -> list[str]:
    """Lines no wider than the page; ``hang`` starts all but the first."""
    return textwrap.wrap(text, 118, subsequent_indent=hang, break_on_hyphens=False)


def report(mutants: list[Mutant], seed: int, state: Path) -> str:
    """The page: killed by package, and the survivors."""
    drawn_now = {(mutant.path, mutant.operator, mutant.change) for mutant in mutants}
    outcomes = [
        entry for entry in tried(state)
        if "outcome" in entry and (entry["path"], entry["operator"], entry["change"]) in drawn_now
    ]  # fmt: skip
    drawn = Counter(package_of(entry["path"]) for entry in outcomes)
    survivors = [entry for entry in outcomes if entry["outcome"] == "survived"]
    left = Counter(package_of(entry["path"]) for entry in survivors)
    killed = len(outcomes) - len(survivors)
    lines = [
        "# Small wrong changes, and whether the tests see them",
        "",
        *wrapped(
            f"`make mutants` drew {len(mutants)} changes with seed {seed} and tried {len(outcomes)} of them so far, "
            f"each by the tests that mirror its module: {killed} were killed ({killed / max(len(outcomes), 1):.0%})."
        ),
        "",
        "| package | changes | killed |",
        "|---|---|---|",
        *(f"| {package} | {drawn[package]} | {drawn[package] - left[package]} |" for package in PACKAGES),
        "",
        "## Survivors",
        "",
    ]
    for entry in survivors:
        lines += wrapped(f"- `{entry['path']}`, line {entry['line']}: {entry['why'] or 'not looked at'}", hang="  ")
        lines += ["  ```diff"]
        for sign, part in zip("-+", entry["change"].split(" -> ", 1), strict=True):
            lines += wrapped(f"  {sign}{part}", hang=f"  {sign}    ")
        lines += ["  ```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try a sample and report it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=210, help="how many changes")
    parser.add_argument("--seed", type=int, default=2, help="of the sample")
    parser.add_argument(
        "--in", dest="packages", nargs="*", default=["modegpt/", "analysis/"], help="paths that start so"
    )
    parser.add_argument("--state", type=Path, default=STATE, help="what was tried so far")
    arguments = parser.parse_args()
    mutants = sample(arguments.count, arguments.seed, arguments.packages)
    run(mutants, arguments.state)
    page = report(mutants, arguments.seed, arguments.state)
    if arguments.state == STATE:
        REPORT.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
