"""Short stories with cause and effect: an opening, a cause in one of two branches, and the ending that it brings.

A (script, person, thing) triple is held out by hash: no training story has it; the task tells only such stories.
"""

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from tools.tiny_world import vocabulary as words
from tools.tiny_world.vocabulary import pronouns, with_article, wordings


@dataclass(frozen=True)
class Script:
    """Templates over {n} name, {t} thing, {a} thing with article, pronouns. ``branches`` pairs causes with endings."""

    things: tuple[str, ...]
    openings: tuple[str, ...]
    branches: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def _script(things: Iterable[str], openings: str, *branches: tuple[str, str]) -> Script:
    told = tuple((wordings(cause), wordings(ending)) for cause, ending in branches)
    return Script(tuple(things), wordings(openings), told)


_FRUITS, _BAKED = words.FOODS[:5], words.FOODS[12:16]
_CARRIED = ["map", "book", "hat", "scarf", "mug", "lamp", "drum", "flute"]
_PETS = list(words.ANIMALS)[:12]

SCRIPTS = (
    _script(
        _PETS,
        "{n} kept {a} in the yard. | {n} had {a} behind the house.",
        (
            "One night {he} left the gate open. | {He} forgot to close the gate.",
            "The {t} ran away. | In the morning the {t} was gone.",
        ),
        (
            "Every night {he} closed the gate. | {He} shut the gate well.",
            "The {t} stayed in the yard. | The {t} slept near the house.",
        ),
    ),
    _script(
        [*_BAKED, "tart", "pudding"],
        "{n} put {a} in the oven. | {n} wanted to bake {a}.",
        ("Then {he} fell asleep. | {He} went out and forgot the time.", "The {t} was burnt. | The {t} turned black."),
        (
            "{He} watched the clock with care. | {He} stood by the oven all the time.",
            "The {t} was perfect. | The {t} came out golden.",
        ),
    ),
    _script(
        [*_FRUITS, "bean", "turnip", "pumpkin"],
        "{n} planted {a} seed in the garden. | In spring {n} put {a} seed in the soil.",
        (
            "{He} watered it every day. | The rain fell all through the summer.",
            "Soon a green {t} plant grew. | The {t} plant grew tall.",
        ),
        ("{He} never gave it water. | No rain fell that year.", "The {t} seed dried up. | No {t} plant came up."),
    ),
    _script(
        _CARRIED,
        "{n} went to the market to buy {a}. | {n} wished to have {a} and went to the shop.",
        (
            "{He} had ten coins in the bag. | {His} purse was full of money.",
            "{He} came home with the {t}. | {He} paid for the {t}.",
        ),
        (
            "{He} had lost all the coins. | {His} purse was empty.",
            "{He} came home without the {t}. | {He} could not pay for the {t}.",
        ),
    ),
    _script(
        _CARRIED,
        "{n} walked to the town with {a}. | {n} took {a} along on the road.",
        (
            "There was a hole in the bag. | {He} ran so fast that the bag tore.",
            "On the way {he} lost the {t}. | The {t} fell on the road.",
        ),
        (
            "The bag was strong and new. | {He} held the bag tight.",
            "{He} brought the {t} to the town. | The {t} was safe.",
        ),
    ),
    _script(
        ["mug", "vase", "bowl", "bottle", "jug", "goblet"],
        "{n} carried {a} down the stairs. | {n} walked across the room with {a}.",
        (
            "{He} slipped on the wet floor. | The cat jumped in front of {him}.",
            "The {t} broke. | Pieces of the {t} lay on the floor.",
        ),
        (
            "{He} went with slow steps. | {He} looked at each step.",
            "{He} set the {t} on the table. | Nothing happened to the {t}.",
        ),
    ),
    _script(
        words.COLOURS,
        "{n} wore a new {t} coat. | {n} went for a walk in {a} coat.",
        (
            "Heavy rain began to fall. | Dark clouds came and it rained.",
            "The {t} coat was wet. | Water dripped from the {t} coat.",
        ),
        (
            "The sun shone all day. | There was no cloud in the sky.",
            "The {t} coat stayed dry. | The {t} coat was warm from the sun.",
        ),
    ),
    _script(
        words.COLOURS,
        "{n} made {a} kite. | {n} took {a} kite to the hill.",
        (
            "The wind was strong. | A fresh wind blew from the sea.",
            "The {t} kite flew high. | The {t} kite rose over the trees.",
        ),
        (
            "The air was still. | There was no wind at all.",
            "The {t} kite stayed on the ground. | The {t} kite did not rise.",
        ),
    ),
    _script(
        words.RIVERS,
        "{n} wanted to cross the {t} by boat. | {n} took a boat out on the {t}.",
        (
            "The boat had a hole. | The old boat was full of cracks.",
            "The boat sank in the {t}. | {He} had to swim out of the {t}.",
        ),
        (
            "The boat was new and strong. | The boat had just been mended.",
            "{He} reached the other side of the {t}. | {He} crossed the {t}.",
        ),
    ),
    _script(
        words.FOODS,
        "{n} cooked {o} for a friend. | {n} gave a friend some {o}.",
        (
            "The friend was very hungry. | The friend had not eaten all day.",
            "The friend ate all of the {t}. | Nothing of the {t} was left.",
        ),
        (
            "The friend was ill. | The friend had just had a big meal.",
            "The friend did not touch the {t}. | All of the {t} was left.",
        ),
    ),
    _script(
        words.INSTRUMENTS,
        "{n} played the {t} at the fair. | {n} brought the {t} to the feast.",
        (
            "{He} had practised for weeks. | {He} knew the song by heart.",
            "The crowd loved the {t}. | Everyone clapped for the {t}.",
        ),
        (
            "{He} had never practised. | {He} forgot the song.",
            "The crowd did not like the {t}. | No one clapped for the {t}.",
        ),
    ),
    _script(
        words.TOWNS,
        "{n} set out for {t} before dawn. | {n} started on the road to {t}.",
        (
            "{He} had a good map. | A guide showed {him} the way.",
            "By noon {he} reached {t}. | {He} was in {t} on time.",
        ),
        ("{He} took the wrong turn. | Thick fog hid the road.", "{He} never reached {t}. | {He} did not find {t}."),
    ),
)


def is_held_out(script: int, name: str, thing: str) -> bool:
    """Whether stories of this script with this person and thing are kept for the task (one in eight)."""
    return zlib.crc32(f"{script}/{name}/{thing}".encode()) % 8 == 0


def _draw(rng: random.Random, *, held_out: bool) -> tuple[int, str, str]:
    while True:
        script = rng.randrange(len(SCRIPTS))
        triple = script, rng.choice(words.WOMEN + words.MEN), rng.choice(SCRIPTS[script].things)
        if is_held_out(*triple) == held_out:
            return triple


def _fill(template: str, name: str, thing: str) -> str:
    return template.format(n=name, t=thing, o=thing, a=with_article(thing), **pronouns(name))


def _context(rng: random.Random, script: int, name: str, thing: str, branch: int) -> str:
    chosen = SCRIPTS[script]
    return " ".join(_fill(rng.choice(t), name, thing) for t in (chosen.openings, chosen.branches[branch][0]))


def _ending(rng: random.Random, script: int, name: str, thing: str, branch: int) -> str:
    return _fill(rng.choice(SCRIPTS[script].branches[branch][1]), name, thing)


def story_document(rng: random.Random) -> str:
    """Two stories, one paragraph each."""
    parts = []
    for _ in range(2):
        script, name, thing = _draw(rng, held_out=False)
        branch = rng.randrange(2)
        parts.append(f"{_context(rng, script, name, thing, branch)} {_ending(rng, script, name, thing, branch)}")
    return "\n".join(parts)


def story_items(*, num_items: int, seed: int) -> list[dict]:
    """Four endings: the right branch or the other, each of this thing or of another; one of them is right."""
    rng = random.Random(f"{seed}/items/story")
    items = []
    for index in range(num_items):
        script, name, thing = _draw(rng, held_out=True)
        branch, gold = rng.randrange(2), index % 4
        other = rng.choice([t for t in SCRIPTS[script].things if t != thing])
        context = _context(rng, script, name, thing, branch)
        wrong = [
            _ending(rng, script, name, thing, 1 - branch),
            _ending(rng, script, name, other, branch),
            _ending(rng, script, name, other, 1 - branch),
        ]
        rng.shuffle(wrong)
        right = _ending(rng, script, name, thing, branch)
        items.append({"context": context, "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold})
    rng.shuffle(items)
    return items
