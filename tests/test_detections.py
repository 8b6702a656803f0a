import builtins
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from saccade import UserError
from saccade.drawing import COLOURS, RED, class_colour
from saccade.predictions import Detections
from saccade.predictions.cards import names_apart
from saccade.predictions.detection_card import _place, class_colours, draw_boxes, draw_card, surest

NAMES = ("cell", "traffic light", "x" * 300, "ひまわり", "", "two\nlines", "$a_b$ [bold]", "h", "i", "j")


def made(
    size: tuple[int, int] = (640, 480), count: int = 12, classes: int = 7, maps: bool = True, seed: int = 0, **changes
) -> Detections:
    random = np.random.default_rng(seed)
    corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * size
    labels = random.integers(0, classes, count)
    image = Image.new("RGB", size, (200, 190, 180))
    found = Detections(
        boxes=corners.reshape(count, 4).astype(np.float32),
        scores=np.sort(random.random(count).astype(np.float32))[::-1],
        labels=tuple(NAMES[k] for k in labels),
        classes=labels,
        size=(size[1], size[0]),
        source="a/b/blood film.jpg",
        picture=lambda: image,
        maps=random.random((count, 5, 7)).astype(np.float32) if maps else None,
    )
    return dataclasses.replace(found, **changes)


def two() -> Detections:
    boxes = np.array([[10.0, 20, 30.5, 60], [0, 0, 5, 4.25]], np.float32)
    scores = np.array([0.75, 0.5], np.float32)
    return Detections(boxes, scores, ("cell", "traffic light"), np.array([0, 1]), (48, 64), "blood.jpg")


def test_one_line():
    assert str(two()) == "blood.jpg: 1 cell, 1 traffic light"
    assert str(made(count=20, classes=2)) == "a/b/blood film.jpg: 10 traffic light, 10 cell"
    assert str(two().above(0.9)) == "blood.jpg: nothing found"
    assert len(two()) == 2


def test_one_after_the_other():
    found = two()
    cell, light = found
    assert (cell.label, cell.score, cell.box, cell.class_index) == ("cell", 0.75, (10.0, 20.0, 30.5, 60.0), 0)
    assert str(light) == "traffic light 50.0 % at (0, 0, 5, 4)" and cell.map is None
    assert [one.label for one in found] == list(found.labels) and found[-1].label == "traffic light"
    assert list(found.above(0.9)) == []
    many = made()
    for one, heat in zip(many, many.maps if many.maps is not None else (), strict=True):
        assert one.map is heat or np.array_equal(one.map if one.map is not None else (), heat)
    with pytest.raises(IndexError):
        found[2]


def test_what_python_prints_is_short():
    assert repr(two()) == "<Detections blood.jpg: 1 cell, 1 traffic light>"
    assert len(repr(made(count=300))) < 1000 and "array" not in repr(made()) and "map" not in repr(made()[0])


def test_names_that_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_apart(["a/x.jpg", "a/y z.png", "a/x.jpg"]) == {"a/x.jpg": "x", "a/y z.png": "y z"}
    assert names_apart(["a/x.jpg", "b/X.jpg"]) == {"a/x.jpg": "a-x", "b/X.jpg": "b-X"}
    assert list(names_apart(["1/a/x.jpg", "2/a/x.jpg", "2/b/x.jpg"]).values()) == ["1-a-x", "2-a-x", "2-b-x"]
    assert list(names_apart(["x.jpg", "x.png"]).values()) == ["x-jpg", "x-png"]
    assert list(names_apart(["x.jpg", "a/x.jpg"]).values()) == [f"{tmp_path.name}-x", "a-x"]
    assert list(names_apart(["a/x.jpg", "./a/x.jpg"]).values()) == ["x", "x"]  # one and the same
    many = [f"{i}/{k}/x.{suffix}" for i in range(3) for k in range(3) for suffix in ("jpg", "png")]
    assert len(set(names_apart(many).values())) == len(many)


def test_json():
    facts = json.loads(json.dumps(two().to_dict()))
    assert facts == {
        "source": "blood.jpg",
        "width": 64,
        "height": 48,
        "detections": [
            {"label": "cell", "class": 0, "score": 0.75, "box": [10.0, 20.0, 30.5, 60.0]},
            {"label": "traffic light", "class": 1, "score": 0.5, "box": [0.0, 0.0, 5.0, 4.25]},
        ],
    }
    assert two().above(0.9).to_dict()["detections"] == []


def test_coco_results_are_read_by_coco_tools():
    rows = json.loads(json.dumps(two().to_coco(7)))
    assert rows[0] == {"image_id": 7, "category_id": 1, "bbox": [10.0, 20.0, 20.5, 40.0], "score": 0.75}
    assert [row["category_id"] for row in two().to_coco("a", [18, 44])] == [18, 44]
    coco = pytest.importorskip("pycocotools.coco")
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": 7, "width": 64, "height": 48}], "categories": [{"id": 1}, {"id": 2}], "annotations": []
    }  # fmt: skip
    truth.createIndex()
    assert len(truth.loadRes(rows).anns) == 2


def test_supervision():
    sv = pytest.importorskip("supervision")
    found = two().to_supervision()
    assert isinstance(found, sv.Detections) and np.array_equal(found.xyxy, two().boxes)
    assert found.class_id is not None and found.class_id.tolist() == [0, 1]
    assert found.confidence is not None and found.confidence.tolist() == [0.75, 0.5]
    assert list(found.data["class_name"]) == ["cell", "traffic light"]
    assert len(two().above(0.9).to_supervision()) == 0


def test_without_supervision_it_is_said(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "supervision":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install supervision"):
        two().to_supervision()


def test_above_keeps_what_belongs_together():
    found = made()
    kept = found.above(float(found.scores[4]))
    assert len(kept) == 5 and kept.maps is not None and found.maps is not None
    assert np.array_equal(kept.boxes, found.boxes[:5]) and kept.labels == found.labels[:5]
    assert np.array_equal(kept.maps, found.maps[:5]) and np.array_equal(kept.classes, found.classes[:5])


SHAPES = [(640, 480), (8, 8), (1, 1), (900, 60), (60, 900), (5000, 20), (20, 5000)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize("maps", [True, False], ids=["maps", "plain"])
def test_saves_pictures_of_any_shape_with_any_number_of_boxes(tmp_path, size, count, maps):
    path = made(size, count, maps=maps).save(tmp_path / "new" / "folder" / "card.png")
    with Image.open(path) as picture:
        assert 300 < picture.width < 1600 and 100 < picture.height < 2200
        edge = np.asarray(picture.convert("L")).astype(int)
        assert all(part.min() == 255 for part in (edge[:10], edge[-10:], edge[:, :10], edge[:, -10:]))


def test_boxes_are_drawn_where_they_are():
    """On a plain ground: what has the colour of a class is its box's outline (or its label), and all of it is there."""
    image = Image.new("RGB", (400, 300), "#888888")
    boxes = np.array([[50, 60, 150, 160], [200.2, 100.4, 320, 250.3]], np.float32)
    found = dataclasses.replace(two(), boxes=boxes)
    draw_boxes(image, found, np.ones(2), class_colours(found))
    pixels = np.asarray(image)
    for box, k in zip(boxes.round().astype(int), (0, 1), strict=True):
        colour = [int(COLOURS[k][i : i + 2], 16) for i in (1, 3, 5)]
        ys, xs = np.nonzero((pixels == colour).all(axis=2))
        assert xs.min() == box[0] and ys.max() == box[3] - 1 and xs.max() == box[2] - 1
        assert (pixels[box[1] : box[3], box[0]] == colour).all()
        assert (pixels[box[3] - 1, box[0] : box[2]] == colour).all()


def test_labels_stay_in_the_picture_and_off_each_other(monkeypatch):
    import saccade.predictions.detection_card as card

    places = []
    real = card._place

    def watched(box, size, most, placed, others):
        place = real(box, size, most, placed, others)
        if place is not None:
            assert (place[:2] >= 0).all() and (place[2:] <= most).all()
            places.append(place)
        return place

    monkeypatch.setattr(card, "_place", watched)
    found = made(count=60)
    image = Image.new("RGB", (640, 480))
    draw_boxes(image, found, np.ones(2), class_colours(found))
    assert len(places) > 10
    for i, a in enumerate(places):
        for b in places[:i]:
            assert (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) <= 0).any()
    places.clear()
    draw_boxes(Image.new("RGB", (12, 12)), found, np.ones(2) / 50, class_colours(found))
    assert not places, "no room for any"


def test_the_colour_of_a_class_hangs_on_the_class_alone():
    many = made(count=40, classes=8)
    assert len(set(class_colours(many).values())) == len(set(many.classes.tolist())) == 8
    clash = class_colours(dataclasses.replace(two(), classes=np.array([1, 9])))
    others = class_colours(dataclasses.replace(two(), classes=np.array([2, 9])))
    assert clash == {1: class_colours(two())[1], 9: others[9]}
    assert len({class_colour(k) for k in range(91)}) == 91
    assert RED not in COLOURS  # red beside green is what many cannot tell apart


def test_the_list_is_in_the_order_of_the_classes(monkeypatch):
    """However many there are of each, so that no line hops from picture to picture."""
    import saccade.predictions.detection_card as card

    written: list[str] = []
    write = card.write

    def watched(draw, place, text, *values, **options):
        written.append(text)
        write(draw, place, text, *values, **options)

    monkeypatch.setattr(card, "write", watched)
    names, classes = ("c", "c", "c", "a", "b", "b"), np.array([2, 2, 2, 0, 1, 1])
    draw_card(dataclasses.replace(made(count=6), labels=names, classes=classes), Image.new("RGB", (640, 480)))
    order = "".join(text for text in written if text in names)
    assert order == "abbccc" + "abc", "of the tiles, then of the list"


def test_a_label_keeps_its_corner_where_it_may():
    """Above the left end, though another box is there that it hides a little of."""
    boxes = np.array([[100.0, 100, 200, 200], [60, 20, 180, 140]])
    place = _place(boxes[0], np.array([60, 19]), np.array([640, 480]), [], boxes[1:])
    assert place is not None and place.tolist() == [100, 81, 160, 100]
    small = np.array([[90.0, 80, 140, 102]])  # of which little would be left
    moved = _place(boxes[0], np.array([60, 19]), np.array([640, 480]), [], small)
    assert moved is not None and moved.tolist() != [100, 81, 160, 100]


def test_tiles_are_of_every_class():
    found = made(count=9, classes=3)
    order = surest(found)
    assert sorted(order) == list(range(9))
    first = order[: len(set(found.classes.tolist()))]
    assert {int(found.classes[i]) for i in first} == set(found.classes.tolist())
    for k in set(found.classes.tolist()):
        own = [i for i in order if found.classes[i] == k]
        assert own == sorted(own)


def test_never_overwrites_and_takes_the_name_of_the_source(tmp_path):
    found = made(count=2)
    assert [found.save(tmp_path / "card.png").name for _ in range(2)] == ["card.png", "card-1.png"]
    assert found.save(tmp_path / "out") == tmp_path / "out" / "blood-film.png"
    with pytest.raises(UserError, match="no picture"):
        two().save(tmp_path / "out")
    with pytest.raises(UserError, match=r"not \.bmp"):
        found.save(tmp_path / "card.bmp")
