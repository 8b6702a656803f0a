"""docs/attention-cost.md and its pictures, from the figures of `benchmarks.attention_cost`."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.charts import plain_numbers
from saccade.drawing import chart_style, save_figure

Rows = dict[str, report.Row]

LENGTH, WIDTH = 1024, 64  # what stays the same while the other grows
FIT_POINTS = {"length": 4, "width": 3}  # of the long end
NOISE_MIB = 2.0  # memory below this is mostly pages of code and thread stacks


@dataclass(frozen=True)
class Theory:
    """A line of table 1 of https://arxiv.org/abs/1706.03762, extended. N tokens, width d; the rest is in `NOTES`."""

    label: str
    complexity: str
    memory: str
    sequential: str
    path: str
    colour: str
    dashes: str = "-"


THEORY = {
    "explicit": Theory("self-attention, written out", "N²d + Nd²", "N² + Nd", "1", "1", "black", "--"),
    "fused": Theory("self-attention, fused", "N²d + Nd²", "Nd", "1", "1", "black"),
    "linear": Theory("linear (elu + 1)", "Nd·d_h + Nd²", "Nd", "1", "1", "tab:blue"),
    "performer": Theory("Performer", "Nd·m + Nd²", "N(d + hm)", "1", "1", "tab:cyan"),
    "linformer": Theory("Linformer", "Nd·r + Nd²", "Nd", "1", "1", "tab:green"),
    "nystrom": Theory("Nyström", "Nd·r + r³ + Nd²", "Nd + r²", "1", "1", "tab:olive"),
    "lsh": Theory("Reformer (LSH)", "RNd(c + log N) + Nd²", "RN(d + hc)", "log N", "N/c (1 in a bucket)", "tab:purple"),
    "spatial_reduction": Theory("spatial reduction", "N²d/s² + Nd²", "Nd", "1", "1", "tab:pink"),
    "window": Theory("windows", "Nw²d + Nd²", "Nd", "1", "none between windows (2 by a prefix token)", "tab:orange"),
    "rnn": Theory("RNN", "Nd²", "Nd", "N", "N", "tab:red", ":"),
    "lstm": Theory("LSTM", "Nd²", "Nd", "N", "N", "tab:red"),
    "gru": Theory("GRU", "Nd²", "Nd", "N", "N", "tab:red", "--"),
    "convolution": Theory("convolution, kernel k", "kNd²", "Nd", "1", "N/k", "tab:brown"),
    "depthwise": Theory("depth-wise convolution", "kNd", "Nd", "1", "N/k", "tab:brown", "--"),
}
NOTES = """N tokens of width d in h heads of width d_h = 64; m random features (266); rank or landmarks r (64); R rounds
(4) of chunks of c tokens (64); a reduction by s (4) on each side; windows of w x w tokens (7 at most); kernel k (7).
The theory counts operations, those that must wait for one another, and the longest way between two tokens through such
layers."""
RECURRENT = ("rnn", "lstm", "gru")
PASSES = {"forward": "forward", "train": "forward and backward"}
WIDE = ("explicit", "fused", "lstm")  # the lines that the page speaks of
COMPARED = ("explicit", "fused", "linear")


def write(page: Path, rows: Rows) -> list[Path]:
    """The page, and beside it in `images/` its pictures."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = [images / "attention-cost.png", images / "attention-cost-width.png"]
    draw(rows, pictures[0], "length", [("forward", "seconds"), ("train", "seconds"), ("train", "peak_mib")])
    draw(rows, pictures[1], "width", [("forward", "seconds"), ("train", "seconds")])
    page.write_text(wrapped(text(rows)), encoding="utf-8")
    return [page, *pictures]


def line(rows: Rows, layer: str, mode: str, axis: str, key: str) -> list[tuple[int, float]]:
    """(size, figure) of the measured points of one layer, short ones first."""
    fixed, value = ("width", WIDTH) if axis == "length" else ("length", LENGTH)
    chosen = [
        (row[axis], row[key])
        for row in rows.values()
        if row["layer"] == layer and row["mode"] == mode and row[fixed] == value and row.get(key) is not None
    ]
    return sorted(chosen)


def exponent(points: Sequence[tuple[int, float]], count: int) -> float | None:
    """The slope of the last `count` points in logarithms."""
    last = [(math.log(size), math.log(figure)) for size, figure in points[-count:] if figure > 0]
    if len(last) < 3:
        return None
    return statistics.linear_regression(*zip(*last, strict=True)).slope


def exponent_of(rows: Rows, layer: str, mode: str, axis: str, key: str) -> float | None:
    points = line(rows, layer, mode, axis, key)
    if key == "peak_mib":
        points = [(size, figure) for size, figure in points if figure > NOISE_MIB]
    return exponent(points, FIT_POINTS[axis])


def crossing(faster_later: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> float | None:
    """The last size from which the first is faster than the other; between points on straight lines in logarithms."""
    ours, theirs = dict(faster_later), dict(other)
    sizes = sorted(ours.keys() & theirs.keys())
    gaps = [math.log(ours[size] / theirs[size]) for size in sizes]
    for i in range(len(sizes) - 1, 0, -1):
        if gaps[i] <= 0 < gaps[i - 1]:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            return sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** share
    return None


def draw(rows: Rows, path: Path, axis: str, panels: Sequence[tuple[str, str]]) -> None:
    titles = {
        ("forward", "seconds"): "forward",
        ("train", "seconds"): "forward and backward",
        ("train", "peak_mib"): "forward and backward",
    }
    marks = sorted({size for layer in THEORY for size, _ in line(rows, layer, "forward", axis, "seconds")})
    with chart_style():
        figure = Figure(figsize=(4.8 * len(panels), 6.0), layout="constrained")
        for place, (mode, key) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for layer, theory in THEORY.items():
                points = line(rows, layer, mode, axis, key)
                if key == "peak_mib":
                    points = [(size, value) for size, value in points if value > NOISE_MIB]
                factor = 1e3 if key == "seconds" else 1.0
                sizes, values = [size for size, _ in points], [factor * value for _, value in points]
                wide = 2.4 if layer in WIDE else 1.1
                place.plot(sizes, values, theory.dashes, color=theory.colour, label=theory.label, linewidth=wide)
            unit = "ms" if key == "seconds" else "MiB at most"
            place.set(xscale="log", yscale="log", title=titles[mode, key], xlabel=_axis_label(axis), ylabel=unit)
            plain_numbers(place.xaxis, marks[::2])
            plain_numbers(place.yaxis)
            place.grid(visible=True)
        labelled = figure.axes[0].get_legend_handles_labels()
        figure.legend(*labelled, loc="outside lower center", ncols=2 * len(panels) - 1, frameon=False)
        save_figure(figure, path, dpi=120)


def _axis_label(axis: str) -> str:
    return f"tokens (width {WIDTH})" if axis == "length" else f"width ({LENGTH:,} tokens)"


def text(rows: Rows) -> str:
    measured = [row for row in rows.values() if "seconds" in row]
    torch_version = sorted({row["versions"]["torch"] for row in measured})
    threads = sorted({row["threads"] for row in measured})
    longest = max(row["length"] for row in measured)
    busy = statistics.median(row["others_cores"] for row in measured)
    return f"""# What attention costs

This page is written by `python -m benchmarks.attention_cost` from `benchmarks/results/attention_cost.json`. One layer,
batch 1, float32, {" and ".join(map(str, threads))} threads of an Intel Xeon (Sapphire Rapids), no GPU, torch
{", ".join(torch_version)}; other programs kept {busy:.2f} cores busy meanwhile (median of all points). Attention layers
include their projections. The forms are those of `saccade/layers/efficient_attention.py` in their default settings; a
sequence of N tokens is a grid as square as possible. RNN, LSTM, GRU and convolutions are torch's own layers.

![Time and memory against the number of tokens](images/attention-cost.png)

## Theory beside measurement

{theory_table(rows)}

{NOTES}

The exponent p says that the cost grows as N^p: the slope of a straight line through the logarithms of the last
{FIT_POINTS["length"]} points measured, so mostly up to N = {longest:,}. Training is a forward and a backward pass,
memory is of that, too. The exponent in width is of training at N = {LENGTH:,} and d =
{", ".join(str(size) for size in _fitted_widths(rows))}. At these lengths tensors outgrow the caches, and from 32 MiB on
the system hands them out anew in each step, page by page; so exponents of layers that are linear in theory lie above 1.

{steps_of_recurrence(rows)}

![Time against the width](images/attention-cost-width.png)

## Milliseconds and MiB

{figures_table(rows)}

Width {WIDTH}. `ms` is forward alone / forward and backward. `MiB` is the peak of a forward and backward pass above what
was held before it, input and parameters not counted; below {NOISE_MIB:.0f} MiB it is noise and left out. What was not
measured, and why, is said below.

## Where recurrence and attention cross

The length from which the recurrent layer is faster than attention, at width {WIDTH}:

{crossings_table(rows)}

By operations alone, recurrence (Nd²) is cheaper than attention (N²d) from N = d on, here {WIDTH}. Measured, the
crossing is elsewhere because the N steps of recurrence wait for one another, while the products of attention run side
by side.

## Not measured

{skipped_list(rows)}
"""


def wrapped(page: str) -> str:
    """Paragraphs of prose in lines of 120, whatever the figures in them are long."""
    parts = [part.strip("\n") for part in page.split("\n\n")]
    return (
        "\n\n".join(
            part if part.startswith(("#", "|", "-", "!")) else textwrap.fill(part, 120, break_on_hyphens=False)
            for part in parts
        )
        + "\n"
    )


def steps_of_recurrence(rows: Rows) -> str:
    """How long a token takes in a backward pass, near the ends of what was fitted."""
    words = []
    for layer in RECURRENT:
        forward, train = (dict(line(rows, layer, mode, "length", "seconds")) for mode in ("forward", "train"))
        sizes = sorted(forward.keys() & train.keys())
        first, last = sizes[-1 - FIT_POINTS["length"]], sizes[-1]
        costs = [_short(1e6 * (train[size] - forward[size]) / size) for size in (first, last)]
        words.append(f"{THEORY[layer].label} {costs[0]} at N = {first:,} and {costs[1]} at N = {last:,}")
    return f"""The backward pass of a recurrent layer takes, in µs a token: {"; ".join(words)}. Where this grows,
so does the exponent above 1: it is a matter of torch's implementation, not of the operations."""


def theory_table(rows: Rows) -> str:
    lines = []
    for layer, theory in THEORY.items():
        fits = {
            "p, forward": exponent_of(rows, layer, "forward", "length", "seconds"),
            "p, training": exponent_of(rows, layer, "train", "length", "seconds"),
            "p, memory": exponent_of(rows, layer, "train", "length", "peak_mib"),
            "p in width": exponent_of(rows, layer, "train", "width", "seconds"),
        }
        lines.append(
            {
                "layer": theory.label,
                "operations": theory.complexity,
                "memory": theory.memory,
                "sequential": theory.sequential,
                "longest path": theory.path,
            }
            | fits
        )
    words: dict[str, str] = dict.fromkeys(("layer", "operations", "memory", "sequential", "longest path"), "")
    return report.table(lines, words | dict.fromkeys(("p, forward", "p, training", "p, memory", "p in width"), ".2f"))


def _fitted_widths(rows: Rows) -> list[int]:
    return [size for size, _ in line(rows, "fused", "train", "width", "seconds")][-FIT_POINTS["width"] :]


def figures_table(rows: Rows) -> str:
    lengths = [256, 1024, 4096, 16384, 65536]
    lines: list[dict[str, Any]] = []
    for layer, theory in THEORY.items():
        forward, train = (dict(line(rows, layer, mode, "length", "seconds")) for mode in ("forward", "train"))
        memory = dict(line(rows, layer, "train", "length", "peak_mib"))
        cells: dict[str, Any] = {"layer": theory.label}
        for length in lengths:
            times = [_short(1e3 * part[length]) if length in part else "–" for part in (forward, train)]
            cells[f"{length:,}, ms"] = " / ".join(times) if times != ["–", "–"] else None
        for length in lengths[1:]:
            large = memory.get(length, 0.0) > NOISE_MIB
            cells[f"{length:,}, MiB"] = _short(memory[length]) if large else None
        lines.append(cells)
    return report.table(lines, dict.fromkeys(lines[0], ""))


def _short(value: float) -> str:
    """Three digits, without a power of ten."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def crossings_table(rows: Rows) -> str:
    lines = []
    for recurrent in RECURRENT:
        for mode in ("forward", "train"):
            cells = {"layer": THEORY[recurrent].label, "pass": PASSES[mode]}
            ours = line(rows, recurrent, mode, "length", "seconds")
            for name in COMPARED:
                cells[f"than {THEORY[name].label}"] = _crossing_words(ours, line(rows, name, mode, "length", "seconds"))
            lines.append(cells)
    return report.table(lines, dict.fromkeys(lines[0], ""))


def _crossing_words(ours: list[tuple[int, float]], other: list[tuple[int, float]]) -> str:
    common = sorted(dict(ours).keys() & dict(other).keys())
    at = crossing(ours, other)
    if at is not None:
        return f"N = {float(f'{at:.2g}'):,.0f}"
    return "at every N" if dict(ours)[common[-1]] < dict(other)[common[-1]] else f"not up to N = {common[-1]:,}"


def skipped_list(rows: Rows) -> str:
    lines = [
        f"- {THEORY[row['layer']].label}, {PASSES[row['mode']]}, "
        f"N = {row['length']:,}, d = {row['width']}: {row['skipped']}"
        for row in rows.values()
        if "skipped" in row
    ]
    return "\n".join(lines) or "Every point was measured."
