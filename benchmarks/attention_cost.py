"""What a layer costs as the sequence grows: attention, its efficient forms, recurrence and convolution.

    python -m benchmarks.attention_cost                 # measures what is missing, then writes docs/attention-cost.md
    python -m benchmarks.attention_cost --seconds 50    # a part of it; call again to go on
    python -m benchmarks.attention_cost --layers lstm,fused --again

Each point is measured in a process of its own: forward alone, or forward and backward with the gradients of the
parameters and of the input. Batch 1, float32. Peak memory is what the process holds at most, above what it held before
the step, input and parameters included in the latter.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import attention_cost_page, report
from saccade.layers.efficient_attention import ATTENTION
from saccade.layers.mixing import Layout, Mixer

HEAD_WIDTH = 64
LENGTHS = [2**i for i in range(6, 17)]  # up to a picture of 256 x 256 with a pixel a token
WIDTHS = [64, 128, 256, 512, 1024]
LENGTH_OF_WIDTHS, WIDTH_OF_LENGTHS = 1024, 64
MODES = ("forward", "train")
WARM_UP_LENGTH = 64


class Attend(nn.Module):
    """Self-attention of one form on one layout."""

    def __init__(self, form: str, width: int, layout: Layout) -> None:
        super().__init__()
        self.mixer = ATTENTION[form](width, width // HEAD_WIDTH, layout=layout)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, layout=self.layout)


class AttendExplicitly(nn.Module):
    """Self-attention with the N x N weights written out."""

    def __init__(self, width: int, layout: Layout) -> None:
        super().__init__()
        self.mixer = Mixer(width, width // HEAD_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer.with_weights(x)[0]


class Recur(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], width: int) -> None:
        super().__init__()
        self.cells = kind(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class Convolve(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(width, width, kernel_size=7, padding=3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x.transpose(1, 2)).transpose(1, 2)


def _form(name: str) -> Callable[[int, Layout], nn.Module]:
    return lambda width, layout: Attend(name, width, layout)


LAYERS: dict[str, Callable[[int, Layout], nn.Module]] = {
    "explicit": AttendExplicitly,
    "fused": _form("full"),
    "linear": _form("linear"),
    "performer": _form("performer"),
    "linformer": _form("linformer"),
    "nystrom": _form("nystrom"),
    "lsh": _form("lsh"),
    "spatial_reduction": _form("spatial_reduction"),
    "window": _form("window"),
    "rnn": lambda width, layout: Recur(nn.RNN, width),
    "lstm": lambda width, layout: Recur(nn.LSTM, width),
    "gru": lambda width, layout: Recur(nn.GRU, width),
    "convolution": lambda width, layout: Convolve(width, groups=1),
    "depthwise": lambda width, layout: Convolve(width, groups=width),
}


@dataclass(frozen=True)
class Point:
    layer: str
    mode: str
    length: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.layer} {self.mode} length={self.length} width={self.width}"


def points() -> list[Point]:
    """Short and narrow first: what is long is skipped by what was measured before."""
    by_length = [(length, WIDTH_OF_LENGTHS) for length in LENGTHS]
    by_width = [(LENGTH_OF_WIDTHS, width) for width in WIDTHS if width != WIDTH_OF_LENGTHS]
    sizes = sorted(by_length + by_width, key=math.prod)
    return [Point(layer, mode, *size) for size in sizes for layer in LAYERS for mode in MODES]


def grid_of(length: int) -> tuple[int, int]:
    """As square as a power of two can be."""
    height = 2 ** (int(math.log2(length)) // 2)
    return height, length // height


def step_of(point: Point) -> Callable[[], object]:
    torch.manual_seed(0)
    layer = LAYERS[point.layer](point.width, Layout(grid_of(point.length)))
    x = torch.randn(1, point.length, point.width)
    if point.mode == "forward":
        layer.eval()

        def forward() -> Tensor:
            with torch.inference_mode():
                return layer(x)

        return forward
    upstream = torch.randn_like(x)
    x.requires_grad_()

    def train() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        layer(x).backward(upstream)

    return train


class PeakMemory:
    """Of this process, by the kernel's own count; on other systems than Linux it is not known."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        _return_memory_at_once(True)
        try:
            self.RESET.write_text("5")
            self.before = self._kib("VmRSS:")
        except OSError:
            self.before = None

    def mib(self) -> float | None:
        peak = None if self.before is None else (self._kib("VmHWM:") - self.before) / 1024
        _return_memory_at_once(False)
        return peak

    def _kib(self, field: str) -> int:
        return next(int(line.split()[1]) for line in self.STATUS.read_text().splitlines() if line.startswith(field))


def _return_memory_at_once(wanted: bool) -> None:
    """What glibc keeps of freed memory would hide what a step allocates. False: as it is after a while by default."""
    of_maps, of_trims = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(of_maps, 2**16 if wanted else 2**25)
        libc.mallopt(of_trims, 0 if wanted else 2**26)
        libc.malloc_trim(0)
    except (AttributeError, OSError):
        return


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(point: Point, threads: int) -> report.Row:
    """The first run tells the memory and, where it is long, the time; else the time is the median of more runs."""
    torch.set_num_threads(threads)
    load = report.Load()
    step_of(Point(point.layer, point.mode, WARM_UP_LENGTH, point.width))()
    run = step_of(point)
    memory = PeakMemory()
    times = [seconds_of(run)]
    peak = memory.mib()
    if times[0] < 8.0:
        least = 5 if times[0] < 2.0 else 2
        run()
        times = []
        while len(times) < least or (sum(times) < 0.3 and len(times) < 200):
            times.append(seconds_of(run))
    row = {"layer": point.layer, "mode": point.mode, "length": point.length, "width": point.width}
    row |= {"seconds": statistics.median(times), "runs": len(times), "peak_mib": peak}
    return row | {"others_cores": load.others(), "threads": threads}


def measure_apart(point: Point, threads: int, limit: float) -> report.Row:
    """In a process of its own, which begins with the libraries loaded and nothing computed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, point, threads))
    process.start()
    sender.close()
    try:
        if receiver.poll(4 * limit):
            return receiver.recv()
        reason = f"took more than {4 * limit:.0f} s"
    except EOFError:
        reason = "ended before it had a result, as for want of memory"
    finally:
        process.kill()
        process.join()
    return skipped(point, reason)


def _send(sender: Connection, point: Point, threads: int) -> None:
    sender.send(measure(point, threads))


def skipped(point: Point, reason: str) -> report.Row:
    return {"layer": point.layer, "mode": point.mode, "length": point.length, "width": point.width, "skipped": reason}


def expectation(point: Point, rows: dict[str, report.Row], seconds: float, mib: float) -> str | None:
    """Why a point is not measured: what its last two measured predecessors let expect, at least in proportion."""
    by_length = point.width == WIDTH_OF_LENGTHS
    axis, of_point = ("length", point.length) if by_length else ("width", point.width)
    before = []
    for row in rows.values():
        same = all(row[key] == getattr(point, key) for key in ("layer", "mode", "width" if by_length else "length"))
        if same and row[axis] < of_point and "seconds" in row:
            before.append(row)
    before.sort(key=lambda row: row[axis])
    if len(before) < 2:
        return None
    for key, limit, unit in (("seconds", seconds, "s"), ("peak_mib", mib, "MiB")):
        last, earlier = before[-1], before[-2]
        if last[key] is None or last[key] < limit / 100:  # far from it, and too noisy to extrapolate
            continue
        exponent = math.log(max(1e-9, last[key]) / max(1e-9, earlier[key])) / math.log(last[axis] / earlier[axis])
        expected = last[key] * (of_point / last[axis]) ** max(1.0, exponent)
        if expected > limit:
            return f"about {expected:,.0f} {unit} expected, the limit is {limit:,.0f}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further point after this time")
    parser.add_argument("--limit-seconds", type=float, default=45.0, help="of one step")
    parser.add_argument("--limit-mib", type=float, default=3072.0, help="of one step")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attention_cost.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/attention-cost.md"), help="written at the end")
    arguments = parser.parse_args()

    start = time.perf_counter()
    rows = report.read(arguments.json)
    todo = [p for p in points() if p.layer in arguments.layers.split(",") and (arguments.again or p.name not in rows)]
    for done, point in enumerate(todo):
        if time.perf_counter() - start > arguments.seconds:
            print(f"{len(todo) - done} points are left; call again to go on")
            return
        reason = expectation(point, rows, arguments.limit_seconds, arguments.limit_mib)
        row = skipped(point, reason) if reason else measure_apart(point, arguments.threads, arguments.limit_seconds)
        row |= {"name": point.name, "versions": report.versions(("torch",))}
        rows = report.merge(arguments.json, [row])
        print(point.name, row.get("skipped") or f"{1e3 * row['seconds']:.3f} ms, {row['peak_mib']} MiB", flush=True)
    missing = [point.name for point in points() if point.name not in rows]
    if missing:
        print(f"the page is not written: {len(missing)} points are missing")
        return
    for path in attention_cost_page.write(arguments.page, rows):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
