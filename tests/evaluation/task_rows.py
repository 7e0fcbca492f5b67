"""A few items of each standard task in the forms they are passed around, and what the harness makes of a task."""

from typing import Any

from modegpt.evaluation.isolation import isolated_harness

ROWS = {
    "piqa": [
        {"goal": "Boil water.", "sol1": "Heat it in a pot.", "sol2": "Freeze it in a pot."},
        {"goal": "dresser", "sol1": "a pin ", "sol2": "a  pin"},
    ],
    "hellaswag": [
        {
            "activity_label": "Pole vault",
            "ctx_a": "A man runs.",
            "ctx_b": "the man",
            "endings": ["jumps [title] up.", "sleeps.", "eats.", "sings."],
            "label": 0,
        },
        {"activity_label": "Tea", "ctx_a": "Two cups.", "ctx_b": "", "endings": ["a.", "b.", "c.", "d."], "label": 3},
    ],
    "winogrande": [
        {"context_options": ["Ann saw Eve so Ann", "Ann saw Eve so Eve"], "continuation": "waved to her.", "gold": 1},
        {"context_options": ["Ann", "The cat"], "continuation": "sat_down.", "gold": 0},
        {"context_options": ["_a b", "_a c"], "continuation": "e.", "gold": 0},
    ],
    "arc_easy": [
        {"question": "What is hot?", "choices": ["ice", "fire", "snow"], "gold": 1},
        {"question": "Wet?", "choices": ["sand", "rock", "air", "sea"], "gold": 3},
    ],
    "arc_challenge": [
        {"question": "Why is the sky blue?", "choices": ["paint", "light", "ice", "sea"], "gold": 1},
        {"question": "Far?", "choices": ["sun", "toe"], "gold": 0},
    ],
    "openbookqa": [
        {"query": "Predators eat", "choices": ["lions", "rocks", "bunnies", "grass"], "gold": 2},
        {"query": "Ice is", "choices": ["hot", "cold"], "gold": 1},
    ],
}


def scored(task: Any) -> list[tuple[list[tuple[str, str]], int]]:
    """For each item the (context, continuation) strings the harness scores, and the index of the right one."""
    with isolated_harness():
        task.build_all_requests()
    items: dict[int, list] = {}
    for instance in task.instances:
        items.setdefault(instance.doc_id, []).append(instance.args)
    docs = list(task.eval_docs)
    return [
        (items[index], task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc))
        for index, doc in enumerate(docs)
    ]
