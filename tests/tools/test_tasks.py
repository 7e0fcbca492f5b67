"""The five tasks: well formed, balanced, held out from training, and solvable from the world alone."""

import re
from collections import Counter

import pytest

from modegpt.data.embedded import TINY_TASKS, task_configs
from tools.tiny_world import corpus
from tools.tiny_world.facts import ask, held_out_question
from tools.tiny_world.pronoun import is_held_out


@pytest.fixture(scope="module")
def training_text() -> str:
    return "\n\n".join(corpus.documents("train"))


@pytest.mark.parametrize("task", TINY_TASKS)
def test_items_are_well_formed_and_balanced(task):
    items = corpus.task_items(task)
    num_choices = len(items[0]["choices"])
    assert 200 <= len(items) <= 300
    assert all(len(item["choices"]) == len(set(item["choices"])) == num_choices for item in items)
    golds = Counter(item["gold"] for item in items)
    assert max(golds.values()) - min(golds.values()) <= 1 and len(golds) == num_choices


def test_mean_chance_is_at_most_45_percent():
    chances = [1 / len(corpus.task_items(task)[0]["choices"]) for task in TINY_TASKS]
    assert sum(chances) / len(chances) <= 0.45


@pytest.mark.parametrize("task", TINY_TASKS)
def test_no_item_occurs_in_the_training_text(task, training_text):
    for item in corpus.task_items(task):
        assert f"{item['context']} {item['choices'][item['gold']]}" not in training_text


def test_held_out_wordings_and_pairs_never_occur_in_training(training_text):
    asked = set(re.findall(r"Question: .*\nAnswer:", training_text))
    facts = [fact for table in corpus.world_facts().values() for fact in table.values()]
    assert len(asked) > 2 * len(facts)
    assert asked.isdisjoint(ask(fact, held_out_question(fact)) for fact in facts)
    for item in corpus.task_items("tiny_pronoun"):
        first, second = sorted(item["choices"], key=item["context"].index)
        assert is_held_out(first, second)


def test_the_other_wordings_of_asked_facts_do_occur_in_training(training_text):
    asked = {item["context"] for item in corpus.task_items("tiny_facts_easy")}
    facts = [
        fact
        for table in corpus.world_facts().values()
        for fact in table.values()
        if ask(fact, held_out_question(fact)) in asked
    ]
    assert len(facts) == len(asked)
    answered = set(re.findall(r"Question: .*\nAnswer: .*(?=\.)", training_text))
    assert all(any(f"{ask(fact, wording)} {fact.value}" in answered for wording in range(4)) for fact in facts)


def test_configurations_are_complete_and_absolute():
    configs = task_configs()
    assert tuple(configs) == TINY_TASKS
    for name, config in configs.items():
        (file,) = config["dataset_kwargs"]["data_files"].values()
        assert config["task"] == name and file.startswith("/") and file.endswith(f"/{name}.jsonl")
        assert [metric["metric"] for metric in config["metric_list"]] == ["acc", "acc_norm"]
