"""The corpus of the tiny world: documents of six kinds, drawn from seeded streams, one stream per split.

Everything is a pure function of the seed; ``random.Random`` with a string seed gives the same stream on every platform.
"""

import random
from functools import cache

from tools.tiny_world import vocabulary as words
from tools.tiny_world.facts import SUBJECTS, Fact, build_facts, fact_items, profile_document, question_document
from tools.tiny_world.physical import physical_document, physical_items
from tools.tiny_world.pronoun import pronoun_document, pronoun_items
from tools.tiny_world.story import story_document, story_items

SEED = 20240815
NUM_DOCUMENTS = {"train": 48000, "validation": 300, "test": 500}
NUM_ITEMS = {
    "tiny_facts_easy": 300,
    "tiny_facts_hard": 300,
    "tiny_physical": 200,
    "tiny_pronoun": 240,
    "tiny_story": 240,
}
# how often each kind of document is drawn
_MIXTURE = {"profile": 34, "question": 24, "physical": 12, "pronoun": 12, "story": 12, "routine": 6}
_RARE_SHARE = 0.45  # a rare fact is mentioned this often relative to a frequent one
_KINDS = {"person": 52, "town": 14, "animal": 14, "object": 12, "tool": 4, "foodstuff": 4}


@cache
def world_facts(seed: int = SEED) -> dict[str, dict[str, Fact]]:
    """The facts of the world: ``world_facts(seed)[relation name][subject]``."""
    return build_facts(seed=seed)


@cache
def _facts_by_subject(seed: int) -> dict[str, list[list[Fact]]]:
    facts = world_facts(seed)
    grouped = {}
    for kind in _KINDS:
        relations = [
            name
            for name, table in facts.items()
            if next(iter(table.values())).relation.kind in ((kind, "composite") if kind == "person" else (kind,))
        ]
        grouped[kind] = [[facts[name][subject] for name in relations] for subject in SUBJECTS[kind]]
    return grouped


def _draw_facts(rng: random.Random, *, seed: int) -> list[Fact]:
    """The facts of one subject that a document mentions, in random order: rare ones less often."""
    (kind,) = rng.choices(list(_KINDS), weights=list(_KINDS.values()))
    mentioned = [
        f for f in rng.choice(_facts_by_subject(seed)[kind]) if not f.relation.rare or rng.random() < _RARE_SHARE
    ]
    rng.shuffle(mentioned)
    return mentioned


def _profile(rng: random.Random, *, seed: int) -> str:
    return profile_document(_draw_facts(rng, seed=seed)[:6], rng)


def _questions(rng: random.Random, *, seed: int) -> str:
    drawn = [rng.choice(_draw_facts(rng, seed=seed)) for _ in range(5)]
    return question_document(drawn, rng)


def _routine(rng: random.Random) -> str:
    """Habits in several tenses and numbers: present, past and future, one person and two."""
    first, second = rng.sample(words.WOMEN + words.MEN, 2)
    (base, third, past, thing), (base2, third2, past2, thing2) = rng.sample(words.ACTIVITIES, 2)
    return rng.choice(
        (
            f"Every morning {first} {third} {thing}. Yesterday {first} {past} {thing}. "
            f"Tomorrow {first} will {base} {thing}.",
            f"{first} and {second} often {base} {thing}. Last week they {past2} {thing2}. "
            f"Next week they will {base} {thing} again.",
            f"{first} {third} {thing} while {second} {third2} {thing2}. Both of them {base} and {base2} every day.",
            f"Last night {first} {past} {thing} and {second} {past2} {thing2}. Now they {base} and {base2} once more.",
        )
    )


def _document(rng: random.Random, *, seed: int) -> str:
    (kind,) = rng.choices(list(_MIXTURE), weights=list(_MIXTURE.values()))
    if kind == "profile":
        return _profile(rng, seed=seed)
    if kind == "question":
        return _questions(rng, seed=seed)
    tell = {"physical": physical_document, "pronoun": pronoun_document, "story": story_document, "routine": _routine}
    return tell[kind](rng)


def documents(split: str, *, num_documents: int | None = None, seed: int = SEED) -> list[str]:
    """The first ``num_documents`` documents of a split, all of them by default.

    ``train``, ``validation`` and ``test`` are different streams over one world.
    """
    rng = random.Random(f"{seed}/documents/{split}")
    return [_document(rng, seed=seed) for _ in range(num_documents or NUM_DOCUMENTS[split])]


def task_items(task: str, *, seed: int = SEED) -> list[dict]:
    """Items of a task: ``context``, ``choices``, and ``gold``, the index of the right choice. Golds are balanced."""
    num_items = NUM_ITEMS[task]
    if task == "tiny_physical":
        return physical_items(num_items=num_items, seed=seed)
    if task == "tiny_pronoun":
        return pronoun_items(num_items=num_items, seed=seed)
    if task == "tiny_story":
        return story_items(num_items=num_items, seed=seed)
    return fact_items(world_facts(seed), hard=task == "tiny_facts_hard", num_items=num_items, seed=seed)
