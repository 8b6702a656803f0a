"""Whose weights are these? By the names of their tensors, against every dialect that is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from saccade.errors import UserError
from saccade.models import BACKBONES, DETECTORS
from saccade.weights.formats import FORMATS
from saccade.weights.formats.table import Format, NoWords, Shapes

ODD = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RuntimeError)
LIKE = 0.25  # share of names in common below which a likeness means nothing


def matching(shapes: Shapes, config: Mapping[str, Any]) -> list[Format]:
    """The formats that say these are theirs."""
    return [each for each in FORMATS if _recognises(each, shapes, config)]


def _recognises(form: Format, shapes: Shapes, config: Mapping[str, Any]) -> bool:
    try:
        return form.recognises(shapes, config)
    except ODD:  # a config.json can hold anything; one that cannot be understood is not recognised
        return False


def recognise(where: str, shapes: Shapes, config: Mapping[str, Any]) -> Format:
    """The format of these weights; where none fits, a UserError says what they look like and what is known."""
    found = matching(shapes, config)
    if found:
        return found[0]
    known = ", ".join(dict.fromkeys(each.name for each in FORMATS))
    stated = config.get("model_type") or config.get("architecture")
    says = f" Its config.json says {stated!r}." if isinstance(stated, str) else ""
    names = patterns(shapes)
    alike = [(likeness(names, expected), form, expected) for form, expected in _expected()]
    share, form, expected = max(alike, key=lambda each: each[0], default=(0.0, None, set[str]()))
    if form is None or share < LIKE:
        shown = ", ".join(list(shapes)[:4]) or "nothing"
        raise UserError(f"{where}: weights of an unknown family ({shown}, ...).{says} Known are: {known}")
    reasons = [*_examples("lacking", expected - names), *_examples("left over", names - expected)]
    why = "; ".join(reasons) or "the names fit, but not the shapes or what config.json says"
    raise UserError(
        f"{where}: looks most like {form.name} ({share:.0%} of the names), but is none that can be read: "
        f"{why}.{says} Known are: {known}"
    )


def patterns(names: Mapping[str, Any] | set[str]) -> set[str]:
    """Names with their numbers taken out, so that depth does not count."""
    return {re.sub(r"\d+", "#", name) for name in names}


def likeness(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(1, len(one | other))


def _expected() -> list[tuple[Format, set[str]]]:
    """The names that each format has for the models of its family's table, with a head."""
    expected = []
    for form in FORMATS:
        for row in (*BACKBONES.values(), *DETECTORS.values()):
            if row.family == form.family:
                try:
                    rules = form.rules(row, 1000)
                except NoWords:
                    continue
                expected.append((form, patterns({name for rule in rules for name in rule.theirs})))
    return expected


def _examples(what: str, names: set[str]) -> list[str]:
    return [f"{what} {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"] if names else []
