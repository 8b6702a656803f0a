"""Pictures for people: the shared leaves. No display, no global state of pyplot; matplotlib is imported when used."""

from __future__ import annotations

import colorsys
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFont

from saccade.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

Region = tuple[float, float, float, float]  # left, top, right, bottom in pixels of a picture

INK = "#1f2933"
FAINT = "#7b8794"
BLUE = "#2563a8"
ORANGE = "#d9730d"
RED = "#c62828"
GREEN = "#2e7d32"
# Of the first classes. Told apart by nearly everybody: https://jfly.uni-koeln.de/color/, in the order of how well they
# stand on photographs
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333", "#f0e442")
GOLDEN = (math.sqrt(5) - 1) / 2  # turns of the colour wheel from one class to the next, so that none is met again soon

# Scripts that the first font lacks, on Linux, macOS and Windows; only those that are installed are used.
WIDE_COVERAGE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "WenQuanYi Zen Hei",
    "Noto Sans Devanagari", "Nirmala UI", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip


@lru_cache(1)
def font_families() -> tuple[str, ...]:
    """A font that comes with matplotlib, then those that are installed for other scripts."""
    from matplotlib.font_manager import fontManager

    installed = {entry.name for entry in fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in WIDE_COVERAGE if name in installed))


@lru_cache(64)
def _font_file(family: str, bold: bool) -> tuple[str, frozenset[int]]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    path = str(findfont(FontProperties(family=family, weight="bold" if bold else "normal")))
    return path, frozenset(FT2Font(path).get_charmap())


@lru_cache(256)
def _font_of(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def typeface(text: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font for Pillow, `size` in pixels, that has every character of `text` where one is installed."""
    files = [_font_file(family, bold) for family in font_families()]
    needed = {ord(character) for character in text if not character.isspace()}
    path = next((path for path, characters in files if needed <= characters), files[0][0])
    return _font_of(path, size)


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters. Cut in the middle, because names often differ at either end."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return text[: limit - 1 - tail].rstrip() + "…" + text[len(text) - tail :].lstrip()


def class_colour(k: int) -> str:
    """The colour of the class at position `k` of the model's or data's names: the same in every picture and chart."""
    if k < len(COLOURS):
        return COLOURS[k]
    lightness = (0.38, 0.56, 0.47)[k % 3]
    parts = colorsys.hls_to_rgb(k * GOLDEN % 1, lightness, 0.65)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


@contextmanager
def chart_style() -> Iterator[None]:
    """Our look for one chart, independent of the user's own matplotlib settings."""
    import matplotlib

    style: Any = {
        "font.family": list(font_families()),
        "font.size": 10,
        "text.parse_math": False,  # a class may be called "$5 note"
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#b8c2cc",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.axisbelow": True,
        "grid.color": "#e4e7eb",
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.framealpha": 0.85,
        "legend.edgecolor": "white",
        "figure.constrained_layout.w_pad": 0.15,
        "figure.constrained_layout.h_pad": 0.12,
        "figure.facecolor": "white",
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A script without a font shows as boxes; a warning for each of its letters helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        with matplotlib.rc_context(style):
            yield


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a chart as PNG; the folder is made. UserError where that is not possible."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, format="png", metadata={"Software": "saccade"})
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror or error})") from None
    return path


def overlay(image: Image.Image, heat: np.ndarray, region: Region | None = None) -> Image.Image:
    """The picture under a heat map (h, w), non-negative, that covers `region` of it; the rest of the picture is faded.

    The map is scaled to its own range, but for one that is nearly even, which looks so: see `heat_range`. The picture
    keeps its size.
    """

    image = image.convert("RGB")
    left, top, right, bottom = (round(edge) for edge in region or (0, 0, *image.size))
    if heat.ndim != 2 or not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise UserError(
            f"a map of shape {heat.shape} cannot lie on {(left, top, right, bottom)} of a picture of {image.size}"
        )

    heat = np.nan_to_num(np.asarray(heat, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = heat_range(heat)
    level = (heat - low) / (high - low)
    smooth = Image.fromarray(level).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    colour = heat_colours(level)

    pixels = np.asarray(image, np.float32) / 255
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    muted = 0.5 * pixels + 0.5 * grey[..., None]  # full colours of the picture would be taken for those of the map
    result = 0.35 * grey[..., None] + 0.65 * np.ones_like(pixels)
    inside = np.s_[top:bottom, left:right]
    # What got little attention keeps more of the picture: it must be seen what the model did not look at.
    cover = (0.4 + 0.3 * level)[..., None]
    result[inside] = (1 - cover) * muted[inside] + cover * colour
    return Image.fromarray((result.clip(0, 1) * 255 + 0.5).astype(np.uint8))


LEAST_CONTRAST = 0.25  # of the largest value, which the colours always span


def heat_range(heat: np.ndarray) -> tuple[float, float]:
    """The values of the first and the last colour. A map without any contrast gets the middle one everywhere."""
    low, high = float(heat.min()), float(heat.max())
    half = max(high - low, LEAST_CONTRAST * high, 1e-30) / 2
    return (low + high) / 2 - half, (low + high) / 2 + half


def heat_colours(level: np.ndarray) -> np.ndarray:
    """Levels from 0 to 1 -> colours (..., 3) from 0 to 1."""
    import matplotlib

    return matplotlib.colormaps["inferno"](level)[..., :3].astype(np.float32)


def position_similarity(embeddings: np.ndarray | Tensor, grid: tuple[int, int], path: str | Path) -> Path:
    """Cosine similarity of each patch's position embedding (N, C) to all others, a map per patch of the grid (h, w).

    Dosovitskiy et al. 2021, figure 7. Patches along a side are sampled where there are more than 16.
    """
    from matplotlib.figure import Figure

    if not isinstance(embeddings, np.ndarray):
        embeddings = embeddings.detach().float().cpu().numpy()
    h, w = grid
    if embeddings.ndim != 2 or len(embeddings) != h * w or h * w == 0:
        raise UserError(f"position embeddings of shape {tuple(embeddings.shape)} do not belong to a grid of {h} x {w}")

    unit = np.asarray(embeddings, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    rows = np.unique(np.linspace(0, h - 1, min(h, 16)).round().astype(int))
    columns = np.unique(np.linspace(0, w - 1, min(w, 16)).round().astype(int))
    chosen = (rows[:, None] * w + columns).ravel()
    maps = (unit[chosen] @ unit.T).reshape(len(rows), len(columns), h, w)

    # Drawn at a whole number of pixels per value, so that no row or column of a map looks wider than its neighbour.
    across = max(len(rows) * h, len(columns) * w)
    zoom = max(1, round(1200 / across))
    gap = max(3, round(0.08 * max(h, w) * zoom))
    tall, wide = len(rows) * (h * zoom + gap) - gap, len(columns) * (w * zoom + gap) - gap
    mosaic = np.full((tall, wide), np.nan)
    for i in range(len(rows)):
        for j in range(len(columns)):
            y, x = i * (h * zoom + gap), j * (w * zoom + gap)
            mosaic[y : y + h * zoom, x : x + w * zoom] = np.kron(maps[i, j], np.ones((zoom, zoom)))

    dpi, margin_left, margin_bottom, margin_right, margin_top = 150, 110, 100, 190, 84
    width, height = max(wide, 500) + margin_left + margin_right, max(tall, 350) + margin_bottom + margin_top
    with chart_style():
        figure = Figure(figsize=(width / dpi, height / dpi))
        x = margin_left + (width - margin_left - margin_right - wide) // 2
        y = margin_bottom + (height - margin_bottom - margin_top - tall) // 2
        axes = figure.add_axes((x / width, y / height, wide / width, tall / height))
        low = min(0.0, float(maps.min()))
        picture = axes.imshow(mosaic, cmap="viridis", vmin=low, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_xticks((np.arange(len(columns)) * (w * zoom + gap) + w * zoom / 2).tolist(), (columns + 1).tolist())
        axes.set_yticks((np.arange(len(rows)) * (h * zoom + gap) + h * zoom / 2).tolist(), (rows + 1).tolist())
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("patch column")
        axes.set_ylabel("patch row")
        title = "Similarity of position embeddings"
        figure.text(margin_left / width, 1 - 42 / height, title, va="center", weight="bold", size=12)
        bar = figure.add_axes(((x + wide + 45) / width, y / height, 26 / width, tall / height))
        figure.colorbar(picture, cax=bar, label="cosine similarity").outline.set_visible(False)  # type: ignore[operator]
        return save_figure(figure, path, dpi)


ASIDE: dict[str, Any] = {"fontsize": 10, "fontweight": "normal"}  # of a title to the right
SCORES = {"val_bleu": "BLEU", "val_chrf": "chrF"}  # from 0 to 100
NO_SHARES = ("val_loss", "val_threshold", "val_cut", *SCORES)
SHOWN_NAMES = {"top1": "top-1", "top5": "top-5", "ap": "AP", "ap50": "AP50", "ap75": "AP75", "f1": "F1"}
CHOOSES = ("val_top1", "val_ap")  # by which the kept model is chosen
PANELS = {"loss": 3.0, "scores": 2.6, "shares": 2.6, "cut": 1.5, "threshold": 1.5, "lr": 1.5}  # and their heights


def training_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, harder: Sequence[str] = ()) -> Path:
    """Loss, validation and learning rate over the steps of a run.

    `harder`: what training has and validation has not, such as dropout, so that their losses cannot be compared.
    A row has `step` and any of `loss`, `lr`, `val_loss`, `val_threshold`, `val_bleu`, `val_chrf`, `val_cut` and
    other `val_*` shares in 0..1. Missing values (absent, None, "", NaN) are left out; losses that were not finite are
    marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    series = _series(rows)
    losses = {key: series[key] for key in ("loss", "val_loss") if key in series}
    shares = {
        key: (steps, values)
        for key, (steps, values) in series.items()
        if key.startswith("val_") and key not in NO_SHARES and np.min(values) >= 0 and np.max(values) <= 1
    }
    scores = {key: series[key] for key in SCORES if key in series}
    there = {
        "loss": losses,
        "shares": shares,
        "scores": scores,
        "cut": "val_cut" in series,
        "threshold": "val_threshold" in series,
        "lr": "lr" in series,
    }
    panels = [name for name in PANELS if there[name]]
    if not panels:
        raise UserError("there is nothing to draw yet: no row has a loss, a validation result or a learning rate")

    with chart_style():
        heights = [PANELS[name] for name in panels]
        figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        places: dict[str, Axes] = dict(zip(panels, grid[:, 0], strict=True))
        for axes in places.values():
            axes.grid(True)
            axes.margins(x=0.01)
        if "loss" in places:
            _draw_losses(places["loss"], losses, rows, harder)
        if "shares" in places:
            _draw_shares(places["shares"], shares)
        if "scores" in places:
            _draw_scores(places["scores"], scores)
        if "cut" in places:
            places["cut"].set_title("Translations that did not end")
            places["cut"].yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
            places["cut"].plot(*series["val_cut"], color=FAINT, marker="o", markersize=3.5)
            places["cut"].set_ylim(bottom=0)
        if "threshold" in places:
            steps, values = series["val_threshold"]
            places["threshold"].set_title("Score from which on F1 is best")
            places["threshold"].plot(steps, values, color=FAINT, marker="o", markersize=3.5)
            places["threshold"].set_ylim(0, 1)
        if "lr" in places:
            places["lr"].set_title("Learning rate")
            places["lr"].plot(*series["lr"], color=FAINT, marker=_marker(series["lr"][0]))
            places["lr"].set_ylim(bottom=0)
        last = places[panels[-1]]
        last.set_xlabel("step")
        last.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        return save_figure(figure, path)


def _draw_shares(axes: Axes, shares: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The figure by which the model is chosen comes first, and its best value is marked and said."""
    from matplotlib.ticker import PercentFormatter

    axes.set_title("Validation")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
    for i, (key, (steps, values)) in enumerate(sorted(shares.items(), key=lambda item: item[0] not in CHOOSES)):
        name = key.removeprefix("val_")
        name = SHOWN_NAMES.get(name, name.replace("_", " "))
        axes.plot(steps, values, color=BLUE if i == 0 else f"C{i}", marker="o", markersize=3.5, label=name)
        if key in CHOOSES:
            best = int(np.argmax(values))
            axes.plot(steps[best], values[best], "o", markersize=9, markerfacecolor="none", color=INK)
            found = f"best {name} {100 * values[best]:.1f} % at step {steps[best]:.0f}"
            axes.set_title(found, loc="right", **ASIDE)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Beside the chart: anywhere in it, it may hide a curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _number(value: Any) -> float:
    """NaN for what is not a number: a table that was read back from CSV holds empty strings."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per column the steps and the values that are finite, in order of the steps."""
    ordered = sorted((row for row in rows if math.isfinite(_number(row.get("step")))), key=lambda r: _number(r["step"]))
    steps = np.array([_number(row["step"]) for row in ordered])
    series = {}
    for key in dict.fromkeys(key for row in ordered for key in row if key != "step"):
        values = np.array([_number(row.get(key)) for row in ordered])
        finite = np.isfinite(values)
        if finite.any():
            series[key] = steps[finite], values[finite]
    return series


def _draw_scores(axes: Axes, scores: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    axes.set_title("Validation")
    axes.set_ylim(0, max(10.0, 1.08 * max(float(np.max(values)) for _, values in scores.values())))
    for i, (key, (steps, values)) in enumerate(scores.items()):
        axes.plot(steps, values, color=BLUE if i == 0 else f"C{i}", marker="o", markersize=3.5, label=SCORES[key])
    key = "val_chrf" if "val_chrf" in scores else next(iter(scores))
    steps, values = scores[key]
    best = int(np.argmax(values))
    axes.plot(steps[best], values[best], "o", markersize=9, markerfacecolor="none", color=INK)
    found = f"best {SCORES[key]} {values[best]:.1f} at step {steps[best]:.0f}"
    axes.set_title(found, loc="right", **ASIDE)
    _legend(axes)


def _draw_losses(
    axes: Axes,
    losses: Mapping[str, tuple[np.ndarray, np.ndarray]],
    rows: Sequence[Mapping[str, Any]],
    harder: Sequence[str] = (),
) -> None:
    axes.set_title("Loss")
    if harder and len(losses) == 2:
        axes.set_title(f"training with {' and '.join(harder)}, validation without", loc="right", **ASIDE)
    if "loss" in losses:
        steps, values = losses["loss"]
        noisy = len(values) >= 50
        if not noisy:
            axes.plot(steps, values, color=BLUE, marker=_marker(steps), label="training")
        else:
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=BLUE, linewidth=1.8, label="training (smoothed)")
    if "val_loss" in losses:
        axes.plot(*losses["val_loss"], color=ORANGE, marker="o", markersize=3.5, label="validation")
    # A single spike at the start must not flatten the rest of the curve.
    everything = np.concatenate([values for _, values in losses.values()])
    low, high, largest = np.min(everything), np.percentile(everything, 99), np.max(everything)
    if largest - low > 3 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    faulty = [
        _number(row.get("step"))
        for row in rows
        if row.get("loss") not in (None, "") and not math.isfinite(_number(row["loss"]))
    ]
    if faulty:
        bottom = axes.get_xaxis_transform()
        axes.plot(faulty, [0.03] * len(faulty), "x", color=RED, transform=bottom, label="not finite")
    _legend(axes)


def _marker(steps: np.ndarray) -> str:
    """A line of one point is invisible."""
    return "o" if len(steps) < 3 else ""


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fortieth of the run, centred; shorter at the ends."""
    half = max(2, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)
