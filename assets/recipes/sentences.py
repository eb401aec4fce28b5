"""Short English sentences made from our own templates and word lists: nobody's text, any number of them.

Plain words that both synthesisers pronounce well, in 2 to 10 words; the same seed gives the same
list on every machine.
"""

import random
import re


def _split(text: str) -> list[str]:
    return text.split()


NUMBERS = _split(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
COLOURS = _split(
    "red green blue yellow orange purple pink brown black white grey golden silver turquoise"
)
NAMES = _split(
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Nora Oscar Paul Rosa "
    "Sam Tina Victor Alice Peter Julia Martin Sofia Thomas"
)
ANIMALS = _split(
    "dog cat horse cow sheep goat rabbit mouse fox wolf bear lion tiger elephant monkey duck "
    "goose chicken eagle owl frog snake turtle whale dolphin shark spider bee butterfly snail"
)
THINGS = _split(
    "table chair lamp window door bottle basket book letter ticket key hammer ladder camera clock "
    "guitar drum piano bicycle car train boat kite ball umbrella coat hat shoe ring mirror candle "
    "blanket pillow map stone flower tree leaf box bell"
)
FOODS = _split(
    "bread butter cheese rice soup salad apple pear banana lemon cherry grape melon tomato potato "
    "carrot onion pepper egg fish honey cake chocolate coffee tea milk water juice"
)
PLACES = _split(
    "kitchen garden school station market library harbour bridge river mountain forest island "
    "village hospital museum theatre beach airport castle farm street roof cellar"
)
VERBS = _split(
    "finds loses buys sells paints carries cleans opens closes hides draws repairs likes"
)
MOVES = _split("walks runs swims climbs jumps crawls slides hurries returns drifts")
ADJECTIVES = _split(
    "small large old new heavy light quiet loud warm cold soft hard clean dirty bright dark round "
    "narrow wide empty full broken wooden simple strange happy tired brave gentle quick slow"
)
MANNERS = _split("quickly slowly quietly carefully happily gladly rarely often always never twice")
TIMES = (
    "today tomorrow tonight yesterday now soon later again at noon at midnight in the morning in "
    "the evening on Monday on Tuesday on Wednesday on Thursday on Friday on Saturday on Sunday in "
    "spring in summer in autumn in winter"
)
TIME_PHRASES = re.findall(r"(?:at|in|on)(?: the)? \w+|\w+", TIMES)

LISTS = {
    "number": NUMBERS,
    "count": NUMBERS[1:],
    "hour": NUMBERS[:12],
    "colour": COLOURS,
    "person": NAMES,
    "animal": ANIMALS,
    "thing": THINGS,
    "food": FOODS,
    "place": PLACES,
    "verb": VERBS,
    "move": MOVES,
    "adjective": ADJECTIVES,
    "time": TIME_PHRASES,
    "manner": MANNERS,
}
TEMPLATES = (
    "{person} {verb} the {adjective} {thing}.",
    "{person} {verb} a {colour} {thing} {time}.",
    "The {adjective} {animal} {move} to the {place}.",
    "The {colour} {animal} {move} {manner}.",
    "There are {count} {adjective} {thing}s in the {place}.",
    "I would like {count} {thing}s, please.",
    "Where is the {adjective} {thing}?",
    "Is the {thing} {colour} or {colour}?",
    "{number} and {number} are more than {number}.",
    "Please put the {food} on the {thing}.",
    "We eat {food} and {food} {time}.",
    "{person} and {person} meet at the {place} {time}.",
    "The {place} is {adjective} and {adjective} {time}.",
    "My {thing} was {adjective}, but yours is {adjective}.",
    "Do not forget the {food} for the {animal}.",
    "{person} said that the {animal} {move} {manner}.",
    "{adjective} {thing}.",
    "{colour} {animal}.",
    "Take the {hour} o'clock train to the {place}.",
    "How many {animal}s can you see from the {place}?",
    "The code is {number}, {number}, {number}.",
    "A {thing} and a {thing} lie behind the {colour} {thing}.",
    "{time} {person} {move} to the {place}.",
    "It is too {adjective} in the {place} {time}.",
    "Who {verb} the {thing} in the {place}?",
)
PLURALS = {"mouses": "mice", "gooses": "geese", "sheeps": "sheep", "wolfs": "wolves"}


def sentences(count: int, seed: int) -> list[str]:
    """`count` different sentences; a longer list starts with the shorter one."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[sentence(rng)] = None
    return list(found)


def sentence(rng: random.Random) -> str:
    """One sentence, its grammar mended where the templates are too simple."""
    template = rng.choice(TEMPLATES)
    filled = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(LISTS[slot[1]]), template)
    return mend(filled)


def mend(text: str) -> str:
    """`a orange` → `an orange`, `boxs` → `boxes`, `leafs` → `leaves`; a capital at the start."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    text = re.sub(r"(?<=[xz])s\b", "es", text)
    text = re.sub(r"\blea?fs\b", "leaves", text)
    text = re.sub(r"\b(?:bus|match|torch)s\b", lambda word: word[0][:-1] + "es", text)
    text = re.sub(r"\b(\w+[^aeiou])ys\b", r"\1ies", text)
    text = " ".join(PLURALS.get(word, word) for word in text.split(" "))
    return text[0].upper() + text[1:]
