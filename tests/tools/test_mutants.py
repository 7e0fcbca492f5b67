"""What is changed by ``make mutants``, and what is reported of it."""

import ast
import json
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="pip install -e '.[mutants]'")
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from tools import mutants
from tools.mutants import KnownTests, LeaveOutKeyword, Mutant, mutated, ranges, report, sample, unseen


@pytest.mark.parametrize(
    ("call", "without"),
    [
        ("f(a, b=1)", ["f(a)"]),
        ("f(b=1)", ["f()"]),
        ("f(a=1, b=2, c=3)", ["f(b=2, c=3)", "f(a=1, c=3)", "f(a=1, b=2)"]),
        ("f(a=1,)", ["f()"]),
        ("f(*a, **b)", []),
    ],
)
def test_keyword_arguments_are_left_out_one_at_a_time(call: str, without: list[str]) -> None:
    operator = LeaveOutKeyword()
    found = sum(1 for node in ast_nodes(get_ast(call)) for _ in operator.mutation_positions(node))
    changed = [mutate_code(call, operator, occurrence) for occurrence in range(found)]
    assert [ast.unparse(ast.parse(each)) for each in changed] == without


def test_what_no_test_can_see_is_left_alone() -> None:
    source = "def f(x: int | None, *, y: int = 1 - 2) -> int | None:\n    return g(x, strict=True, width=2, z=not y)\n"
    places, (first, second) = unseen(source), source.splitlines()
    assert {(1, first.index("|")), (1, first.rindex("|"))} <= places
    assert (1, first.index("-")) not in places and (2, second.index("not")) not in places
    assert {(2, second.index("strict")), (2, second.index("True")), (2, second.index("2"))} <= places
    decorated = "@dataclass(frozen=True)\nclass A(B):\n    def f(self): ...\n"
    assert (1, 1) in unseen(decorated) and (1, 1) not in unseen(decorated.replace("def", "x: int = 1\n    def"))


def test_a_sample_is_that_of_its_seed_and_each_of_it_another_program() -> None:
    packages = ["modegpt/allocation/influence.py", "modegpt/decompositions/cr.py"]
    first, again, other = (sample(20, seed, packages) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 20
    for mutant in first:
        changed = mutated(mutant.path, mutant.operator, mutant.occurrence)
        assert changed is not None and mutant.path in packages
        before = (mutants.CHECKOUT / mutant.path).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(before))


def test_a_change_is_tried_by_what_runs_its_statement_or_else_its_function() -> None:
    lines = (
        "@cached",
        "def f(",
        "    x=1,",
        "):",
        "    if (",
        "        x",
        "    ):",
        "        return g(",
        "x",
        ")",
        "",
        "Y = 2",
    )
    source = "\n".join(lines)
    assert ranges(source, 9) == [(8, 10), (2, 10)], "the whole of a call over several lines"
    assert ranges(source, 6)[0] == (5, 7), "of a condition, not what it guards"
    assert ranges(source, 3) == [(1, 4), (2, 10)], "a default is made at import: whatever runs the function"
    assert ranges(source, 12) == [(12, 12)]


def test_the_quickest_tests_of_a_line_come_first_and_those_named_after_the_module_before_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, tests = "def f():\n    return 1\n\nY = 2\n", KnownTests.__new__(KnownTests)
    slow, quick, other, own = (f"tests/records/test_{name}.py::t" for name in ("a", "b", "c", "cli"))
    tests.seconds = {slow: 50.0, quick: 1.0, other: 2.0, own: 5.0}
    tests.lines = {"modegpt/records/cli.py": {2: {slow, quick, own}}}
    assert tests.of("modegpt/records/cli.py", 2, source) == [own, quick, slow]
    assert tests.of("modegpt/records/cli.py", 4, source) == [own, quick, other, slow], "at import: all of the package"
    monkeypatch.setattr(mutants, "ENOUGH_SECONDS", 6)
    assert tests.of("modegpt/records/cli.py", 2, source) == [own, quick]


def test_the_report_counts_the_sample_and_lists_survivors_with_why(tmp_path: Path) -> None:
    drawn = [Mutant("modegpt/records/cli.py", "AddNot", number, 7, f"a{number} -> b{number}") for number in range(3)]
    entries = [
        {**vars(mutant), "outcome": outcome, "why": why}
        for mutant, outcome, why in zip(drawn, ("killed", "survived", "killed"), ("", "only looks", ""), strict=True)
    ]
    stray = {**entries[1], "change": "of another sample -> or of older sources"}
    state = tmp_path / "state"
    state.write_text("\n".join(map(json.dumps, [{"test": "t", "seconds": 1.0}, *entries, stray])), encoding="utf-8")
    page = report(drawn, 5, state)
    said = page.replace("\n", " ")
    assert "drew 3 changes with seed 5 and tried 3 of them" in said and "2 were killed (67%)" in said
    assert "Of the others 1 are the same program" in said and "could see, 100% were killed" in said
    assert "| records | 3 | 2 |" in page and "| analysis | 0 | 0 |" in page
    assert page.count("only looks") == 1 and "  -a1\n  +b1" in page
