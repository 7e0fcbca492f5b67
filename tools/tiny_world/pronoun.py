"""Who is meant: sentences with two people and a pronoun that the reason resolves, in twin pairs as in Winograd schemas.

Ordered pairs of people are held out by hash: a held-out pair never meets in training, and only such pairs are asked.
"""

import random
import zlib

from tools.tiny_world import vocabulary as words
from tools.tiny_world.vocabulary import pronouns

# what {a} does to {b}, the reason that speaks of {a}, the reason that speaks of {b}
SCHEMAS = (
    ("{a} carried {b} home", "was strong", "was tired"),
    ("{a} followed {b} through the forest", "had lost the path", "knew the path"),
    ("{a} beat {b} in the race", "was fast", "was slow"),
    ("{a} gave {b} some bread", "had too much of it", "was hungry"),
    ("{a} asked {b} for help", "had a problem", "was wise"),
    ("{a} sold {b} a chair", "needed money", "wanted to sit"),
    ("{a} hid from {b}", "was afraid", "was angry"),
    ("{a} thanked {b}", "had got a gift", "had been kind"),
    ("{a} visited {b}", "felt lonely", "was ill"),
    ("{a} taught {b} to sing", "was a good teacher", "wished to learn"),
    ("{a} begged {b} for a coin", "was poor", "was rich"),
    ("{a} said sorry to {b}", "had made a mistake", "was hurt"),
    ("{a} lent {b} a coat", "had two of them", "felt cold"),
    ("{a} woke {b}", "had risen early", "was still asleep"),
)


def is_held_out(first: str, second: str) -> bool:
    """Whether this ordered pair of people is kept for the task (one pair in eight)."""
    return zlib.crc32(f"{first}/{second}".encode()) % 8 == 0


def _draw_pair(rng: random.Random, *, held_out: bool, same_gender: bool) -> tuple[str, str]:
    while True:
        group = rng.choice((words.WOMEN, words.MEN))
        other = group if same_gender else (words.MEN if group is words.WOMEN else words.WOMEN)
        pair = rng.choice(group), rng.choice(other)
        if pair[0] != pair[1] and is_held_out(*pair) == held_out:
            return pair


def _sentence(schema: tuple[str, str, str], pair: tuple[str, str], about: int) -> str:
    event = schema[0].format(a=pair[0], b=pair[1])
    return f"{event} because {pronouns(pair[about])['he']} {schema[1 + about]}."


def pronoun_document(rng: random.Random) -> str:
    """Three short passages; each sentence with a pronoun is followed by a sentence that says who was meant."""
    parts = []
    for _ in range(3):
        pair = _draw_pair(rng, held_out=False, same_gender=rng.random() < 0.5)
        schema, about = rng.choice(SCHEMAS), rng.randrange(2)
        parts.append(f"{_sentence(schema, pair, about)} The one who {schema[1 + about]} was {pair[about]}.")
    return "\n".join(parts)


def pronoun_items(*, num_items: int, seed: int) -> list[dict]:
    """Two-choice items over held-out pairs of people, half of them of one gender; the choices are the two names."""
    rng = random.Random(f"{seed}/items/pronoun")
    items = []
    for index in range(num_items):
        about, gold = (index // 2) % 2, index % 2
        pair = _draw_pair(rng, held_out=True, same_gender=(index // 4) % 2 == 0)
        schema = rng.choice(SCHEMAS)
        choices = [pair[1 - about], pair[1 - about]]
        choices[gold] = pair[about]
        context = f"{_sentence(schema, pair, about)} The one who {schema[1 + about]} was"
        items.append({"context": context, "choices": choices, "gold": gold})
    rng.shuffle(items)
    return items
