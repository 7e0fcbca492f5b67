"""Word lists of the tiny world: the raw material from which `world.py` draws entities and facts."""

from __future__ import annotations

WOMEN = (
    "Ada Alma Anna Bea Bella Bess Cara Clara Cora Dana Della Dora Edie Ella Emma Etta Eva Faye Flora Freya Gia Greta Gwen "
    "Hana Hazel Helen Ida Ines Iris Ivy Jane Jill Joan June Kate Kira Lana Lena Lila Lucy Mabel Mara Mina Molly Nadia Nell "
    "Nina Nora Olga Opal Pia Rita Rosa Ruth Sara Tess Tilda Una Vera Zoe"
).split()
MEN = (
    "Abel Adam Alan Axel Basil Ben Boris Bram Carl Cole Cyrus Dan Dean Dirk Earl Eli Emil Evan Felix Finn Frank Gary Glen "
    "Gus Hal Hank Henry Hugo Ian Igor Ivan Jack Jake Joel Karl Ken Kurt Lars Leo Liam Luke Mark Max Miles Ned Nils Noah Omar "
    "Oscar Otto Paul Pete Ralf Rex Rolf Sam Seth Theo Toby Vic"
).split()
TOWNS = (
    "Brillow Carden Dunmere Elstow Farrow Galden Harwick Ilford Jarrow Kelding Lorrin Marsden Norwell Oakham Pendle Quorn "
    "Ravenby Selby Thorley Ulver Vexham Wendle Yarrow Zennor"
).split()
RIVERS = "Ash Bryn Coll Dove Esk Fenn Glim Hest Isk Kenn Lune Mole".split()
JOBS = (
    "baker miller smith farmer teacher tailor sailor weaver hunter fisher painter singer doctor potter cook judge "
    "printer gardener carpenter shepherd"
).split()
COLOURS = "red blue green yellow white black brown grey purple orange".split()
INSTRUMENTS = "flute drum harp fiddle horn lute bell pipe organ trumpet".split()
MONTHS = "January February March April May June July August September October November December".split()
BUILDINGS = "tower castle bridge temple mill library market school theatre harbour".split()
PRODUCTS = "salt wool glass honey cheese silk paper copper wine rope soap leather".split()
HOBBIES = "chess dancing running swimming reading sewing skating climbing riding singing".split()

# singular -> plural
ANIMALS = {
    "fox": "foxes", "wolf": "wolves", "goat": "goats", "sheep": "sheep", "goose": "geese", "mouse": "mice", "owl": "owls",
    "duck": "ducks", "bear": "bears", "hare": "hares", "frog": "frogs", "crab": "crabs", "spider": "spiders", "bee": "bees",
    "horse": "horses", "cow": "cows", "cat": "cats", "dog": "dogs", "snake": "snakes", "deer": "deer", "crow": "crows",
    "otter": "otters", "badger": "badgers", "pig": "pigs", "lizard": "lizards", "swan": "swans", "donkey": "donkeys",
    "ant": "ants",
}
HABITATS = "forest meadow river desert swamp barn cave mountain lake garden".split()
DIETS = "grass seeds fish berries insects roots leaves nuts eggs worms".split()
SOUNDS = "howl hiss bark croak buzz squeak growl whistle hum snort".split()
SIZES = "tiny small large huge".split()

FOODS = (
    "apple pear plum peach cherry lemon onion carrot turnip pumpkin cabbage bean pie soup cake bread cheese honey stew "
    "porridge pudding tart salad omelette"
).split()
TASTES = "sweet sour salty bitter spicy mild".split()
SEASONS = "spring summer autumn winter".split()

# object -> material; the material decides what happens to it (see physical.py)
OBJECTS = {
    "mug": "clay", "bowl": "clay", "pot": "clay", "tile": "clay", "jug": "clay", "vase": "glass", "bottle": "glass",
    "mirror": "glass", "lens": "glass", "goblet": "glass", "key": "iron", "nail": "iron", "anchor": "iron", "shovel": "iron",
    "kettle": "iron", "chain": "iron", "stool": "wood", "spoon": "wood", "crate": "wood", "plank": "wood", "ladder": "wood",
    "barrel": "wood", "scarf": "wool", "blanket": "wool", "sock": "wool", "hat": "wool", "mitten": "wool", "letter": "paper",
    "map": "paper", "book": "paper", "ticket": "paper", "poster": "paper", "ball": "rubber", "tyre": "rubber", "boot": "rubber",
    "hose": "rubber", "candle": "wax", "seal": "wax", "crayon": "wax", "statue": "stone", "brick": "stone", "pillar": "stone",
    "pebble": "stone",
}
ROOMS = "kitchen cellar attic shed hall barn study porch".split()

# tool -> (base, past participle target): "to cut the rope"
TOOLS = {
    "knife": "cut the rope", "hammer": "drive the nail", "saw": "cut the board", "needle": "mend the shirt",
    "broom": "sweep the floor", "bucket": "carry the water", "brush": "paint the fence", "rake": "gather the leaves",
    "axe": "chop the log", "comb": "tidy the hair", "scale": "weigh the flour", "lamp": "light the room",
    "pump": "fill the tank", "oven": "bake the dough", "sponge": "wash the plate", "spade": "dig the hole",
    "clock": "tell the time", "net": "catch the fish", "whistle": "call the dog", "oar": "row the boat",
    "pen": "write the note", "drill": "bore the wall", "iron": "press the cloth", "funnel": "pour the oil",
}

# base, third person, past, object of the verb
ACTIVITIES = (
    ("bake", "bakes", "baked", "a loaf"), ("sweep", "sweeps", "swept", "the yard"), ("read", "reads", "read", "a book"),
    ("sing", "sings", "sang", "a song"), ("feed", "feeds", "fed", "the birds"), ("catch", "catches", "caught", "a fish"),
    ("write", "writes", "wrote", "a letter"), ("draw", "draws", "drew", "a picture"), ("wash", "washes", "washed", "the cart"),
    ("carry", "carries", "carried", "a basket"), ("buy", "buys", "bought", "some milk"), ("ride", "rides", "rode", "a horse"),
    ("climb", "climbs", "climbed", "the hill"), ("cook", "cooks", "cooked", "a meal"), ("mend", "mends", "mended", "a net"),
    ("water", "waters", "watered", "the roses"),
)


def with_article(noun: str) -> str:
    """The noun phrase with its indefinite article: `an apple`, `a pear`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched."""
    return text[0].upper() + text[1:]


def pronouns(name: str) -> dict[str, str]:
    """Subject, object and possessive pronouns of a person: keys `he`, `him`, `his`, and `He`, `His`."""
    he, him, his = ("she", "her", "her") if name in WOMEN else ("he", "him", "his")
    return {"he": he, "him": him, "his": his, "He": capitalised(he), "His": capitalised(his)}
