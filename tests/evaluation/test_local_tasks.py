"""Local files become the tasks the harness scores: the same strings, the same answers."""

import json

import pytest

from modegpt.errors import UserError
from modegpt.evaluation.local_tasks import local_rows
from modegpt.evaluation.tasks import PAPER_TASKS, load_tasks, task_fingerprint
from tests.evaluation.task_rows import ROWS, scored


def expected_qa(question: str, choices: list[str], gold: int) -> tuple[list[tuple[str, str]], int]:
    return [(question, f" {choice}") for choice in choices], gold


def asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def test_scored_strings(task_folder):
    tasks = load_tasks(["paper", "openbookqa"], data_path=str(task_folder))
    assert list(tasks) == [*PAPER_TASKS, "openbookqa"]
    for name in ("arc_easy", "arc_challenge"):
        assert scored(tasks[name]) == [
            expected_qa(asked(row["question"]), row["choices"], row["gold"]) for row in ROWS[name]
        ]
    assert scored(tasks["openbookqa"]) == [
        expected_qa(row["query"], row["choices"], row["gold"]) for row in ROWS["openbookqa"]
    ]
    solutions = [
        expected_qa(asked(row["goal"]), [row["sol1"], row["sol2"]], gold) for gold, row in enumerate(ROWS["piqa"])
    ]
    assert scored(tasks["piqa"]) == solutions
    hellaswag = scored(tasks["hellaswag"])
    # the harness's own cleaning: the label in front, the second part capitalised, [title] read as a full stop
    assert hellaswag[0][0][0] == ("Pole vault: A man runs. The man", " jumps. up.")
    assert [int(gold) for _, gold in hellaswag] == [0, 3]


def test_loading_and_fingerprints_draw_no_bars(task_folder, capfd):
    """HellaSwag's rows are rewritten by ``Dataset.map``, which has a bar of its own: once, and silently."""
    task = load_tasks(["hellaswag"], data_path=str(task_folder))["hellaswag"]
    assert task_fingerprint(task, limit=None) == task_fingerprint(task, limit=len(ROWS["hellaswag"]))
    assert list(task.validation_docs()) == list(task.validation_docs())
    assert capfd.readouterr() == ("", "")


def winogrande_strings(rows: list[dict]) -> list:
    return [
        ([(context, f" {row['continuation'].strip()}") for context in row["context_options"]], row["gold"])
        for row in rows
    ]


def test_winogrande_sentences_give_back_their_strings(task_folder):
    assert scored(load_tasks(["winogrande"], data_path=str(task_folder))["winogrande"]) == winogrande_strings(
        ROWS["winogrande"]
    )
    first = local_rows("winogrande", task_folder)[0]
    assert first == {"sentence": "Ann saw Eve so _ waved to her.", "option1": "Ann", "option2": "Eve", "answer": "2"}


def test_real_winogrande_gives_back_its_strings(shared_dir):
    folder = shared_dir / "data" / "zeroshot"
    rows = [json.loads(line) for line in (folder / "winogrande.jsonl").open()]
    assert len(rows) == 1267 and scored(
        load_tasks(["winogrande"], data_path=str(folder))["winogrande"]
    ) == winogrande_strings(rows)


def test_rows_in_the_tasks_own_columns_pass_unchanged(tmp_path):
    native = {
        "winogrande": {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "2"},
        "arc_easy": {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "openbookqa": {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
        "hellaswag": {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": "1"},
    }
    for task, row in native.items():
        (tmp_path / f"{task}.json").write_text(json.dumps([row]))
        assert local_rows(task, tmp_path) == [row]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "arc_easy",
            {"question": "Q", "choices": ["a"], "gold": 1},
            "line 1: gold 1 is not the index of one of 1 choices",
        ),
        ("arc_easy", {"question": "Q", "gold": 1}, "line 1 has no field 'choices'"),
        ("winogrande", {"context_options": ["a"], "continuation": "b", "gold": 0}, "should be a list of 2 texts"),
        (
            "hellaswag",
            {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c"], "label": 4},
            "label 4 is not the index",
        ),
        ("openbookqa", {"question": "Q", "choices": ["a"], "gold": 0}, "line 1 has no field 'query'"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "label is 2, not 0 or 1"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, row, message):
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        local_rows(task, tmp_path)


def test_bad_folders_are_named(task_folder):
    with pytest.raises(UserError, match="nowhere is not a folder; it should hold piqa"):
        load_tasks(["piqa"], data_path="nowhere")
    with pytest.raises(
        UserError, match=r"task 'boolq' is not read from local files: evaluation.zeroshot.data_path serves piqa"
    ):
        load_tasks(["boolq"], data_path=str(task_folder))
    (task_folder / "piqa_some-labels.lst").write_text("0\n")
    with pytest.raises(UserError, match=r"piqa_some-labels.lst should hold one label, 0 or 1, for each of the 2 rows"):
        load_tasks(["piqa"], data_path=str(task_folder))
    (task_folder / "piqa_some-labels.lst").unlink()
    with pytest.raises(UserError, match=r"cannot read .*piqa_some-labels.lst"):
        load_tasks(["piqa"], data_path=str(task_folder))
    (task_folder / "piqa_more.jsonl").write_text("")
    with pytest.raises(UserError, match=r"piqa_more.jsonl, piqa_some.jsonl"):
        load_tasks(["piqa"], data_path=str(task_folder))
