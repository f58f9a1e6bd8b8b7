"""The made-up world's own suite: objects, colours, positions, counts to six, zero and negation, with pictures that are
true to them.

    suite = made_up_suite(per_category=20, seed=0)
    picture, detections = draw_truthfully(suite.prompts[0], size=64, rng=rng)

Prompts are worded as the world's captions are where the world has captions of that kind (one or two things); counts,
zero and negation are beyond what a model of the world has read, which is what they are there for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.demo.world import COLOURS, OPPOSITE, SHAPES, TRIANGLE_SIDE, background, coverage
from training.evaluation.composition import Detection
from training.evaluation.suites import RELATIONS, Asked, Prompt, Question, Suite

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
CATEGORIES = ("single", "colour", "two", "position", *(f"count {word}" for word in NUMBERS[1:]), "zero", "negation")
CELLS = {1: (1, 1), 2: (2, 1), 3: (2, 2), 4: (2, 2), 5: (3, 2), 6: (3, 2)}  # columns and rows that hold so many things


def made_up_suite(per_category: int = 20, seed: int = 0) -> Suite:
    """`per_category` prompts of each category; fewer where the world has not so many different ones."""
    prompts: list[Prompt] = []
    for number, category in enumerate(CATEGORIES):
        rng = np.random.default_rng([seed, 29, number])
        found: dict[str, Prompt] = {}
        for _ in range(40 * per_category):
            prompt = _prompt(category, rng)
            found.setdefault(prompt.text, prompt)
            if len(found) == per_category:
                break
        prompts += found.values()
    return Suite("made_up", "made_up", tuple(prompts))


def _prompt(category: str, rng: np.random.Generator) -> Prompt:
    colour, other = (str(name) for name in rng.permutation(list(COLOURS))[:2])
    shape, second = (SHAPES[int(n)] for n in rng.integers(len(SHAPES), size=2))
    thing, also = f"a {colour} {shape}", f"a {other} {second}"
    asked: tuple[Asked, ...] = (Asked(shape, 1, colour),)
    forbidden: tuple[Asked, ...] = ()
    if category == "single":
        text, asked = f"a {shape}", (Asked(shape),)
    elif category == "colour":
        text = thing
    elif category == "two":
        text, asked = f"{thing} and {also}", (*asked, Asked(second, 1, other))
    elif category == "position":
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        spoken = f"to the {relation}" if relation.endswith("of") else relation
        text = f"{thing} {spoken} {also}"
        asked = (Asked(shape, 1, colour, relation, 1), Asked(second, 1, other))
    elif category.startswith("count"):
        count = NUMBERS.index(category.removeprefix("count "))
        plural = shape if count == 1 else f"{shape}s"
        text, asked = f"{NUMBERS[count]} {colour} {plural}", (Asked(shape, count, colour),)
        forbidden = (Asked("", count + 1),)
    elif category == "zero":
        second = next(name for name in rng.permutation(list(SHAPES)) if name != shape)
        text, asked = f"zero {shape}s and one {other} {second}", (Asked(str(second), 1, other),)
        forbidden = (Asked(shape, 1),)
    else:
        wording = int(rng.integers(2))
        text = (f"{thing} and no {other} things", f"a {shape} that is not {other}")[wording]
        asked = (asked, (Asked(shape),))[wording]
        forbidden = (Asked("", 1, other), Asked(shape, 1, other))[wording : wording + 1]
    return Prompt(text, "made_up", category, asked, forbidden, _questions(asked, forbidden))


def _questions(asked: Sequence[Asked], forbidden: Sequence[Asked]) -> tuple[Question, ...]:
    """What a person could be asked of the picture, with the answer that the prompt gives (after TIFA)."""
    found = []
    colours = tuple(COLOURS)
    for one in asked:
        found.append(Question(f"Is there a {one.thing}?", "yes"))
        if one.colour:
            found.append(Question(f"What colour is the {one.thing}?", one.colour, colours))
        if one.count > 1:
            found.append(Question(f"How many {one.thing}s are there?", str(one.count), tuple("0123456")))
        if one.relation:
            said = f"Is the {one.colour} {one.thing} {one.relation} the {asked[one.to].colour} {asked[one.to].thing}?"
            found.append(Question(said, "yes"))
    found += [
        Question(f"Is there a {one.colour} {one.thing}?".replace("  ", " "), "no") for one in forbidden if one.thing
    ]
    return tuple(found)


# --- pictures that are true to a prompt -------------------------------------------------------------------------------


def draw_truthfully(prompt: Prompt, size: int, rng: np.random.Generator) -> tuple[Image.Image, list[Detection]]:
    """A picture of `size` pixels a side that shows the prompt, and what is in it."""
    things = _things(prompt, rng)
    places = _places(prompt, len(things), rng)
    picture = background(size, size, rng)
    found = []
    for (shape, colour), (x, y, diameter) in zip(things, places, strict=True):
        drop = TRIANGLE_SIDE * diameter / (4 * np.sqrt(3)) if shape == "triangle" else 0.0
        cover = coverage(shape, size, size, x * size, (y + drop) * size, diameter * size)[..., None]
        own = np.array(COLOURS[colour], np.float32) + rng.uniform(-6, 6, size=3).astype(np.float32)
        picture = picture * (1 - cover) + own * cover
        found.append(Detection(shape, colour, x, y, diameter, diameter))
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8)), found


def _things(prompt: Prompt, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(shape, colour) of every object; what the prompt leaves open is drawn at random among what it does not forbid."""
    found = []
    for one in prompt.asked:
        for _ in range(one.count):
            open_to = [
                (shape, colour)
                for shape in SHAPES
                for colour in COLOURS
                if one.thing in ("", shape) and one.colour in ("", colour) and not _forbids(prompt, shape, colour)
            ]
            found.append(open_to[int(rng.integers(len(open_to)))])
    return found


def _forbids(prompt: Prompt, shape: str, colour: str) -> bool:
    return any(one.count == 1 and one.thing in ("", shape) and one.colour in ("", colour) for one in prompt.forbidden)


def _places(prompt: Prompt, count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and diameter of each thing, apart from each other, in units of the picture's side."""
    columns, rows = CELLS[count]
    if count == 2 and rng.random() < 0.5:
        columns, rows = rows, columns
    relation = next((one.relation for one in prompt.asked if one.relation), "")
    if relation:
        columns, rows = (2, 1) if relation.endswith("of") else (1, 2)
    width, height = 1 / columns, 1 / rows
    widest = min(width, height)
    cells = rng.permutation(columns * rows)[:count]
    if relation:
        cells = np.array([0, 1] if relation in ("left of", "above") else [1, 0])
    found = []
    for cell in cells:
        diameter = min(0.42, 0.74 * widest) * rng.uniform(0.9, 1.0)
        # A triangle is 1.2 diameters wide: what is left of the cell beyond it is room to move.
        room_x, room_y = (side / 2 - 0.62 * diameter for side in (width, height))
        x = (cell % columns + 0.5) * width + rng.uniform(-1, 1) * max(room_x - 0.01, 0)
        y = (cell // columns + 0.5) * height + rng.uniform(-1, 1) * max(room_y - 0.01, 0) * (0.3 if relation else 1)
        found.append((float(x), float(y), float(diameter)))
    return found


def contradict(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """A prompt alike in kind that asks for something else: one more or less, another colour, the other side."""
    one = prompt.asked[0]
    if one.relation:
        changed = Asked(one.thing, 1, one.colour, OPPOSITE[one.relation], one.to)
        return Prompt(prompt.text, prompt.suite, prompt.category, (changed, *prompt.asked[1:]), prompt.forbidden)
    if prompt.category.startswith("count"):
        count = one.count + 1 if one.count == 1 or rng.random() < 0.5 else one.count - 1
        count = min(count, 5) if one.count == 6 else count
        changed = Asked(one.thing, count, one.colour)
        return Prompt(prompt.text, prompt.suite, prompt.category, (changed,), (Asked("", count + 1),))
    colours = [name for name in COLOURS if name != one.colour]
    shapes = [name for name in SHAPES if name != one.thing]
    changed = Asked(one.thing, 1, str(rng.choice(colours))) if one.colour else Asked(str(rng.choice(shapes)))
    return Prompt(prompt.text, prompt.suite, prompt.category, (changed, *prompt.asked[1:]), prompt.forbidden)
