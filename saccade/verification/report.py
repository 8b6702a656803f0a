"""The verdict, for people and as a certificate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.verification.certificate import refuse_other_file
from saccade.verification.compare import TOLERANCES, Comparison, Gap
from saccade.weights.model_file import write_atomically

WORST = 3  # gradients that are shown


@dataclass(frozen=True)
class Verification:
    """How far our model and the reference are apart. `facts` is what a certificate says beside the figures."""

    reference: str  # in words
    facts: dict[str, Any]
    comparisons: Mapping[str, Comparison]  # by number format
    recorded: Mapping[str, Any]  # the reference's answers, by number format
    faults: tuple[str, ...] = ()  # other than figures: weights that are not the certified ones

    def __repr__(self) -> str:
        return f"<Verification: {self.verdict}>"

    @property
    def agrees(self) -> bool:
        return not self.faults and all(each.agrees for each in self.comparisons.values())

    @property
    def first_departure(self) -> tuple[str, Gap] | None:
        """The first stage, in the order of computation, that departs in any number format; with that format."""
        found = [
            (position, dtype, gap)
            for dtype, each in self.comparisons.items()
            for position, gap in enumerate(each.forward)
            if not gap.agrees
        ]
        return min(found, key=lambda each: each[0])[1:] if found else None

    @property
    def worst_gradient(self) -> tuple[str, Gap] | None:
        """A parameter's gradient that departs, the worst of the finest format."""
        for dtype in reversed(list(self.comparisons)):
            worst = self.comparisons[dtype].worst_gradients[:1]
            if worst and not worst[0].agrees:
                return dtype, worst[0]
        return None

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if self.agrees:
            return f"agrees with {self.reference}"
        reasons = list(self.faults)
        if (first := self.first_departure) is not None:
            reasons.append(f"the first stage to depart is {first[1].name} ({_amount(*first)})")
        if (worst := self.worst_gradient) is not None:
            reasons.append(f"the worst gradient is that of {worst[1].name} ({_amount(*worst)})")
        return f"DEPARTS from {self.reference}: {'; '.join(reasons)}"

    def to_dict(self) -> dict[str, Any]:
        first = self.first_departure
        return {
            "agrees": self.agrees,
            "verdict": self.verdict,
            "first_departure": None if first is None else first[1].name,
            **self.facts,
            "tolerances": {dtype: dict(vars(TOLERANCES[dtype])) for dtype in self.comparisons},
            "figures": {dtype: each.to_dict() for dtype, each in self.comparisons.items()},
        }

    def save(self, path: str | Path) -> None:
        """The certificate: everything that is said here, and the reference's recorded answers.

        It replaces another certificate, and no other file.
        """
        path = Path(path)
        refuse_other_file(path)
        values = {**self.to_dict(), "recorded": dict(self.recorded)}
        write_atomically(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())

    def render(self, console: Console) -> None:
        kind = "pictures" if "pictures" in self.facts else "texts"
        shown = self.facts[kind]
        say(
            console,
            f"{self.facts['source']}: {self.facts['dialect']} {self.facts['family']} ({self.facts['about']}), "
            f"{self.facts['mode']} mode, {shown['count']} {kind} of {size_of(shown)} ({shown['origin']})",
        )
        for note in self.facts["notes"]:
            say(console, f"  {note}")
        dtypes = list(self.comparisons)
        rows = [
            (gaps[0].name, dict(zip(dtypes, gaps, strict=True)))
            for gaps in zip(*(self.comparisons[dtype].forward for dtype in dtypes), strict=True)
        ]
        worst = {dtype: self.comparisons[dtype].worst_gradients[:WORST] for dtype in dtypes}
        rows += [(f"gradient of {gap.name}", {dtype: gap}) for dtype in dtypes for gap in worst[dtype]]
        width = max(len(name) for name, _ in rows)
        head = "".join(f"  {dtype:>8}  relative" for dtype in dtypes)
        say(console, f"{'largest difference':{width}}{head}", "bold")
        for name, gaps in rows:
            departing = [gap for gap in gaps.values() if not gap.agrees]
            cells = "".join(f"  {_cells(gaps.get(dtype))}" for dtype in dtypes)
            noted = [gap.note for gap in departing or gaps.values() if gap.note]
            verdict = " ".join(["DEPARTS" if departing else "agrees", *noted[:1]])
            say(console, f"{name:{width}}{cells}  {verdict}", "red" if departing else "")
        for dtype in dtypes:
            far = sum(not gap.agrees for gap in self.comparisons[dtype].gradients)
            text = f"{far} of them depart" if far else "all agree"
            say(console, f"{dtype}: gradients of {len(self.comparisons[dtype].gradients)} parameters, {text}")
        say(console, self.verdict, "bold green" if self.agrees else "bold red")


def size_of(shown: Mapping[str, Any]) -> str:
    """Of pictures or texts, as certificates describe them."""
    return f"{shown['height']} x {shown['width']}" if "height" in shown else f"up to {shown['tokens']} tokens"


def say(console: Console, text: str, style: str = "") -> None:
    """A line that is never cut, wherever it goes."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def _cells(gap: Gap | None) -> str:
    return " " * 18 if gap is None else f"{figure(gap.absolute):>8}  {figure(gap.relative):>8}"


def figure(value: float) -> str:
    return "-" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def _amount(dtype: str, gap: Gap) -> str:
    return gap.note or f"{dtype}: {figure(gap.absolute)}, relative {figure(gap.relative)}"
