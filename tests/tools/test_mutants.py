"""What is changed by ``make mutants``, and what is reported of it."""

import ast
import json
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="pip install -e '.[mutants]'")
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from tools import mutants
from tools.mutants import LeaveOutKeyword, Mutant, annotations, mutated, report, sample, unseen


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
    source = "def f(x: int | None, *, y: int = 1 - 2) -> int | None:\n    return g(x, strict=True, z=not y)\n"
    places = annotations(source) | unseen(source)
    first, second = source.splitlines()
    assert {(1, first.index("|")), (1, first.rindex("|"))} <= places
    assert (1, first.index("-")) not in places and (2, second.index("not")) not in places
    assert {(2, second.index("strict")), (2, second.index("True"))} <= places, "a guard, and its value"


def test_a_sample_is_that_of_its_seed_and_each_of_it_another_program() -> None:
    packages = ["modegpt/allocation/influence.py", "modegpt/decompositions/cr.py"]
    first, again, other = (sample(20, seed, packages) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 20
    for mutant in first:
        changed = mutated(mutant.path, mutant.operator, mutant.occurrence)
        assert changed is not None and mutant.path in packages
        before = (mutants.CHECKOUT / mutant.path).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(before))


def test_every_module_has_tests_and_they_exist() -> None:
    for path in mutants.modules():
        if not path.endswith("__init__.py"):
            tests = mutants.tests_of(path)
            assert tests and all((mutants.CHECKOUT / test).is_file() for test in tests), path


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
    assert "drew 3 changes with seed 5 and tried 3 of them" in page and "2 were killed (67%)" in page.replace("\n", " ")
    assert "| records | 3 | 2 |" in page and "| analysis | 0 | 0 |" in page
    assert page.count("only looks") == 1 and "  -a1\n  +b1" in page
