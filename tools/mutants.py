"""Mutation testing: a seeded sample of small wrong changes to the sources, each of which some test should see.

``python -m tools.mutants --count 210 --seed 5`` takes up where it stopped and writes ``tests/mutants.md``. The changes
are Cosmic Ray's, and keyword arguments left out; its own runner starts an interpreter a change and cannot draw a
sample, so this one forks: each change is made in a copy of the checkout and tried in a child that has PyTorch and
Transformers imported already. The first run without a change learns which tests execute which line and how long each
takes (``build/mutants.jsonl``); a change is tried by the tests that execute its line, until one fails.
"""

import argparse
import ast
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import cosmic_ray.operators.operator
import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

CHECKOUT = Path(__file__).resolve().parent.parent
STATE = CHECKOUT / "tests" / "mutants.jsonl"
LEARNED = CHECKOUT / "build" / "mutants.jsonl"
REPORT = CHECKOUT / "tests" / "mutants.md"
PACKAGES = ("decompositions", "allocation", "calibration", "methods", "evaluation", "records", "analysis")

WARM = ("analysis.__main__", "modegpt.run", "modegpt.cli.main", "tests.models.family_table", "matplotlib.pyplot")
"""Whatever these import from outside the checkout, children need not import again."""
ENOUGH_SECONDS = 60
"""Processor time of the tests that a change is tried by."""
ALL = "all"
"""The context of what a test runs outside its call."""
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
    return [path for path in listing.split() if path.startswith(folders_of(PACKAGES)) and path.endswith(".py")]


def folders_of(packages: Iterable[str]) -> tuple[str, ...]:
    """Where they are."""
    return tuple(f"modegpt/{package}/" if package != "analysis" else "analysis/" for package in packages)


UNSEEN = ("strict", "frozen", "kw_only", "device", "stacklevel")
"""Arguments that change nothing where the code is right, or where there is no GPU."""
LOOKS = ("figsize", "layout", "width", "linewidth", "fontsize", "edgecolor", "nbins", "indent")
"""Arguments that change how a picture or a file looks, not what it says."""


def unseen(source: str) -> set[tuple[int, int]]:
    """Lines and columns that no test can see: annotations, which nothing evaluates for its value, the ``UNSEEN`` and
    ``LOOKS`` arguments, and what decorates a class without fields.
    """
    nodes: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        nodes += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.keyword) and node.arg in UNSEEN + LOOKS:
            nodes.append(node)
        if isinstance(node, ast.ClassDef) and not any(isinstance(each, ast.AnnAssign) for each in node.body):
            nodes += node.decorator_list
    lines, places = source.splitlines(), set()
    for node in filter(None, nodes):
        for line in range(node.lineno, node.end_lineno + 1):
            start = node.col_offset if line == node.lineno else 0
            end = node.end_col_offset if line == node.end_lineno else len(lines[line - 1])
            places |= {(line, column) for column in range(start, end)}
    return places


def places(path: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """By line and column, the changes that can be made there: operator and occurrence."""
    source = (CHECKOUT / path).read_text(encoding="utf-8")
    nodes, excluded = list(ast_nodes(get_ast(source))), unseen(source)
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    starts: dict[str, list[tuple[int, int]]] = {}
    for name, operator in OPERATORS.items():
        replaced = name.rpartition("_")[0] or name  # whatever replaces it, it stands at the same places
        if replaced not in starts:
            starts[replaced] = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts[replaced]):
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
    sides = [(CHECKOUT / path).read_text(encoding="utf-8").splitlines(), changed.splitlines()]
    for end in (0, -1):
        while sides[0] and sides[1] and sides[0][end] == sides[1][end]:
            del sides[0][end], sides[1][end]
    return " -> ".join(" ".join(line.strip() for line in side) for side in sides)


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
    destination.mkdir()
    listed = "git ls-files -z --cached --others --exclude-standard"
    command = f"{listed} | tar -c --null --ignore-failed-read -T - | tar -x -C {destination}"
    subprocess.run(command, shell=True, cwd=CHECKOUT, stderr=subprocess.DEVNULL, check=True)


def put(module: Path, source: str) -> None:
    """Make ``source`` that of ``module``, of which nothing compiled is left."""
    module.write_text(source, encoding="utf-8")
    for compiled in module.parent.glob(f"__pycache__/{module.stem}.*"):
        compiled.unlink()


def cpu_seconds() -> float:
    """Processor time of this process and of the children that ended."""
    return sum(os.times()[:4])


class Learner:
    """A plugin of pytest: the processor time of every test, and the tests that run each line of ``PACKAGES``.

    What a test's fixtures run counts for all tests of its file, which may share them. Lines run at import have no test.
    """

    def __init__(self, tree: Path, found: Path) -> None:
        self.tree, self.found, self.seconds = tree, found, dict[str, float]()
        folders = [str(tree / folder / "*") for folder in folders_of(PACKAGES)]
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=folders)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Time it, and what is outside its call is of the whole file."""
        started = cpu_seconds()
        self.coverage.switch_context(ALL)
        result = yield
        self.coverage.switch_context("")
        self.seconds[item.nodeid] = round(cpu_seconds() - started, 2)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        """What is in its call is its own."""
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.coverage.switch_context(ALL)
        return result

    def pytest_sessionfinish(self) -> None:
        """Write ``found``: the seconds by test and, by module and line, which of these tests."""
        self.coverage.stop()
        data, place = self.coverage.get_data(), {test: index for index, test in enumerate(self.seconds)}
        lines = {
            str(Path(path).relative_to(self.tree)): {
                line: list(place.values()) if ALL in tests else [place[test] for test in tests if test]
                for line, tests in data.contexts_by_lineno(path).items()
                if any(tests)
            }
            for path in data.measured_files()
        }
        self.found.write_text(json.dumps({"seconds": self.seconds, "lines": lines}), encoding="utf-8")


class Chosen:
    """A plugin of pytest: these tests alone, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.tests = tests

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep them."""
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[test] for test in self.tests if test in by_name]


class KnownTests:
    """What is known of the tests: ``seconds`` of each, and the ``lines`` of each module that they run."""

    def __init__(self, tree: Path, log: Path) -> None:
        """Take what ``LEARNED`` holds of this checkout and learn the rest, a test file a child."""
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = {}
        known = {(entry["file"], entry["key"]): entry for entry in tried(LEARNED)}
        others = [path for folder in ("analysis", "modegpt", "tests") for path in sorted((tree / folder).rglob("*.py"))]
        shared = b"".join(path.read_bytes() for path in others if not path.name.startswith("test_"))
        for path in (path for folder in PACKAGES for path in sorted((tree / "tests" / folder).glob("test_*.py"))):
            file = str(path.relative_to(tree))
            key = hashlib.sha256(shared + path.read_bytes()).hexdigest()
            self._add(known.get((file, key)) or self._learned(tree, file, key, log))

    @staticmethod
    def _learned(tree: Path, file: str, key: str, log: Path) -> dict[str, Any]:
        found = tree.parent / "found"
        passed, seconds = attempt(tree, [file], lambda: Learner(tree, found), 1200, log)
        if not passed:
            sys.exit(f"{file} fails without any change:\n{log.read_text()[-3000:]}")
        print(f"{seconds:.0f} s {file}", flush=True)
        entry = {"file": file, "key": key, **json.loads(found.read_text(encoding="utf-8"))}
        noted(LEARNED, entry)
        return entry

    def _add(self, entry: dict[str, Any]) -> None:
        self.seconds |= entry["seconds"]
        tests = list(entry["seconds"])
        for path, lines in entry["lines"].items():
            for line, places in lines.items():
                self.lines.setdefault(path, {}).setdefault(int(line), set()).update(tests[place] for place in places)

    def of(self, path: str, line: int, source: str) -> list[str]:
        """The tests to try a change by: those that run its statement, or else its function, or else its module and the
        rest of its package (what is run at import). Files named after the module come first, then the quickest.
        """
        lines = self.lines.get(path, {})
        for first, last in ranges(source, line):
            found = set().union(*(lines.get(each, ()) for each in range(first, last + 1)))
            if found:
                break
        else:
            near = f"tests/{package_of(path)}/"
            found = set().union(*lines.values(), (test for test in self.seconds if test.startswith(near)))
        stem = Path(path).stem
        quickest = sorted(found, key=lambda test: (stem not in test.split("::")[0], self.seconds[test]))
        spent = accumulate(self.seconds[test] for test in quickest)
        return [test for test, seconds in zip(quickest, spent, strict=True) if seconds <= ENOUGH_SECONDS]


def ranges(source: str, line: int) -> list[tuple[int, int]]:
    """First and last lines of the statement at ``line``, of a compound one its head; and of the function around it."""
    around = [
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and first_line(node) <= line <= (node.end_lineno or 0)
    ]  # fmt: skip
    found = []
    if around:
        body = getattr(around[-1], "body", None)
        found.append((first_line(around[-1]), body[0].lineno - 1 if body else around[-1].end_lineno or 0))
    functions = [node for node in around if isinstance(node, ast.FunctionDef)]
    return found + [(node.lineno, node.end_lineno or 0) for node in functions[-1:]]


def first_line(node: ast.stmt) -> int:
    """With its decorators."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])


def attempt(
    tree: Path, files: list[str], plugin: Callable[[], object], most_seconds: int, log: Path
) -> tuple[bool, float]:
    """Run pytest on ``files`` in a child inside ``tree``: whether all passed, and its processor time."""
    child = os.fork()
    if child == 0:
        _child(tree, files, plugin, most_seconds, log)
    _, status, usage = os.wait4(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests have left
    return status == 0, usage.ru_utime + usage.ru_stime


def _child(tree: Path, files: list[str], plugin: Callable[[], object], most_seconds: int, log: Path) -> None:
    """Never returns."""
    try:
        os.setsid()
        signal.alarm(20 * most_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
        with open(log, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        sys.path[:] = [str(tree), *(place for place in sys.path if Path(place or ".").resolve() != CHECKOUT)]
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tests'}"]
        code = pytest.main([*options, *files], plugins=[plugin()])
        sys.stdout.flush()
        os._exit(code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))
    except BaseException:
        os._exit(1)


def tried(state: Path) -> list[dict[str, Any]]:
    """What ``state`` holds, a line each."""
    if not state.exists():
        return []
    return [json.loads(line) for line in state.read_text(encoding="utf-8").splitlines()]


def noted(state: Path, entry: dict[str, Any]) -> None:
    """Add ``entry`` to ``state``."""
    state.parent.mkdir(exist_ok=True)
    with state.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def warm_up() -> None:
    """Import what the checkout imports from outside, once for all children."""
    command = f"import sys, {', '.join(WARM)}; print(*sys.modules)"
    listing = subprocess.run([sys.executable, "-c", command], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for name in listing.stdout.split():
        if name.split(".")[0] not in ("analysis", "modegpt", "tests", "tools"):
            with suppress(Exception):
                importlib.import_module(name)


def run(mutants: list[Mutant], state: Path) -> None:
    """Try each of ``mutants`` that ``state`` does not know yet."""
    warm_up()
    known = {(entry["path"], entry["operator"], entry["change"]) for entry in tried(state)}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, log = Path(folder) / "checkout", Path(folder) / "log"
        copied(tree)
        tests = KnownTests(tree, log)
        for number, mutant in enumerate(mutants, 1):
            if (mutant.path, mutant.operator, mutant.change) in known:
                continue
            source = (CHECKOUT / mutant.path).read_text(encoding="utf-8")
            changed = mutated(mutant.path, mutant.operator, mutant.occurrence)
            assert changed is not None
            chosen = tests.of(mutant.path, mutant.line, source)
            planned = sum(tests.seconds[test] for test in chosen)
            files = list(dict.fromkeys(test.split("::")[0] for test in chosen))
            put(tree / mutant.path, changed)
            passed, seconds = attempt(tree, files, partial(Chosen, chosen), int(2 * planned) + 30, log)
            put(tree / mutant.path, source)
            outcome = "survived" if passed else "killed"
            noted(state, {**asdict(mutant), "outcome": outcome, "why": ""})
            spent = f"{seconds:.0f} of {planned:.0f} s, {len(chosen)} tests"
            print(f"{number}/{len(mutants)} {outcome} {spent} {mutant.path}:{mutant.line} {mutant.change}", flush=True)


def package_of(path: str) -> str:
    """The package of ``PACKAGES`` that a module is in."""
    return next(part for part in Path(path).parts if part in PACKAGES)


def wrapped(text: str, *, hang: str = "") -> list[str]:
    """Lines no wider than the page; ``hang`` starts all but the first."""
    return textwrap.wrap(text, 118, subsequent_indent=hang, break_on_hyphens=False)


ALIKE = ("the same", "only")
"""How the reasons of survivors begin that no test should kill."""
SINCE = "tested since"
"""How they begin where a test was written for it, or one was found that does not run the line itself."""


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
    alike, since = (sum(entry["why"].startswith(how) for entry in survivors) for how in (ALIKE, SINCE))
    lines = [
        "# Small wrong changes, and whether the tests see them",
        "",
        *wrapped(
            f"`make mutants` drew {len(mutants)} changes with seed {seed} and tried {len(outcomes)} of them so far, "
            f"each by the tests that run its line: {killed} were killed ({killed / max(len(outcomes), 1):.0%}). "
            f"Of the others {alike} are the same program, or differ only in looks or cost; of all that a test could "
            f"see, {killed / max(len(outcomes) - alike, 1):.0%} were killed. Of the rest {since} have their test since."
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
    parser.add_argument("--seed", type=int, default=5, help="of the sample")
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
