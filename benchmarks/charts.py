"""Axes of the benchmarks' charts."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator


def plain_numbers(axis: Axis, marks: Sequence[float] = ()) -> None:
    """On a logarithmic axis: plain numbers at the marks, or else at powers of ten; of few powers between them, too."""
    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(FixedLocator(list(marks)) if marks else LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())
    if marks:
        axis.set_minor_locator(NullLocator())
