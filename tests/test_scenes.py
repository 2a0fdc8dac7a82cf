"""Scenes and captions: what a caption says is looked up in the pixels, with none of the generator's own geometry."""

from collections import Counter
from itertools import combinations

import pytest
from PIL import Image

from benchmarks.compositionality.scenes import BACKGROUND, COLORS, KINDS, RELATIONS, Item, Scene, Shape, World, render

VARIED = World(
    colors=tuple(COLORS),
    kinds=KINDS,
    shapes=(2, 4),
    pictures=((96, 96), (144, 96), (96, 128), (61, 97)),
    sized=0.5,
    clauses=0.5,
)
ITEMS = VARIED.items(300, seed=7)

RED = Shape("red", "circle", "large", (20, 30), 8)
BLUE = Shape("blue", "square", "small", (60, 40), 5)
GREEN = Shape("green", "triangle", "large", (25, 70), 8)
ITEM = Item(Scene(96, 96, (RED, BLUE, GREEN)), ("left of", "above"), sized=True)


def centroid(image: Image.Image, color: str) -> tuple[float, float]:
    """Mean position of the pixels of one color."""
    where = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == COLORS[color]]
    return sum(x for x, _ in where) / len(where), sum(y for _, y in where) / len(where)


def test_hand_value() -> None:
    assert ITEM.caption == "the large red circle is left of the small blue square and above the large green triangle"
    assert Item(ITEM.scene, ("left of",)).caption == "the red circle is left of the blue square"
    assert RED.box == (12, 22, 28, 38)
    assert [RED.is_(relation, BLUE) for relation in RELATIONS] == [True, False, False, False]  # heights overlap
    assert [BLUE.is_(relation, RED) for relation in RELATIONS] == [False, True, False, False]
    assert [GREEN.is_(relation, RED) for relation in RELATIONS] == [False, False, False, True]
    assert not any(RED.is_(relation, RED) for relation in RELATIONS)


def test_hand_value_of_the_swap() -> None:
    swapped = ITEM.swapped()
    assert swapped.caption == "the small blue square is left of the large red circle and above the large green triangle"
    assert swapped.scene.shapes == (
        Shape("blue", "square", "small", (20, 30), 5),
        Shape("red", "circle", "large", (60, 40), 8),
        GREEN,
    )


def test_shapes_touching_or_overlapping_along_an_axis_are_in_no_relation_along_it() -> None:
    touching = Shape("blue", "square", "small", (33, 80), 5)  # its left edge is 28, the red circle's right edge
    assert not RED.is_("left of", touching)
    assert RED.is_("left of", Shape("blue", "square", "small", (34, 80), 5))
    assert RED.is_("above", touching)


def test_pictures_show_the_shapes() -> None:
    image = render(ITEM.scene)
    assert (image.size, image.mode) == ((96, 96), "RGB")
    assert [image.getpixel(shape.center) for shape in (RED, BLUE, GREEN)] == [
        COLORS["red"],
        COLORS["blue"],
        COLORS["green"],
    ]
    counts = Counter(image.getpixel((x, y)) for x in range(96) for y in range(96))
    assert set(counts) == {BACKGROUND, COLORS["red"], COLORS["blue"], COLORS["green"]}
    assert counts[COLORS["blue"]] == 11 * 11
    assert counts[COLORS["red"]] == pytest.approx(3.14159 * 8.5**2, rel=0.05)
    assert counts[COLORS["green"]] == pytest.approx(17 * 17 / 2, rel=0.1)


def test_kinds_look_different() -> None:
    areas = {}
    for kind in KINDS:
        image = render(Scene(40, 40, (Shape("red", kind, "large", (20, 20), 9),)))
        areas[kind] = bytes(image.tobytes())
        assert image.getpixel((20, 20)) == COLORS["red"]
        outside = [(x, y) for x in range(40) for y in range(40) if not (11 <= x <= 29 and 11 <= y <= 29)]
        assert {image.getpixel(point) for point in outside} == {BACKGROUND}
    assert len(set(areas.values())) == len(KINDS)
    with pytest.raises(ValueError, match="Cannot draw a 'star'"):
        render(Scene(40, 40, (Shape("red", "star", "large", (20, 20), 9),)))


def check_caption_in_pixels(caption: str, item: Item) -> bool:
    """Whether the pixels of an item's picture bear out the first clause of a caption. Words and colors only."""
    words = caption.split(" and ")[0].replace("small ", "").replace("large ", "").split()
    first, second = words[1:3], words[-2:]
    image, centers = item.image, {}
    for shape in item.scene.shapes:
        left, top, right, bottom = shape.box
        middle = (left + right) // 2, (top + bottom) // 2
        assert image.getpixel(middle) == COLORS[shape.color]
        centers[shape.color, shape.kind] = middle
    (x0, y0), (x1, y1) = centers[*first], centers[*second]
    return {"left": x0 < x1, "right": x0 > x1, "above": y0 < y1, "below": y0 > y1}[words[4]]


def test_captions_hold_in_the_pixels_and_not_in_the_swapped_picture() -> None:
    for item in ITEMS:
        swapped = item.swapped()
        assert check_caption_in_pixels(item.caption, item)
        assert check_caption_in_pixels(swapped.caption, swapped)
        assert not check_caption_in_pixels(item.caption, swapped)
        assert not check_caption_in_pixels(swapped.caption, item)
        truth = [[caption.true_in(picture.scene) for picture in (item, swapped)] for caption in (item, swapped)]
        assert truth == [[True, False], [False, True]]


def test_colors_are_where_the_caption_says() -> None:
    """The same by the pixels alone, in scenes where a color names a shape."""
    items = World(colors=("red", "blue"), kinds=("circle",), shapes=(2, 2)).items(40, seed=3)
    for item in items:
        words = item.caption.split()
        (x0, y0), (x1, y1) = centroid(item.image, words[1]), centroid(item.image, words[-2])
        assert {"left": x0 < x1, "right": x0 > x1, "above": y0 < y1, "below": y0 > y1}[words[4]], item.caption


def test_a_swap_exchanges_words_and_nothing_else() -> None:
    for item in ITEMS:
        swapped = item.swapped()
        assert swapped != item
        assert swapped.swapped() == item
        assert sorted(swapped.caption.split()) == sorted(item.caption.split())
        assert swapped.caption != item.caption
        assert {shape.center for shape in swapped.scene.shapes} == {shape.center for shape in item.scene.shapes}


def test_shapes_do_not_overlap_and_stay_inside_before_and_after_the_swap() -> None:
    for scene in [scene for item in ITEMS for scene in (item.scene, item.swapped().scene)]:
        for a, b in combinations(scene.shapes, 2):
            assert any(a.is_(relation, b) for relation in RELATIONS)
        painted = Image.new("L", (scene.width, scene.height))
        for left, top, right, bottom in scene.boxes:
            assert left >= 0
            assert top >= 0
            assert right < scene.width
            assert bottom < scene.height
            assert painted.crop((left, top, right + 1, bottom + 1)).getextrema() == (0, 0)
            painted.paste(1, (left, top, right + 1, bottom + 1))


def test_no_caption_is_ambiguous() -> None:
    for item in ITEMS:
        looks = [(shape.color, shape.kind) for shape in item.scene.shapes]
        assert len(set(looks)) == len(looks)


def test_second_clauses_hold() -> None:
    items = [item for item in ITEMS if len(item.relations) == 2]
    assert len(items) > 50
    for scene, relations in [(scene, item.relations) for item in items for scene in (item.scene, item.swapped().scene)]:
        assert scene.shapes[0].is_(relations[1], scene.shapes[2])


def test_regions_do_not_give_the_roles_away() -> None:
    assert ITEM.scene.regions == (RED, BLUE, GREEN)
    assert ITEM.scene.boxes == (RED.box, BLUE.box, GREEN.box)
    assert Scene(96, 96, (GREEN, BLUE, RED)).regions == (RED, BLUE, GREEN)
    first_in_reading_order = Counter(item.scene.regions.index(item.scene.shapes[0]) for item in World().items(600, 0))
    assert min(first_in_reading_order[place] for place in range(3)) > 120


def test_true_in_knows_absent_shapes_and_sizes() -> None:
    assert not ITEM.true_in(Scene(96, 96, (RED, GREEN)))
    larger = Shape("blue", "square", "large", (60, 40), 8)
    elsewhere = Scene(96, 96, (GREEN, larger, RED))
    assert not ITEM.true_in(elsewhere)  # it says small
    assert Item(ITEM.scene, ("left of", "above"), sized=False).true_in(elsewhere)


def test_the_same_seed_gives_the_same_scenes() -> None:
    assert VARIED.items(300, seed=7) == ITEMS
    assert VARIED.items(20, seed=7) == ITEMS[:20]
    assert VARIED.items(20, seed=8) != ITEMS[:20]
    assert World().items(1, seed=0)[0].caption == "the green square is below the blue square"


def test_worlds_offer_what_they_are_asked_for() -> None:
    assert {item.relations[0] for item in ITEMS} == set(RELATIONS)
    assert {len(item.scene.shapes) for item in ITEMS} == {2, 3, 4}
    assert {item.image.size for item in ITEMS} == set(VARIED.pictures)
    assert {len(item.caption.split()) for item in ITEMS} >= {8, 9, 10, 11, 14, 15, 17, 18}
    plain = World().items(200, seed=0)
    assert {len(item.caption.split()) for item in plain} == {8, 9}
    assert {shape.color for item in plain for shape in item.scene.shapes} == {"red", "green", "blue"}
    assert {shape.kind for item in plain for shape in item.scene.shapes} == {"circle", "square", "triangle"}
    assert {len(item.scene.shapes) for item in plain} == {3}
    one_way = World(relations=("above",), clauses=1.0).items(100, seed=0)
    assert {relation for item in one_way for relation in item.relations} == {"above"}
    assert {len(item.relations) for item in one_way} == {1, 2}


@pytest.mark.parametrize("shapes", [(1, 3), (3, 2), (2, 10)])
def test_rejects_impossible_numbers_of_shapes(shapes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"shapes must be 2 <= least <= greatest <= 9"):
        World(shapes=shapes)


def test_rejects_too_few_looks() -> None:
    with pytest.raises(ValueError, match=r"5 shapes that all look different need 5 pairs of color and kind, not 4"):
        World(colors=("red", "blue"), kinds=("circle", "square"), shapes=(2, 5))
