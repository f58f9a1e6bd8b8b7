"""A reader of pixels for the made-up world: which coloured shapes are in a picture, and is that what was asked for?

    from pipelines.demo.checker import judge
    verdict = judge(pixels, scene)      # Judgement(colour_ok=True, shape_ok=True, ...)

It knows nothing of CLIP or of the model that drew: it measures how far each pixel is from a light background, groups
what stands out by colour, and fits each shape's outline to each group. So it can judge a model whose training data a
CLIP has filtered. It reads drawings from 32x32 up, also slightly blurred ones, and says "unknown" for what is neither
colour nor shape of the world.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pipelines.demo.world import COLOURS, SHAPES, Scene, coverage, shape_area

UNKNOWN = "unknown"
READ_SIDE = 64  # pictures are read at about this many pixels a side, so that thresholds mean the same at any size
LACKING = 40.0  # every colour of the world has a channel near this value (world.COLOURS)
LIGHTEST_GROUND = 150.0  # a background darker than this in any channel is none of the world's
SMALLEST_AREA = 0.012  # of the central square: a third of the smallest thing's area
FARTHEST_COLOUR = 75.0  # RGB distance beyond which a colour has no name; the palette's own are at least 114 apart
WORST_FIT = 0.28  # pixels wrongly covered, as a fraction of the thing's area, beyond which a shape has no name


@dataclass(frozen=True)
class Found:
    """One object read from a picture. x, y: centroid, and area, in units of the shorter side (squared for area).

    misfit: how badly the named shape's outline fits, as a fraction of the area; 0 is perfect.
    """

    colour: str
    shape: str
    x: float
    y: float
    area: float
    misfit: float


@dataclass(frozen=True)
class Judgement:
    """Whether a picture shows what a scene asks for.

    colour_ok: every asked-for colour is there, and no other.
    shape_ok: every asked-for thing is there: an object of its colour that has its shape.
    count_ok: there are as many objects as things asked for.
    relation_ok: two objects of the asked-for colours stand as asked; None where the scene has one thing.
    """

    colour_ok: bool
    shape_ok: bool
    count_ok: bool
    relation_ok: bool | None
    found: tuple[Found, ...] = ()

    @property
    def all_ok(self) -> bool:
        return self.colour_ok and self.shape_ok and self.count_ok and self.relation_ok is not False


def find_objects(pixels: np.ndarray) -> list[Found]:
    """The objects in an RGB uint8 picture (height, width, 3), largest first.

    Raises ValueError for another type or shape, or a picture under 32 pixels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 32:
        raise ValueError(
            f"checker: got {pixels.dtype} {pixels.shape}; expected uint8 (height, width, 3) of at least 32x32 pixels"
        )
    picture = pixels.astype(np.float32)
    zoom = READ_SIDE / min(picture.shape[:2])
    if zoom < 1:
        # Average before sampling: noise of one pixel is no object.
        picture = ndimage.gaussian_filter(picture, (0.4 / zoom, 0.4 / zoom, 0))
    picture = np.clip(ndimage.zoom(picture, (zoom, zoom, 1), order=1, grid_mode=True, mode="nearest"), 0, 255)

    lowest = picture.min(axis=2)
    light = lowest > LIGHTEST_GROUND
    if light.mean() < 0.2:
        return []
    ground = np.array([np.median(picture[..., channel][light]) for channel in range(3)])
    ground_lowest = float(np.median(lowest[light]))
    # How much of each pixel is object: 1 where the lacking channel is as dark as a drawn colour's, 0 on the background.
    cover = np.clip((ground_lowest - lowest) / (ground_lowest - LACKING), 0, 1)
    # The background varies; only what is well above its variation counts.
    cover[cover < 0.25] = 0

    # Take the background out of half-covered pixels, so that an edge has the colour of its object.
    share = np.maximum(cover, 0.3)[..., None]
    own = np.clip(ground + (picture - ground) / share, 0, 255)
    palette = np.array(list(COLOURS.values()), np.float32)
    nearest = np.linalg.norm(own[:, :, None] - palette, axis=-1).argmin(axis=-1)

    found = []
    for colour in range(len(palette)):
        labels, count = ndimage.label((nearest == colour) & (cover > 0.5))
        for label in range(1, count + 1):
            core = labels == label
            if core.sum() < SMALLEST_AREA * READ_SIDE**2:
                continue
            found.append(_read(core, cover, picture))
    return sorted(found, key=lambda thing: -thing.area)


def _read(core: np.ndarray, cover: np.ndarray, picture: np.ndarray) -> Found:
    """Colour and shape of one connected group of pixels."""
    inside = ndimage.binary_erosion(core)
    inside = inside if inside.sum() >= 4 else core
    mean = np.median(picture[inside], axis=0)
    distances = {name: float(np.linalg.norm(mean - np.array(rgb))) for name, rgb in COLOURS.items()}
    colour = min(distances, key=distances.__getitem__)
    if distances[colour] > FARTHEST_COLOUR:
        colour = UNKNOWN

    # The soft rim belongs to the object; other objects' pixels do not.
    mask = np.where(ndimage.binary_dilation(core, iterations=2), cover, 0)
    mask = np.where(core, np.maximum(mask, 0.9), mask)
    area = float(mask.sum())
    height, width = mask.shape
    y, x = (float(v) for v in ndimage.center_of_mass(mask))
    misfits = {shape: _misfit(mask, shape, x + 0.5, y + 0.5, area) for shape in SHAPES}
    shape = min(misfits, key=misfits.__getitem__)
    misfit = misfits[shape]
    side = min(height, width)
    return Found(
        colour=colour,
        shape=shape if misfit <= WORST_FIT else UNKNOWN,
        x=(x + 0.5) / side,
        y=(y + 0.5) / side,
        area=area / side**2,
        misfit=misfit,
    )


def _misfit(mask: np.ndarray, shape: str, x: float, y: float, area: float) -> float:
    """Pixels wrongly covered by the outline of that centroid and area, as a fraction of the area."""
    diameter = float(np.sqrt(area / shape_area(shape, 1.0)))
    outline = coverage(shape, mask.shape[0], mask.shape[1], x, y, diameter)
    difference = ndimage.gaussian_filter(outline, 1.0) - ndimage.gaussian_filter(mask, 0.6)
    return float(np.abs(difference).sum() / area)


def judge(pixels: np.ndarray, scene: Scene) -> Judgement:
    """Whether the picture shows the scene; see Judgement."""
    found = find_objects(pixels)
    asked = scene.things
    colour_ok = {thing.colour for thing in found} == {thing.colour for thing in asked}
    drawn = {(thing.colour, thing.shape) for thing in found}
    shape_ok = all((thing.colour, thing.shape) in drawn for thing in asked)
    relation_ok = None
    if scene.relation is not None:
        colours = (asked[0].colour, asked[1].colour)
        relation_ok = any(
            (first.colour, second.colour) == colours and _stands(scene.relation, first, second)
            for first, second in itertools.permutations(found, 2)
        )
    return Judgement(colour_ok, shape_ok, len(found) == len(asked), relation_ok, tuple(found))


def _stands(relation: str, first: Found, second: Found) -> bool:
    """True if first is <relation> second, that direction being the larger part of what lies between them."""
    across, down = first.x - second.x, first.y - second.y
    if relation in ("above", "below"):
        return abs(down) >= abs(across) * 0.8 and (down < 0) == (relation == "above") and down != 0
    return abs(across) >= abs(down) * 0.8 and (across < 0) == (relation == "left of") and across != 0
