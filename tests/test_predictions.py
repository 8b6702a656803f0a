import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from saccade.errors import UserError
from saccade.predictions import Classification, contact_sheet


def prediction(size: tuple[int, int] = (48, 32), label: str = "daisy", source: str = "a/b/photo.jpg", **changes):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    top = ((label, float(np.float32(0.7))), ("tulips", 0.2), ("roses", 0.1))
    made = Classification(label, 0.7, top, np.array([0.7, 0.2, 0.1]), source, image, random.random((4, 6)), None)
    return dataclasses.replace(made, **changes)


def test_one_line_and_json():
    assert str(prediction()) == "a/b/photo.jpg: daisy 70.0 % (tulips 20.0 %, roses 10.0 %)"
    assert str(prediction(top=(("daisy", 0.7),))) == "a/b/photo.jpg: daisy 70.0 %"
    read = json.loads(json.dumps(prediction().to_dict()))
    assert read["label"] == "daisy" and read["source"] == "a/b/photo.jpg" and len(read["top"]) == 3
    assert read["top"][0] == {"label": "daisy", "score": pytest.approx(0.7)}


SHAPES = [(8, 8), (1, 1), (128, 128), (900, 60), (60, 900), (5000, 20)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_saves_pictures_of_any_shape(tmp_path, size):
    path = prediction(size).save(tmp_path / "new" / "folder" / "card.png")
    with Image.open(path) as picture:
        assert 300 < picture.width < 1500 and 200 < picture.height < 1500
        # The margins hold nothing: no text and no picture runs out of the canvas.
        edge = np.asarray(picture.convert("L")).astype(int)
        assert all(part.min() == 255 for part in (edge[:10], edge[-10:], edge[:, :10], edge[:, -10:]))


def test_long_and_foreign_labels_stay_inside(tmp_path):
    for i, label in enumerate(["x" * 300, "ひまわり", "two\nlines", "", "$a_b$ [bold]"]):
        with Image.open(prediction(label=label).save(tmp_path / f"{i}.png")) as picture:
            assert np.asarray(picture.convert("L"))[:, -10:].min() == 255


def test_never_overwrites(tmp_path):
    made = [prediction().save(tmp_path / "card.png") for _ in range(3)]
    assert [path.name for path in made] == ["card.png", "card-1.png", "card-2.png"]
    (tmp_path / "sheet.png").write_text("mine")
    assert contact_sheet([prediction()], tmp_path / "sheet.png").name == "sheet-1.png"
    assert (tmp_path / "sheet.png").read_text() == "mine"


def test_a_folder_takes_the_name_of_the_source(tmp_path):
    assert prediction().save(tmp_path / "out") == tmp_path / "out" / "photo.png"
    assert prediction(source="image 3").save(tmp_path / "out") == tmp_path / "out" / "image-3.png"
    (tmp_path / "v1.0").mkdir()
    assert prediction().save(tmp_path / "v1.0") == tmp_path / "v1.0" / "photo.png"


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".PNG"])
def test_other_formats(tmp_path, suffix):
    with Image.open(prediction().save(tmp_path / f"card{suffix}")) as picture:
        assert picture.width > 300


def test_attention_lies_on_its_region_only(tmp_path):
    image = Image.new("RGB", (100, 100), (0, 90, 200))
    with Image.open(prediction(image=image, region=(25, 0, 75, 100)).save(tmp_path / "card.png")) as picture:
        drawn = np.asarray(picture).astype(int)
    middle = drawn[drawn.shape[0] // 2]
    blue = (middle == (0, 90, 200)).all(axis=1)
    assert blue.sum() == 400  # the picture itself, untouched
    second = middle[448:848]  # beside it, after the margin and the gap
    grey = second.max(axis=1) == second.min(axis=1)
    assert grey[:99].all() and grey[301:].all() and not grey[110:290].all()


def test_without_attention_and_without_picture(tmp_path):
    assert prediction(attention=None).save(tmp_path / "a.png").exists()
    with pytest.raises(UserError, match="holds no picture"):
        prediction(image=None).save(tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_what_cannot_be_written_is_an_error_for_people(tmp_path):
    with pytest.raises(UserError, match=r"not \.docx"):
        prediction().save(tmp_path / "card.docx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prediction().save(tmp_path / "file" / "card.png")


@pytest.mark.parametrize("size", [(8, 8), (900, 60), (60, 900)], ids=str)
@pytest.mark.parametrize("explained", [True, False])
def test_contact_sheet(tmp_path, size, explained):
    many = [prediction(size, attention=np.ones((2, 2)) if explained else None) for _ in range(7)]
    path = contact_sheet(many, tmp_path / "sheet.png", ["daisy"] * 6 + ["a very long class name that must be cut"])
    with Image.open(path) as picture:
        edge = np.asarray(picture.convert("L"))
        assert all(part.min() == 255 for part in (edge[:10], edge[-10:], edge[:, :10], edge[:, -10:]))


def test_contact_sheet_marks_right_and_wrong(tmp_path):
    grey = [prediction(image=Image.new("RGB", (32, 32), "grey"), attention=None) for _ in range(2)]

    def colours(truths: list[str] | None) -> tuple[bool, bool]:
        with Image.open(contact_sheet(grey, tmp_path / "sheet.png", truths)) as picture:
            red, green, _ = np.moveaxis(np.asarray(picture).astype(int), 2, 0)
        return bool((red - green > 100).any()), bool((green - red > 60).any())

    assert colours(None) == (False, False)
    assert colours(["daisy", "daisy"]) == (False, True)
    assert colours(["roses", "daisy"]) == (True, True)


def test_contact_sheet_draws_a_hundred_at_most(tmp_path):
    tiny = prediction((8, 8), attention=None)
    with Image.open(contact_sheet([tiny] * 130, tmp_path / "sheet.png")) as picture:
        assert max(picture.size) < 3500


def test_contact_sheet_refuses(tmp_path):
    with pytest.raises(UserError, match="no predictions"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(UserError, match="2 predictions cannot be compared with 1"):
        contact_sheet([prediction()] * 2, tmp_path / "sheet.png", ["daisy"])
