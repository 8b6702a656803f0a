"""Axes of the benchmarks' charts."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator


def plain_numbers(axis: Axis, marks: Sequence[float] = ()) -> None:
    """On a logarithmic axis: plain numbers at the marks, or else at powers of ten."""
    axis.set_major_locator(FixedLocator(list(marks)) if marks else LogLocator(numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())
    if marks:
        axis.set_minor_locator(NullLocator())
