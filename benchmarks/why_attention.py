"""What recurrence forgets and what it waits for, measured: writes docs/why-attention.md with a table and two plots.

    python -m benchmarks.why_attention --json benchmarks/results/why_attention.json
    python -m benchmarks.why_attention --only time --json benchmarks/results/why_attention.json  # the rest is there
    python -m benchmarks.why_attention --distances 8,32 --repeated 8 --seconds 5 --lengths 32,64 --out DIR   # quickly

RNN, LSTM, GRU and a Transformer with a causal mask have as many parameters (within a few percent), two layers, the same
optimizer, and the same seconds of training; each learns with the best of three learning rates, chosen by a trial of a
quarter of that time. Guessing is right once in 16 times. Two things are asked of them:

Keep: a sequence begins with one of 16 symbols, then come `distance` others, of which none tells it, then a mark, at
which the symbol must be said again. Each batch has a distance of its own, drawn evenly on a logarithmic scale from
`SHORTEST` to a longest one that grows in the first half of the training: what cannot be learnt at 2,048 places at once
can be found at eight and carried on. Then all distances are measured with the same model.

Repeat: every symbol must be said again after `distance` others, so as many are to be kept at any time. A model learns
one distance; the last `SAID` places of a sequence are what is learnt and measured.

Time: of a training step (forward and backward of `BATCH` sequences) and of one more token (from the state of all that
was before it: a vector for recurrences, keys and values for the Transformer) against length. `chain` is what must wait:
the longest path through the graph by which PyTorch computes the gradients of a step, in operations.

The page is written from all rows, those of this call and those of the file. Each row says how it was measured.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.charts import plain_numbers
from saccade.drawing import BLUE, FAINT, GREEN, ORANGE, RED, chart_style, save_figure
from saccade.layers.attention import MultiHeadAttention
from saccade.layers.positions import sinusoidal_1d
from saccade.layers.transformer import TransformerBlock
from saccade.words import counted

SYMBOLS, FILLERS = 16, 16
MARK = SYMBOLS + FILLERS
VOCABULARY = MARK + 1
LAYERS, HEADS, BATCH = 2, 4, 32
BATCHES = {"keep": 32, "repeat": 8}
SHORTEST, SAID, TESTED = 4, 64, 512  # places between in training; see above; sequences of a distance that are measured
WIDTHS = {"RNN": 153, "LSTM": 78, "GRU": 90, "Transformer": 64}  # as many parameters each
RATES = (3e-4, 1e-3, 3e-3)
COLOURS = {"RNN": FAINT, "LSTM": ORANGE, "GRU": RED, "Transformer": BLUE}
SEQUENTIAL = {"RNN": "O(n)", "LSTM": "O(n)", "GRU": "O(n)", "Transformer": "O(1)"}
PATH = {"RNN": "O(n)", "LSTM": "O(n)", "GRU": "O(n)", "Transformer": "O(1)"}
CELLS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}


class Recurrent(nn.Module):
    """Symbols (B, N) -> scores of the next (B, N, V), by PyTorch's fused recurrence."""

    def __init__(self, kind: str):
        super().__init__()
        C = WIDTHS[kind]
        self.embed = nn.Embedding(VOCABULARY, C)
        self.cells = CELLS[kind](C, C, num_layers=LAYERS, batch_first=True)
        self.head = nn.Linear(C, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cells(self.embed(tokens))[0])

    def stepper(self, length: int) -> Callable[[Tensor], Tensor]:
        """One more token after `length` others."""
        state = self.cells(self.embed(torch.randint(0, MARK, (1, length))))[1]
        return lambda token: self.head(self.cells(self.embed(token), state)[0])


class Transformer(nn.Module):
    """The same with a causal mask."""

    def __init__(self, longest: int):
        super().__init__()
        C = WIDTHS["Transformer"]
        self.embed = nn.Embedding(VOCABULARY, C)
        self.blocks = nn.ModuleList(
            TransformerBlock(C, HEADS, 4 * C, cross=False, mlp="gelu", norm_first=True) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, VOCABULARY)
        self.register_buffer("waves", sinusoidal_1d(longest + 2, C), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.waves, Tensor)
        x = self.embed(tokens) + self.waves[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))

    def stepper(self, length: int) -> Callable[[Tensor], Tensor]:
        C = WIDTHS["Transformer"]
        past = torch.randn(LAYERS, 2, 1, HEADS, length + 1, C // HEADS)  # with room for the one
        assert isinstance(self.waves, Tensor)
        place = self.waves[length]

        def step(token: Tensor) -> Tensor:
            x = self.embed(token) + place
            for block, (keys, values) in zip(self.blocks, past, strict=True):
                assert isinstance(block, TransformerBlock) and isinstance(block.self_attention, MultiHeadAttention)
                q, k, v = block.self_attention.project(block.norm1(x), None, None)
                keys[:, :, -1:], values[:, :, -1:] = k, v
                mixed = F.scaled_dot_product_attention(q, keys, values)
                x = x + block.self_attention.out(mixed.transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm3(x))
            return self.head(self.norm(x))

        return step


def build(kind: str, longest: int, seed: int = 0) -> Recurrent | Transformer:
    torch.manual_seed(seed)
    return Transformer(longest) if kind == "Transformer" else Recurrent(kind)


Sample = Callable[[int, torch.Generator, int], tuple[Tensor, Tensor]]


def keep(distance: int, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Sequences (B, distance + 2) and what must be said at the mark (B, 1)."""
    wanted = torch.randint(0, SYMBOLS, (count, 1), generator=generator)
    others = torch.randint(SYMBOLS, MARK, (count, distance), generator=generator)
    return torch.cat((wanted, others, torch.full((count, 1), MARK)), dim=1), wanted


def repeat(distance: int, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Sequences (B, distance + SAID) and what must be said at the last places (B, SAID)."""
    tokens = torch.randint(0, SYMBOLS, (count, distance + SAID), generator=generator)
    return tokens, tokens[:, :SAID]


def learn(
    kind: str, asked: Sample, distances: Sequence[int], rate: float, seconds: float, seed: int
) -> tuple[list[float], int]:
    """Accuracy on fresh sequences of each distance after so many seconds of training, and the number of steps."""
    model = build(kind, max(distances) + SAID, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    growth = math.log(max(distances) / SHORTEST)
    start, steps = time.thread_time(), 0  # of this thread, which is in all that is done: pauses do not count
    while (done := (time.thread_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 20) * (1 - done)
        share = torch.rand((), generator=generator).item() * min(1.0, 0.1 + 2 * done) if len(distances) > 1 else 1.0
        tokens, wanted = asked(round(SHORTEST * math.exp(share * growth)), generator, BATCHES[asked.__name__])
        scores = model(tokens)[:, -wanted.shape[1] :, :SYMBOLS]
        loss = F.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return [accuracy(model, asked, distance, seed + 1_000_000) for distance in distances], steps


@torch.no_grad()
def accuracy(model: nn.Module, asked: Sample, distance: int, seed: int) -> float:
    fresh, right = torch.Generator().manual_seed(seed), []
    for _ in range(TESTED // BATCH):
        tokens, wanted = asked(distance, fresh, BATCH)
        said = model(tokens)[:, -wanted.shape[1] :, :SYMBOLS].argmax(dim=2)
        right.append((said == wanted).float().mean().item())
    return statistics.fmean(right)


def recall(kind: str, asked: Sample, distances: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """The best rate of a trial of a quarter of the time each, then the full time with it."""
    trials = {rate: statistics.fmean(learn(kind, asked, distances, rate, seconds / 4, 1)[0]) for rate in RATES}
    rate = max(trials, key=lambda each: trials[each])
    found, steps = learn(kind, asked, distances, rate, seconds, 2)
    return [
        {"name": f"{asked.__name__} {kind} {distance}", "kind": kind, "asked": asked.__name__, "distance": distance,
         "accuracy": share, "steps": steps, "rate": rate, "seconds": seconds}
        for distance, share in zip(distances, found, strict=True)
    ]  # fmt: skip


def timed(work: Callable[[], Any], seconds: float) -> float:
    """Median time of one call, in milliseconds."""
    work()
    found: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(found) < 3:
        before = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - before))
    return statistics.median(found)


def cost_of_step(kind: str, length: int, seconds: float) -> dict[str, Any]:
    model = build(kind, length)
    tokens = torch.randint(0, MARK, (BATCH, length))

    def step() -> None:
        model(tokens).square().mean().backward()
        model.zero_grad(set_to_none=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is off
        with torch.backends.mkldnn.flags(enabled=False):  # in oneDNN's graph a whole recurrence is one operation
            chain = longest_chain(model(tokens[:1]).square().mean())
    return {"name": f"step {kind} {length}", "kind": kind, "step": length, "ms": timed(step, seconds), "chain": chain}


def cost_of_token(kind: str, length: int, seconds: float) -> dict[str, Any]:
    model, token = build(kind, length), torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        more = model.stepper(length)
        per_token = timed(lambda: more(token), seconds)
    return {"name": f"token {kind} {length}", "kind": kind, "token": length, "ms": per_token}


def longest_chain(loss: Tensor) -> int:
    """How many operations of its gradients' graph must follow one another."""
    longest: dict[Any, int] = {}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting[-1]
        before = [each for each, _ in node.next_functions if each is not None]
        unknown = [each for each in before if each not in longest]
        if unknown:
            waiting += unknown
        else:
            longest[waiting.pop()] = 1 + max((longest[each] for each in before), default=0)
    return longest[loss.grad_fn]


# --- the page --------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    from matplotlib.figure import Figure

    with chart_style():
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        titles = {"keep": "One symbol kept", "repeat": "Every symbol repeated"}
        for axes, (asked, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            for kind, colour in COLOURS.items():
                own = sorted((row["distance"], 100 * row["accuracy"]) for row in rows if row.get("kind") == kind
                             and row.get("asked") == asked)  # fmt: skip
                axes.plot(*zip(*own, strict=True), marker="o", color=colour, label=kind)
            axes.axhline(100 / SYMBOLS, color=GREEN, linewidth=1, linestyle=":", label="guessing")
            axes.set(xscale="log", ylim=(0, 104), xlabel="distance in symbols", ylabel="recalled, %", title=title)
            plain_numbers(axes.xaxis, sorted({row["distance"] for row in rows if row.get("asked") == asked}))
            axes.legend()
        save_figure(figure, folder / "why-attention-recall.png")
        figure = Figure(figsize=(12.6, 3.8), layout="constrained")
        shown = (
            ("step", "chain", "What must wait in a training step", "operations"),
            ("step", "ms", "Time of a training step", "ms"),
            ("token", "ms", "Time of one more token", "ms"),
        )
        for axes, (what, key, title, unit) in zip(figure.subplots(1, 3), shown, strict=True):
            for kind, colour in COLOURS.items():
                own = sorted((row[what], row[key]) for row in rows if row.get("kind") == kind and what in row)
                axes.plot(*zip(*own, strict=True), marker="o", color=colour, label=kind)
            axes.set(xscale="log", yscale="log", xlabel="length", ylabel=unit, title=title)
            plain_numbers(axes.xaxis, sorted({row[what] for row in rows if what in row}))
            plain_numbers(axes.yaxis)
        figure.axes[0].legend()
        save_figure(figure, folder / "why-attention-time.png")


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Of the time against the length, over the longer half of the lengths."""
    longer = sorted(points)[len(points) // 2 - 1 if len(points) < 4 else len(points) // 2 :]
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in longer), strict=True)
    if len(xs) < 2:
        return math.nan
    slope, _ = statistics.linear_regression(xs, ys)
    return slope


def how(rows: Sequence[dict[str, Any]], part: str) -> str:
    """How the rows of a part were measured."""
    found = {
        f"{counted(row['threads'], 'thread')}, {row['machine']}, torch {row['torch']}" for row in rows if part in row
    }
    busy = [row["others_cores"] for row in rows if part in row]
    return f"{'; '.join(sorted(found))}; other programs kept {max(busy):.1f} cores busy meanwhile"


def page(rows: Sequence[dict[str, Any]]) -> str:
    distances = {
        asked: sorted({row["distance"] for row in rows if row.get("asked") == asked}) for asked in ("keep", "repeat")
    }
    at = {row["name"]: row for row in rows}
    sizes = ", ".join(f"{kind} {count(kind) / 1000:.1f} k" for kind in WIDTHS)

    def line(kind: str, values: Sequence[str]) -> str:
        return f"| {kind} | " + " | ".join(values) + " |"

    def head(first: str, names: Sequence[Any]) -> list[str]:
        return [line(first, [str(name) for name in names]), "|" + "---|" * (len(names) + 1)]

    kept, repeated = [], []
    for kind in WIDTHS:
        own = [at[f"keep {kind} {distance}"] for distance in distances["keep"]]
        shown = [f"{100 * row['accuracy']:.0f}" for row in own]
        kept.append(line(kind, [*shown, f"{own[0]['steps']:,}", f"{own[0]['rate']:g}"]))
        own = [at[f"repeat {kind} {distance}"] for distance in distances["repeat"]]
        repeated.append(line(kind, [f"{100 * row['accuracy']:.0f} ({row['steps']:,})" for row in own]))
    tables = []
    for part, key, form, title in (
        ("step", "chain", ",d", "Operations of a training step that must follow one another, counted"),
        ("step", "ms", ",.1f", f"A training step of {BATCH} sequences, ms"),
        ("token", "ms", ".2f", "One more token, ms"),
    ):
        own, lengths = [], sorted({row[part] for row in rows if part in row})
        for kind in WIDTHS:
            times = [(length, at[f"{part} {kind} {length}"][key]) for length in lengths]
            own.append(line(kind, [*(format(value, form) for _, value in times), f"{exponent(times):.2f}"]))
        tables += [f"\n**{title}** (the last column is the exponent of the length, over the longer half)\n",
                   *head("", [f"{length:,}" for length in lengths] + ["exponent"]), *own]  # fmt: skip
    theory = [line(kind, [SEQUENTIAL[kind], PATH[kind]]) for kind in WIDTHS]
    shortest = distances["keep"][0]
    unlearnt = [kind for kind in WIDTHS if at[f"keep {kind} {shortest}"]["accuracy"] < 0.5]
    (seconds,) = {row["seconds"] for row in rows if "asked" in row}
    return "\n".join([
        "# Why attention\n",
        "Written by `python -m benchmarks.why_attention`, from the rows in `benchmarks/results/why_attention.json`, "
        f"which it measured. Parameters: {sizes}.\n",
        "## What recurrence forgets\n",
        f"**One symbol kept.** One of {SYMBOLS} symbols is shown first and must be said again after so many others, "
        f"percent of {TESTED} sequences; guessing gives {100 / SYMBOLS:.0f}. Each model had the same time, learnt all "
        f"distances (short ones first) and used the best of three learning rates: {seconds:g} s of training with "
        f"{how(rows, 'asked')}.\n",
        *head("distance", [*distances["keep"], "steps in this time", "learning rate"]), *kept,
        *([f"\nWhat is wrong at {shortest} symbols already was not learnt in this time, so that row says nothing of "
           f"forgetting: {', '.join(unlearnt)}."] if unlearnt else []),
        "\n**Every symbol repeated.** Each symbol of a stream must be said again after so many others, so as many must "
        "be known at any time. A state has the same size however much there is to know; keys and values grow with it. "
        "Percent recalled, and in brackets the steps that the time allowed for this distance.\n",
        *head("distance", distances["repeat"]), *repeated,
        "\n![Recalled against the distance](images/why-attention-recall.png)\n",
        "## What has to wait\n",
        "In a recurrence each place waits for the one before, so however many processors there are, a step takes as "
        "long as the sequence, and what is remembered must survive every place between. Attention computes all places "
        "at once and reaches each from each in one step. Its price is the square of the length in training, which a "
        "few processors feel before they feel any waiting, and for each token that is written a cost that grows with "
        f"what was written before. Measured with {how(rows, 'step')}.\n",
        *head("in theory", ["steps that wait", "longest path"]), *theory,
        *tables,
        "\n![Time against the length](images/why-attention-time.png)\n",
    ])  # fmt: skip


def count(kind: str) -> int:
    return sum(parameter.numel() for parameter in build(kind, 8).parameters())


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distances", type=numbers, default=[8, 32, 128, 512, 1024, 2048])
    parser.add_argument(
        "--repeated", type=numbers, default=[8, 32, 128, 512], help="distances at which all is repeated"
    )
    parser.add_argument("--lengths", type=numbers, default=[32, 128, 512, 2048], help="of sequences in training")
    parser.add_argument("--before", type=numbers, default=[32, 512, 8192, 32768], help="tokens before the one more")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training for each model")
    parser.add_argument("--timing-seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--only", choices=("recall", "time"), help="measure this alone; the other is in --json")
    parser.add_argument("--json", type=Path, help="all figures, merged by name")
    options = parser.parse_args()
    if options.only and options.json is None:
        parser.error("--only: the page needs the rest, from --json FILE")
    rows = [] if options.only == "time" else recalled(options)
    rows += [] if options.only == "recall" else timings(options)
    if options.json is not None:
        rows = list(report.merge(options.json, rows).values())
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    draw(rows, options.out / "images")
    (options.out / "why-attention.md").write_text(page(rows), encoding="utf-8")
    print(f"written: {options.out / 'why-attention.md'}")


def circumstances(load: report.Load) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "machine": f"{report.processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "others_cores": round(load.others(), 2),
    }


def recalled(options: argparse.Namespace) -> list[dict[str, Any]]:
    load, rows = report.Load(), []
    for kind in WIDTHS:
        for asked, sets in ((keep, [options.distances]), (repeat, [[d] for d in options.repeated])):
            for distances in sets:
                own = recall(kind, asked, distances, options.seconds)
                shown = ", ".join(f"{100 * row['accuracy']:.0f} % at {row['distance']}" for row in own)
                print(f"{asked.__name__} {kind}: {shown} after {own[0]['steps']} steps", flush=True)
                rows += own
    return [{**row, **circumstances(load)} for row in rows]


def timings(options: argparse.Namespace) -> list[dict[str, Any]]:
    load, rows = report.Load(), []
    for measure, lengths in ((cost_of_step, options.lengths), (cost_of_token, options.before)):
        for length in lengths:
            for kind in WIDTHS:
                rows.append(measure(kind, length, options.timing_seconds))
                print(f"{rows[-1]['name']}: {rows[-1]['ms']:.3f} ms", flush=True)
    return [{**row, **circumstances(load)} for row in rows]


if __name__ == "__main__":
    main()
