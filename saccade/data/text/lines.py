"""The lines of files of text, and where two such files part."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saccade.data.source import Problem

SHOWN = 60  # characters of a line that messages quote


def read_lines(path: Path, problems: list[Problem]) -> list[str] | None:
    """The lines of a file; None, and a problem more, where it cannot be read as text."""
    if path.is_dir():
        problems.append(Problem("unreadable", str(path), "is a folder; give a file with a text in each line"))
        return None
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError:
        problems.append(Problem("unreadable", str(path), "does not exist; check the spelling"))
        return None
    except (OSError, EOFError, zlib.error) as error:
        what = f"cannot be read ({getattr(error, 'strerror', None) or error}); get or copy it anew"
        problems.append(Problem("unreadable", str(path), what))
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        problems.append(Problem("encoding", f"{path}:{number}", not_utf8(data, error)))
        return None
    lines = text.split("\n")  # not splitlines: it also splits at separators that texts may hold
    for number, line in enumerate(lines, 1) if "\0" in text else ():
        if "\0" in line:
            what = "holds a NUL byte, which is part of no text; remove it, or write the file anew"
            problems.append(Problem("nul_byte", f"{path}:{number}", what, refuses=False))
    if not lines[-1]:  # behind the last line's end
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    remedy = f"convert it, as in `iconv -f {'utf-16' if wide else 'latin1'} -t utf-8`"
    return f"not UTF-8 (byte 0x{data[error.start]:02x}); {remedy}"


def different_lengths(one: Path, other: Path, a: list[str], b: list[str]) -> Problem:
    """Says where the two part. Translations have lengths of a steady ratio; after a missing line they have not."""
    shorter, more = (other, len(a) - len(b)) if len(a) > len(b) else (one, len(b) - len(a))
    where = parting(a, b)
    longer = one if shorter == other else other
    lacks = f"{shorter.name} has {more} line{'s' if more > 1 else ''} fewer than {longer.name}"
    if where >= min(len(a), len(b)):
        what = f"{lacks} ({len(a)} and {len(b)}); the lengths agree to the end of the shorter one, so it may be cut off"
    else:
        what = (
            f"{lacks} ({len(a)} and {len(b)}); judged by the lengths of lines they part near line {where + 1}, where "
            f"what is missing belongs: {quoted(a[where])} beside {quoted(b[where])}"
        )
    return Problem("different_lengths", f"{one}, {other}", what)


def quoted(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def parting(a: Sequence[str], b: Sequence[str]) -> int:
    """The line (from 0) from which on the shorter list fits better when it is moved by what it lacks."""
    if len(a) > len(b):
        a, b = b, a
    N, moved = len(a), len(b) - len(a)
    sizes = [np.log([len(text) + 4.0 for text in side]) for side in (a, b)]
    usual = float(np.median(sizes[0]) - np.median(sizes[1][:N])) if N else 0.0
    apart = [np.abs(sizes[0] - sizes[1][shift : N + shift] - usual) for shift in (0, moved)]
    before = np.concatenate([[0.0], np.cumsum(apart[0])])  # cost of lines before k as they stand
    after = np.concatenate([np.cumsum(apart[1][::-1])[::-1], [0.0]])  # and of the others, moved
    return int(np.argmin(before + after))
