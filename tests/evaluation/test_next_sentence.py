"""The task made from a text: real successors as answers, other documents' sentences as wrong choices, every time."""

import pytest

from modegpt.data.texts import Documents, load_documents
from modegpt.errors import UserError
from modegpt.evaluation.next_sentence import NUM_CHOICES, next_sentence_rows
from modegpt.evaluation.tasks import load_tasks, task_fingerprint
from tests.evaluation.task_rows import scored

NAMES = ("Ann", "Bob", "Cem", "Dee", "Eve")
STORIES = Documents(
    "jsonl",
    tuple(
        f'{name} had a cat. It was\n\nred. {name} said, "Go home now!" They ran. {name} slept. {name} woke up early.'
        for name in NAMES
    ),
)


def test_rows() -> None:
    rows = next_sentence_rows(STORIES)
    assert [row["context"] for row in rows] == [
        context for name in NAMES for context in (f"{name} had a cat. It was red.", f"They ran. {name} slept.")
    ]
    for row, name in zip(rows, (name for name in NAMES for _ in range(2)), strict=True):
        answer = f'{name} said, "Go home now!"' if row["context"].endswith("red.") else f"{name} woke up early."
        assert row["choices"][row["gold"]] == answer
        assert len(set(row["choices"])) == NUM_CHOICES == len(row["choices"])
        assert all(name not in choice for choice in row["choices"] if choice != answer)  # of other documents
    assert {row["gold"] for row in rows} != {0} and rows == next_sentence_rows(STORIES)


def test_short_answers_are_not_asked() -> None:
    texts = tuple(f"{name} had a dog. It was big. Yes." for name in NAMES)
    with pytest.raises(UserError, match="at least 4 documents of 3 sentences"):
        next_sentence_rows(Documents("jsonl", texts))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("One sentence only.",) * 9, "at least 4 documents of 3 sentences"),
        (("A cat sat. A dog sat. The same for all of them.",) * 9, "too few different sentences"),
    ],
    ids=["no answers", "one answer"],
)
def test_a_text_without_choices_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next_sentence_rows(Documents("text", texts))


def test_the_harness_scores_these_strings() -> None:
    task = load_tasks(["next_sentence"], data_path="a folder for other tasks", documents=STORIES)["next_sentence"]
    rows = next_sentence_rows(STORIES)
    assert scored(task) == [
        ([(row["context"], f" {choice}") for choice in row["choices"]], row["gold"]) for row in rows
    ]
    others = Documents("jsonl", STORIES.texts[:4])
    assert task_fingerprint(task, limit=None) != task_fingerprint(
        load_tasks(["next_sentence"], data_path=None, documents=others)["next_sentence"], limit=None
    )


def test_it_needs_a_text() -> None:
    with pytest.raises(UserError, match=r"evaluation.perplexity.source"):
        load_tasks(["tiny", "next_sentence"], data_path=None)


def test_the_embedded_text_has_many() -> None:
    rows = next_sentence_rows(load_documents("tiny", path=None, split="test"))
    golds = [row["gold"] for row in rows]
    assert len(rows) > 500 and all(0.2 < golds.count(gold) / len(rows) < 0.3 for gold in range(NUM_CHOICES))
