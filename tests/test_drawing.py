import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import drawing
from saccade.drawing import heat_range, overlay, position_similarity, shorten, training_curves, typeface
from saccade.errors import UserError


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float64)


def test_overlay_is_bright_where_the_heat_is_and_keeps_the_picture():
    random = np.random.default_rng(0)
    texture = random.integers(60, 190, (64, 96), dtype=np.uint8)
    image = Image.fromarray(texture).convert("RGB")
    heat = np.zeros((4, 6), np.float32)
    heat[1, 4] = 3.0
    drawn = overlay(image, heat)
    assert drawn.size == image.size and drawn.mode == "RGB"
    brightness = pixels(drawn).sum(axis=2)
    assert brightness[16:32, 64:80].mean() > 1.5 * brightness[40:, :40].mean()
    away = brightness[40:, :40].ravel(), texture[40:, :40].ravel()
    assert np.corrcoef(*away)[0, 1] > 0.99


def test_overlay_colours_only_the_region():
    image = Image.new("RGB", (40, 20), (200, 30, 30))
    drawn = pixels(overlay(image, np.eye(4, dtype=np.float32), (10, 0, 30, 20)))
    outside = np.concatenate([drawn[:, :10], drawn[:, 30:]], axis=1)
    assert (outside.max(axis=2) - outside.min(axis=2)).max() == 0  # grey
    assert (drawn[:, 10:30].max(axis=2) - drawn[:, 10:30].min(axis=2)).min() > 0


@pytest.mark.parametrize("heat", [np.zeros((3, 3)), np.full((1, 1), 7.0), np.full((2, 2), np.nan)])
def test_overlay_of_a_map_without_contrast_is_even(heat):
    drawn = pixels(overlay(Image.new("RGB", (12, 12), "white"), heat))
    assert drawn.std(axis=(0, 1)).max() == 0


def test_colours_span_at_least_a_quarter_of_the_largest_value():
    assert heat_range(np.array([[0.2, 1.0]])) == pytest.approx((0.2, 1.0))
    assert heat_range(np.array([[0.95, 1.0]])) == pytest.approx((0.85, 1.1))  # nearly even: looks nearly even
    low, high = heat_range(np.zeros((2, 2)))
    assert low < 0 < high


@pytest.mark.parametrize("region", [(0, 0, 21, 10), (5, 0, 5, 10), (-1, 0, 5, 5)])
def test_overlay_refuses_a_region_outside_of_the_picture(region):
    with pytest.raises(UserError, match="cannot lie on"):
        overlay(Image.new("RGB", (20, 10)), np.ones((2, 2)), region)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_overlay_takes_any_kind_of_picture(mode):
    assert overlay(Image.new(mode, (8, 8)), np.ones((2, 2))).mode == "RGB"


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (18, 20)])
def test_position_similarity_draws_any_grid(tmp_path, grid):
    embeddings = torch.randn(grid[0] * grid[1], 8, requires_grad=True)
    path = position_similarity(embeddings, grid, tmp_path / "new" / "positions.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 400 and max(picture.size) < 2500


def test_position_similarity_has_its_peak_on_the_diagonal(tmp_path):
    with Image.open(position_similarity(np.eye(4), (2, 2), tmp_path / "p.png")) as picture:
        drawn = pixels(picture)
    yellow = (drawn[:, :1350, 0] > 240) & (drawn[:, :1350, 2] < 60)  # left of the colour bar
    assert 0.05 < yellow.mean() < 0.25  # one patch of four in each map


def test_position_similarity_refuses_another_grid(tmp_path):
    with pytest.raises(UserError, match="do not belong to a grid of 3 x 3"):
        position_similarity(np.zeros((10, 4)), (3, 3), tmp_path / "p.png")


def rows(count: int) -> list[dict]:
    made = [{"step": s, "loss": 2 * math.exp(-s / 50) + 0.1 * (s % 3), "lr": 1e-3 * s / count} for s in range(count)]
    for row in made[9::10]:
        row.update(val_loss=row["loss"] + 0.2, val_top1=0.5 + row["step"] / count / 3, val_seconds=3.0)
    return made


@pytest.mark.parametrize("count", [1, 12, 200])
def test_training_curves(tmp_path, count):
    with Image.open(training_curves(rows(count), tmp_path / "new" / "curves.png")) as picture:
        assert min(picture.size) > 500


def test_training_curves_with_gaps_faults_and_text(tmp_path):
    made = rows(100)
    made[5]["loss"] = math.nan
    made[6]["loss"] = math.inf
    del made[7]["loss"]
    made[8]["lr"] = None
    made += [{"step": "", "loss": 1.0}, {"loss": 1.0}]
    text = [{key: str(value) for key, value in row.items()} | {"note": "", "val_top5": ""} for row in made]
    assert training_curves(made, tmp_path / "a.png").exists()
    assert training_curves(text, tmp_path / "b.png").exists()


def test_training_curves_of_detections(tmp_path, monkeypatch):
    """A threshold is no share, and a legend hides no curve."""
    figures = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: figures.append(figure) or path)
    made = [
        {"step": 10 * i, "loss": 5 - i, "lr": 1, "val_ap": ap, "val_ap50": 2 * ap, "val_f1": 0.4, "val_threshold": 0.3}
        for i, ap in enumerate((0.1, 0.45, 0.2))
    ]
    training_curves(made, tmp_path / "a.png")
    loss, shares, threshold, rate = figures[0].axes
    assert [line.get_label() for line in shares.lines if not line.get_label().startswith("_")] == ["AP", "AP50", "F1"]
    assert shares.get_title("right") == "best AP 45.0 % at step 10"
    figures[0].draw_without_rendering()
    assert threshold.get_ylim() == (0, 1) and "0.50" in [text.get_text() for text in threshold.get_yticklabels()]
    for axes in (loss, shares):
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    assert rate.get_title("left") == "Learning rate"


def test_training_curves_of_translations(tmp_path, monkeypatch):
    """BLEU and chrF go to 100, beside a perplexity that is no score; the early ones may be below 1."""
    drawn = {}
    monkeypatch.setattr(drawing, "_draw_scores", lambda axes, scores: drawn.update(scores))
    made = [
        {"step": 10 * i, "loss": 5 - i, "val_loss": 4, "val_perplexity": 54, "val_bleu": bleu, "val_chrf": 20}
        for i, bleu in enumerate((0.2, 9.0, 31.5))
    ]
    training_curves(made, tmp_path / "a.png")
    assert list(drawn) == ["val_bleu", "val_chrf"] and drawn["val_bleu"][1].tolist() == [0.2, 9.0, 31.5]
    monkeypatch.undo()
    assert training_curves(made[:1], tmp_path / "b.png").exists()
    figures = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: figures.append(figure) or path)
    training_curves([{**row, "val_cut": cut} for row, cut in zip(made, (1.0, 0.2, 0.0), strict=True)], tmp_path)
    titles = [axes.get_title("left") for axes in figures[0].axes]
    assert titles == ["Loss", "Validation", "Translations that did not end"]
    assert figures[0].axes[2].get_ylim()[0] == 0


def test_losses_that_cannot_be_compared_say_so(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: figures.append(figure) or path)
    made = [{"step": i, "loss": 5 - i, "val_loss": 4 - i} for i in range(3)]
    training_curves(made, tmp_path / "a.png", ["label smoothing", "dropout"])
    training_curves([{"step": 1, "loss": 2}], tmp_path / "b.png", ["dropout"])
    said = [figure.axes[0].get_title("right") for figure in figures]
    assert said == ["training with label smoothing and dropout, validation without", ""]


@pytest.mark.parametrize("made", [[], [{"step": 1}], [{"step": 1, "loss": math.nan}]])
def test_training_curves_of_nothing(tmp_path, made):
    with pytest.raises(UserError, match="nothing to draw"):
        training_curves(made, tmp_path / "c.png")


def test_shorten_keeps_both_ends():
    assert shorten("short", 10) == "short"
    cut = shorten("a long name\nof a class, number 17", 20)
    assert len(cut) <= 20 and cut.startswith("a long") and cut.endswith("17") and "…" in cut


def test_typeface_for_text_that_no_font_has():
    assert typeface("\U0010fffd", 12).getlength("x") > 0


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    training_curves(rows(5), tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


def test_importing_costs_neither_matplotlib_nor_torch():
    code = "import saccade.predictions, sys; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
