"""Scenes of colored shapes, and captions with a relation that is true in the picture.

    the red circle is left of the blue square          Item.caption
    the blue square is left of the red circle          Item.swapped().caption

Both captions use the same words, and each is true in one picture and false in the other: a test item of Winoground.
Everything is drawn from one `random.Random(seed)`, so the same seed gives the same scenes on every machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels, all four inside the shape

COLORS = {"red": (214, 39, 40), "green": (44, 140, 44), "blue": (31, 80, 200), "yellow": (240, 200, 30)}
KINDS = ("circle", "square", "triangle", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND = (245, 245, 245)


@dataclass(frozen=True)
class Shape:
    """One object: `large red circle`, and where its center is."""

    color: str
    kind: str
    size: str
    center: tuple[int, int]
    radius: int

    @property
    def box(self) -> Box:
        """The smallest box around the shape."""
        (x, y), r = self.center, self.radius
        return x - r, y - r, x + r, y + r

    def is_(self, relation: str, other: "Shape") -> bool:
        """Whether this shape is `relation` the other: the boxes have a gap between them along that axis."""
        if relation in ("right of", "below"):
            return other.is_(OPPOSITE[relation], self)
        axis = ("left of", "above").index(relation)
        return self.box[axis + 2] < other.box[axis]


@dataclass(frozen=True)
class Scene:
    """A picture to be: its width and height, and its shapes. The first two play the roles, the others distract."""

    width: int
    height: int
    shapes: tuple[Shape, ...]

    @property
    def regions(self) -> tuple[Shape, ...]:
        """The shapes in reading order, for region features: the order of `shapes` would give the roles away."""
        return tuple(sorted(self.shapes, key=lambda shape: shape.center[::-1]))

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of `regions`."""
        return tuple(shape.box for shape in self.regions)

    def swapped(self) -> "Scene":
        """The scene in which the first two shapes have changed places, and with them their roles."""
        first, second, *others = self.shapes
        return replace(
            self, shapes=(replace(second, center=first.center), replace(first, center=second.center), *others)
        )


@dataclass(frozen=True)
class Item:
    """A scene and what its caption says: `relations[i]` holds between the first shape and shape i + 1."""

    scene: Scene
    relations: tuple[str, ...]
    sized: bool = False

    @property
    def image(self) -> Image.Image:
        """The rendered scene."""
        return render(self.scene)

    @property
    def caption(self) -> str:
        """`the red circle is left of the blue square and above the green triangle`: a clause for each relation."""
        first, *others = [self._name(shape) for shape in self.scene.shapes]
        clauses = [f"{relation} the {other}" for relation, other in zip(self.relations, others, strict=False)]
        return f"the {first} is {' and '.join(clauses)}"

    def swapped(self) -> "Item":
        """The caption with its first two nouns exchanged, and the picture in which that is true."""
        return replace(self, scene=self.scene.swapped())

    def true_in(self, scene: Scene) -> bool:
        """Whether this caption is true in some other scene: a negative for training must be a false one."""
        there = {self._name(shape): shape for shape in scene.shapes}
        first, *others = [there.get(self._name(shape)) for shape in self.scene.shapes[: len(self.relations) + 1]]
        return first is not None and all(
            other is not None and first.is_(relation, other)
            for relation, other in zip(self.relations, others, strict=True)
        )

    def _name(self, shape: Shape) -> str:
        return f"{shape.size} {shape.color} {shape.kind}" if self.sized else f"{shape.color} {shape.kind}"


@dataclass(frozen=True)
class World:
    """What scenes may look like. `World().items(100, seed=0)` draws a hundred of them.

    Attributes:
        colors: Names from `COLORS`.
        kinds: Names from `KINDS`. No two shapes of a scene agree in color and kind.
        relations: Names from `RELATIONS`.
        shapes: Least and greatest number of shapes in a scene, 2 to 9.
        pictures: Widths and heights that pictures may have.
        sized: Share of captions that call shapes small or large.
        clauses: Share of captions that say a second thing about the first shape, where a third shape is there.
    """

    colors: Sequence[str] = ("red", "green", "blue")
    kinds: Sequence[str] = ("circle", "square", "triangle")
    relations: Sequence[str] = RELATIONS
    shapes: tuple[int, int] = (3, 3)
    pictures: Sequence[tuple[int, int]] = ((96, 96),)
    sized: float = 0.0
    clauses: float = 0.0

    def __post_init__(self) -> None:
        least, greatest = self.shapes
        if not 2 <= least <= greatest <= 9:
            raise ValueError(
                f"shapes must be 2 <= least <= greatest <= 9 (a picture has nine cells), not {self.shapes}."
            )
        if (looks := len(self.colors) * len(self.kinds)) < greatest:
            raise ValueError(
                f"{greatest} shapes that all look different need {greatest} pairs of color and kind, not {looks}."
            )

    def items(self, n: int, seed: int) -> list[Item]:
        """`n` scenes with their captions. The first k of them do not depend on n."""
        rng = random.Random(seed)
        return [self._item(rng) for _ in range(n)]

    def _item(self, rng: random.Random) -> Item:
        (width, height), relation = rng.choice(self.pictures), rng.choice(self.relations)
        looks = rng.sample([(c, k) for c in self.colors for k in self.kinds], rng.randint(*self.shapes))
        while True:  # two cells of nine are apart along a given axis, in a given order, one time in three
            cells = rng.sample([(x, y) for x in range(3) for y in range(3)], len(looks))
            shapes = tuple(_place(rng, look, cell, width, height) for look, cell in zip(looks, cells, strict=True))
            if shapes[0].is_(relation, shapes[1]):
                break
        relations = [relation]
        second = [r for r in self.relations if len(shapes) > 2 and shapes[0].is_(r, shapes[2])]
        if second and rng.random() < self.clauses:  # none of them may hold, where the world lacks one of the four
            relations.append(rng.choice(second))
        return Item(Scene(width, height, shapes), tuple(relations), rng.random() < self.sized)


def _place(rng: random.Random, look: tuple[str, str], cell: tuple[int, int], width: int, height: int) -> Shape:
    """A shape somewhere in one of nine cells, where also the largest shape would fit.

    So shapes never overlap, shapes in different columns (rows) have a gap, and both survive any exchange of places.
    """
    size = rng.choice(("small", "large"))
    largest = min(width, height) // 8
    x, y = (
        rng.randint(i * side // 3 + largest + 1, (i + 1) * side // 3 - largest - 1)
        for i, side in zip(cell, (width, height), strict=True)
    )
    return Shape(*look, size, (x, y), largest if size == "large" else largest * 2 // 3)


def render(scene: Scene) -> Image.Image:
    """The picture: flat colors, no smoothing, so a pixel is either a shape's color or the background."""
    image = Image.new("RGB", (scene.width, scene.height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        (left, top, right, bottom), (x, y), fill = shape.box, shape.center, COLORS[shape.color]
        if shape.kind == "circle":
            draw.ellipse(shape.box, fill=fill)
        elif shape.kind == "square":
            draw.rectangle(shape.box, fill=fill)
        elif shape.kind == "triangle":
            draw.polygon([(left, bottom), (x, top), (right, bottom)], fill=fill)
        elif shape.kind == "diamond":
            draw.polygon([(left, y), (x, top), (right, y), (x, bottom)], fill=fill)
        else:
            raise ValueError(f"Cannot draw a {shape.kind!r}: the kinds are {', '.join(KINDS)}.")
    return image
