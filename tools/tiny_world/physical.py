"""What happens to things: the outcome of an action follows from the material of the object.

For each pair (object, action) one wording of the action is held out from training and used by the task.
"""

import random
import zlib

from tools.tiny_world import vocabulary as words

# action -> (wordings, {outcome: materials})
ACTIONS = {
    "drop": (
        (
            "{n} dropped the {o} on the hard floor.",
            "The {o} fell from the shelf while {n} was away.",
            "By accident {n} let the {o} fall.",
            "{n} knocked the {o} off the table.",
        ),
        {
            "The {o} broke into pieces.": ("clay", "glass"),
            "The {o} bounced back up.": ("rubber",),
            "The {o} hit the ground with a loud bang.": ("iron", "stone", "wood"),
            "The {o} landed without a sound.": ("wool", "paper", "wax"),
        },
    ),
    "water": (
        (
            "{n} threw the {o} into the lake.",
            "The {o} slipped out of the boat of {n}.",
            "{n} put the {o} in a tub full of water.",
            "The storm carried the {o} of {n} into the sea.",
        ),
        {
            "The {o} sank to the bottom.": ("clay", "glass", "iron", "stone"),
            "The {o} floated on the water.": ("wood", "rubber", "wax"),
            "The {o} became soft and wet.": ("wool", "paper"),
        },
    ),
    "fire": (
        (
            "{n} left the {o} too close to the fire.",
            "The {o} fell into the flames before {n} could stop it.",
            "{n} put the {o} on the burning coals.",
            "A spark from the stove of {n} landed under the {o}.",
        ),
        {
            "The {o} burned to ashes.": ("wood", "paper", "wool"),
            "The {o} melted.": ("wax", "rubber"),
            "The {o} grew hot but did not burn.": ("clay", "glass", "iron", "stone"),
        },
    ),
    "wind": (
        (
            "{n} left the {o} outside on a windy day.",
            "A strong wind blew over the {o} of {n}.",
            "{n} set the {o} on the wall in the storm.",
            "The wind came while {n} carried the {o}.",
        ),
        {
            "The {o} flew away.": ("paper", "wool"),
            "The {o} stayed where it was.": ("iron", "stone", "wood"),
            "The {o} rolled a little.": ("clay", "glass", "rubber", "wax"),
        },
    ),
    "press": (
        (
            "{n} pressed the {o} with both hands.",
            "{n} sat down on the {o}.",
            "A heavy bag fell on the {o} of {n}.",
            "{n} squeezed the {o} as hard as possible.",
        ),
        {
            "The {o} bent and sprang back.": ("rubber", "wool"),
            "The {o} lost its shape.": ("wax", "paper"),
            "The {o} cracked.": ("clay", "glass"),
            "The {o} did not change at all.": ("iron", "stone", "wood"),
        },
    ),
}


def outcome(thing: str, action: str) -> str:
    """The outcome template of an action on an object, by its material."""
    (found,) = [text for text, materials in ACTIONS[action][1].items() if words.OBJECTS[thing] in materials]
    return found


def held_out_wording(thing: str, action: str) -> int:
    """Index of the action wording that training never uses for this object."""
    return zlib.crc32(f"{action}/{thing}".encode()) % len(ACTIONS[action][0])


def physical_document(rng: random.Random) -> str:
    """Three or four small events with their outcomes, at times with the reason."""
    parts = []
    for _ in range(rng.randint(3, 4)):
        thing, action = rng.choice(list(words.OBJECTS)), rng.choice(list(ACTIONS))
        wordings = ACTIONS[action][0]
        wording = rng.choice([i for i in range(len(wordings)) if i != held_out_wording(thing, action)])
        name = rng.choice(words.WOMEN + words.MEN)
        text = f"{wordings[wording]} {outcome(thing, action)}".format(n=name, o=thing)
        if rng.random() < 0.3:
            text += f" That is because the {thing} is made of {words.OBJECTS[thing]}."
        parts.append(text)
    return "\n".join(parts)


def physical_items(*, num_items: int, seed: int) -> list[dict]:
    """Two-choice items: an event in its held-out wording, the right outcome and another outcome of the same action."""
    rng = random.Random(f"{seed}/items/physical")
    pairs = [(thing, action) for thing in words.OBJECTS for action in ACTIONS]
    items = []
    for index, (thing, action) in enumerate(rng.sample(pairs, num_items)):
        wordings, outcomes = ACTIONS[action]
        right = outcome(thing, action)
        wrong = rng.choice([text for text in outcomes if text != right])
        gold = index % 2
        pair = [wrong, wrong]
        pair[gold] = right
        name = rng.choice(words.WOMEN + words.MEN)
        items.append(
            {
                "context": wordings[held_out_wording(thing, action)].format(n=name, o=thing),
                "choices": [text.format(o=thing) for text in pair],
                "gold": gold,
            }
        )
    rng.shuffle(items)
    return items
