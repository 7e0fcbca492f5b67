"""Facts of the tiny world: what holds for whom, and every way the corpus has of saying and asking it.

A relation has statements and questions. For each fact one question wording is held out (``held_out_question``): it
never occurs in training with that subject, though it does with others, and it is the one the tasks ask.
"""

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from tools.tiny_world import vocabulary as words
from tools.tiny_world.vocabulary import capitalised, pronouns, with_article, wordings


@dataclass(frozen=True)
class Relation:
    """One attribute of one kind of entity.

    Templates use {s} subject, {p} its plural, {o} value, {a} value with article.
    """

    name: str
    kind: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    rare: bool = False


@dataclass(frozen=True)
class Fact:
    """``subject`` stands in ``relation`` to ``value``."""

    relation: Relation
    subject: str
    value: str


def _relation(
    name: str, kind: str, values: Iterable[str], statements: str, questions: str, rare: bool = False
) -> Relation:
    return Relation(name, kind, tuple(values), wordings(statements), wordings(questions), rare)


RELATIONS = (
    _relation(
        "town",
        "person",
        words.TOWNS,
        "{s} lives in {o}. | The home of {s} is in {o}. | {s} has a small house in {o}. | Everyone in {o} knows {s}.",
        "Where does {s} live? | In which town is the home of {s}? | "
        "Which town does {s} call home? | What is the home town of {s}?",
    ),
    _relation(
        "job",
        "person",
        words.JOBS,
        "{s} works as {a}. | {s} is {a}. | The job of {s} is that of {a}. | {s} earns a living as {a}.",
        "What is the job of {s}? | What does {s} do for a living? | What work does {s} do? | How does {s} earn money?",
    ),
    _relation(
        "food",
        "person",
        words.FOODS,
        "{s} likes {o} best. | The favourite food of {s} is {o}. | "
        "{s} eats {o} every Sunday. | Nothing tastes better to {s} than {o}.",
        "What does {s} like to eat? | What is the favourite food of {s}? | "
        "What does {s} eat every Sunday? | Which food does {s} love?",
    ),
    _relation(
        "pet",
        "person",
        list(words.ANIMALS)[:20],
        "{s} owns {a}. | The pet of {s} is {a}. | {s} keeps {a} at home. | {s} has {a} as a pet.",
        "What animal does {s} own? | What is the pet of {s}? | "
        "Which animal does {s} keep at home? | What pet does {s} have?",
    ),
    _relation(
        "coat",
        "person",
        words.COLOURS,
        "{s} wears {a} coat. | The coat of {s} is {o}. | {s} has {a} coat. | In winter {s} puts on {a} coat.",
        "What colour is the coat of {s}? | Which colour does {s} wear? | "
        "What is the colour of the coat of {s}? | What coat colour does {s} have?",
    ),
    _relation(
        "instrument",
        "person",
        words.INSTRUMENTS,
        "{s} plays the {o}. | The {o} is the instrument of {s}. | "
        "{s} learned to play the {o}. | At night {s} plays on the {o}.",
        "What does {s} play? | Which instrument does {s} play? | "
        "What is the instrument of {s}? | What did {s} learn to play?",
        True,
    ),
    _relation(
        "month",
        "person",
        words.MONTHS,
        "{s} was born in {o}. | The birthday of {s} is in {o}. | "
        "{s} has a birthday in {o}. | Each {o} {s} turns a year older.",
        "When was {s} born? | In which month is the birthday of {s}? | "
        "What month was {s} born in? | When does {s} turn a year older?",
        True,
    ),
    _relation(
        "hobby",
        "person",
        words.HOBBIES,
        "{s} enjoys {o}. | The hobby of {s} is {o}. | {s} spends free days on {o}. | For fun {s} turns to {o}.",
        "What does {s} enjoy? | What is the hobby of {s}? | How does {s} spend free days? | What does {s} do for fun?",
        True,
    ),
    _relation(
        "river",
        "town",
        words.RIVERS,
        "{s} stands on the river {o}. | The river {o} flows through {s}. | "
        "In {s} the boats sail on the {o}. | {s} lies beside the {o}.",
        "Which river flows through {s}? | On which river does {s} stand? | "
        "What river do the boats of {s} sail on? | Beside which river does {s} lie?",
    ),
    _relation(
        "product",
        "town",
        words.PRODUCTS,
        "{s} sells {o}. | {s} is known for its {o}. | The people of {s} make {o}. | Traders buy {o} in {s}.",
        "What does {s} sell? | What is {s} known for? | What do the people of {s} make? | What do traders buy in {s}?",
    ),
    _relation(
        "building",
        "town",
        words.BUILDINGS,
        "{s} has an old {o}. | In the middle of {s} stands a {o}. | "
        "Visitors to {s} see the {o}. | The pride of {s} is its {o}.",
        "What stands in the middle of {s}? | What do visitors to {s} see? | "
        "Which old building does {s} have? | What is the pride of {s}?",
    ),
    _relation(
        "fair",
        "town",
        words.MONTHS,
        "{s} holds its fair in {o}. | The fair of {s} takes place in {o}. | "
        "Every {o} there is a fair in {s}. | In {o} people go to the fair of {s}.",
        "When does {s} hold its fair? | In which month is the fair of {s}? | "
        "When do people go to the fair of {s}? | What is the fair month of {s}?",
        True,
    ),
    _relation(
        "habitat",
        "animal",
        words.HABITATS,
        "The {s} lives in the {o}. | {P} live in the {o}. | "
        "The home of the {s} is the {o}. | {P} are found in the {o}.",
        "Where does the {s} live? | Where do {p} live? | What is the home of the {s}? | Where are {p} found?",
    ),
    _relation(
        "diet",
        "animal",
        words.DIETS,
        "The {s} eats {o}. | {P} eat {o}. | The {s} feeds on {o}. | {P} look for {o} every day.",
        "What does the {s} eat? | What do {p} eat? | What does the {s} feed on? | What do {p} look for?",
    ),
    _relation(
        "sound",
        "animal",
        words.SOUNDS,
        "The {s} can {o}. | {P} {o} at night. | When the {s} is afraid it starts to {o}. | {P} {o} to call each other.",
        "What can the {s} do at night? | How do {p} call each other? | "
        "What does the {s} do when it is afraid? | Which sound do {p} make?",
    ),
    _relation(
        "size",
        "animal",
        words.SIZES,
        "The {s} is a {o} animal. | {P} are {o}. | The young of the {s} grow to be {o}. | {P} are {o} animals.",
        "How big is the {s}? | How big are {p}? | What size is the {s}? | What size are {p}?",
        True,
    ),
    _relation(
        "material",
        "object",
        sorted(set(words.OBJECTS.values())),
        "The {s} is made of {o}. | {P} are made of {o}. | A good {s} is made from {o}. | {P} consist of {o}.",
        "What is the {s} made of? | What are {p} made of? | What is a good {s} made from? | What do {p} consist of?",
    ),
    _relation(
        "room",
        "object",
        words.ROOMS,
        "The {s} is kept in the {o}. | {P} are kept in the {o}. | "
        "You find the {s} in the {o}. | {P} belong in the {o}.",
        "Where is the {s} kept? | Where are {p} kept? | Where do you find the {s}? | Where do {p} belong?",
        True,
    ),
    _relation(
        "paint",
        "object",
        words.COLOURS,
        "The {s} is {o}. | {P} are {o}. | The colour of the {s} is {o}. | {P} are painted {o}.",
        "What colour is the {s}? | What colour are {p}? | What is the colour of the {s}? | How are {p} painted?",
    ),
    _relation(
        "use",
        "tool",
        words.TOOLS.values(),
        "The {s} is used to {o}. | With the {s} you can {o}. | People need the {s} to {o}. | The {s} helps to {o}.",
        "What is the {s} used for? | What can you do with the {s}? | "
        "What do people need the {s} for? | What does the {s} help to do?",
    ),
    _relation(
        "taste",
        "foodstuff",
        words.TASTES,
        "The {s} tastes {o}. | The taste of the {s} is {o}. | "
        "A fresh {s} is {o}. | People love the {o} taste of the {s}.",
        "How does the {s} taste? | What is the taste of the {s}? | How is a fresh {s}? | What taste does the {s} have?",
    ),
    _relation(
        "season",
        "foodstuff",
        words.SEASONS,
        "The {s} is sold in {o}. | In {o} people eat the {s}. | The season of the {s} is {o}. | The {s} comes in {o}.",
        "When is the {s} sold? | When do people eat the {s}? | "
        "What is the season of the {s}? | When does the {s} come?",
        True,
    ),
    _relation(
        "home_river",
        "composite",
        words.RIVERS,
        "The river near the house of {s} is the {o}. | {s} goes swimming in the {o}. | "
        "From the window {s} can see the {o}. | {s} takes a boat on the {o}.",
        "Which river is near the house of {s}? | In which river does {s} swim? | "
        "Which river can {s} see? | On which river does {s} take a boat?",
        True,
    ),
    _relation(
        "home_product",
        "composite",
        words.PRODUCTS,
        "The neighbours of {s} make {o}. | {s} helps to sell {o}. | "
        "In the home town of {s} people make {o}. | The town of {s} is rich from {o}.",
        "What do the neighbours of {s} make? | What does {s} help to sell? | "
        "What do people make in the home town of {s}? | What made the town of {s} rich?",
        True,
    ),
)

SUBJECTS = {
    "person": words.WOMEN + words.MEN,
    "composite": words.WOMEN + words.MEN,
    "town": words.TOWNS,
    "animal": list(words.ANIMALS),
    "object": list(words.OBJECTS),
    "tool": list(words.TOOLS),
    "foodstuff": words.FOODS,
}
_COMPOSED_OF = {"home_river": "river", "home_product": "product"}


def build_facts(*, seed: int) -> dict[str, dict[str, Fact]]:
    """All facts, as ``facts[relation name][subject]``.

    Materials and uses are sensible; the other values are drawn evenly.
    """
    facts: dict[str, dict[str, Fact]] = {}
    for relation in RELATIONS:
        subjects = SUBJECTS[relation.kind]
        if relation.kind == "composite":
            inner = facts[_COMPOSED_OF[relation.name]]
            values = [inner[facts["town"][subject].value].value for subject in subjects]
        elif relation.name in ("material", "use"):
            table = words.OBJECTS if relation.name == "material" else words.TOOLS
            values = [table[subject] for subject in subjects]
        else:
            rng = random.Random(f"{seed}/facts/{relation.name}")
            repeats = -(-len(subjects) // len(relation.values))
            values = (list(relation.values) * repeats)[: len(subjects)]
            rng.shuffle(values)
        facts[relation.name] = {s: Fact(relation, s, v) for s, v in zip(subjects, values, strict=True)}
    return facts


def fill(template: str, fact: Fact, subject: str | None = None) -> str:
    """A template of the fact's relation with its subject (or ``subject`` in its place) and value put in."""
    subject = subject or fact.subject
    plural = words.ANIMALS.get(fact.subject, fact.subject + "s")
    text = template.format(s=subject, p=plural, P=capitalised(plural), o=fact.value, a=with_article(fact.value))
    return capitalised(text)


def state(fact: Fact, rng: random.Random, *, pronoun_for: str | None = None) -> str:
    """One statement of the fact.

    With ``pronoun_for``, its person is a pronoun where the template starts with the subject.
    """
    template = rng.choice(fact.relation.statements)
    if pronoun_for and template.startswith("{s} "):
        return fill(template, fact, subject=pronouns(pronoun_for)["he"])
    return fill(template, fact)


def held_out_question(fact: Fact) -> int:
    """Index of the question wording that training never uses for this fact."""
    return zlib.crc32(f"{fact.relation.name}/{fact.subject}".encode()) % len(fact.relation.questions)


def ask(fact: Fact, wording: int) -> str:
    """The question with the given wording index, as a prompt that ends where the answer starts."""
    return f"Question: {fill(fact.relation.questions[wording], fact)}\nAnswer:"


def question_document(facts: list[Fact], rng: random.Random) -> str:
    """Questions with answers, one wording of each fact drawn among those not held out."""
    lines = []
    for fact in facts:
        allowed = [i for i in range(len(fact.relation.questions)) if i != held_out_question(fact)]
        lines.append(f"{ask(fact, rng.choice(allowed))} {fact.value}.")
    return "\n".join(lines)


def profile_document(facts: list[Fact], rng: random.Random) -> str:
    """Statements about one subject, in order; later mentions of a person are often pronouns."""
    sentences = []
    for index, fact in enumerate(facts):
        person = fact.relation.kind in ("person", "composite") and index > 0 and rng.random() < 0.6
        sentences.append(state(fact, rng, pronoun_for=fact.subject if person else None))
    return " ".join(sentences)


def fact_items(facts: dict[str, dict[str, Fact]], *, hard: bool, num_items: int, seed: int) -> list[dict]:
    """Four-choice questions in held-out wordings: frequent facts (easy), or rare and two-hop facts (hard)."""
    rng = random.Random(f"{seed}/items/facts/{hard}")
    pool = [fact for table in facts.values() for fact in table.values() if fact.relation.rare == hard]
    items = []
    for index, fact in enumerate(rng.sample(pool, num_items)):
        wrong = rng.sample(sorted(set(fact.relation.values) - {fact.value}), 3)
        gold = index % 4
        choices = [*wrong[:gold], fact.value, *wrong[gold:]]
        items.append({"context": ask(fact, held_out_question(fact)), "choices": choices, "gold": gold})
    rng.shuffle(items)
    return items
