"""What the command does with texts: translations in lines, drawn, streamed, and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from saccade.errors import UserError
from saccade.flags import natural, positive, share
from saccade.words import counted

OF_TEXTS = ("input", "stream", "beams", "length_penalty", "temperature", "top_k", "top_p", "seed")
STDIN = "-"
PIECE = 1 << 16  # bytes of standard input that are read at a time, at most
SHOWN_NOTES = 10  # of single texts


def add_search(group: Any) -> None:
    """How translations are searched for."""
    group.add_argument("--beams", type=positive, metavar="N", help="attempts side by side at a translation (default 4)")
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="P",
        help="a translation's logarithm is divided by its length to this power (default 1)",
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Flags of a prediction that only models of texts know."""
    texts = parser.add_argument_group("texts")
    texts.add_argument("--input", metavar="FILE", help="a file of texts, one a line, plain or .gz; - is standard input")
    texts.add_argument("--stream", action="store_true", help="print each piece as soon as it is known, without beams")
    add_search(texts)
    texts.add_argument(
        "--temperature", type=float, metavar="T", help="draw tokens instead of searching: above 1 wilder"
    )
    texts.add_argument("--top-k", type=positive, metavar="N", help="only from the N likeliest tokens")
    texts.add_argument("--top-p", type=share, metavar="P", help="only from the fewest that together are that likely")
    texts.add_argument("--seed", type=natural, metavar="N", help="of what is drawn (default 0)")


def predict_texts(model: Any, options: argparse.Namespace) -> int:
    """A line for each text."""

    from saccade.engine.progress import counter
    from saccade.engine.translate import Search, shortened

    for flag, value in (("--threshold", options.threshold), ("--coco", options.coco)):
        if value is not None:
            raise UserError(f"{flag} {value}: is for pictures, and {options.model} translates texts")
    names = ("beams", "length_penalty", "temperature", "top_k", "top_p", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.stream and (further := [*given, *(name for name in ("save", "json") if getattr(options, name))]):
        flags = ", ".join("--" + name.replace("_", "-") for name in further)
        raise UserError(f"--stream: says the likeliest token each time, at once; it does not go with {flags}")
    search = Search(**given)
    parts = given_texts(options, whole=not search.scored)
    if options.stream:
        return stream_texts(model, parts, options.input)
    saved: list[dict[str, Any]] = []
    pictures: list[Path] = []
    notes = Notes(options.input)
    endless = number = 0
    with counter("translating") as progress:
        for texts in parts:
            for result in model.each(
                texts,
                search,
                explained=options.save is not None,
                batch_size=options.batch_size,
                progress=None if options.input == STDIN else progress,  # it has no end that is known
            ):
                number += 1
                endless += result.cut
                facts = result.to_dict()
                if options.save is not None and result.relevance is not None:
                    pictures.append(result.save(picture_path(options, result.name, number)))
                    facts["picture"] = str(pictures[-1])
                if options.json:
                    saved.append(facts)
                else:
                    print(result, flush=options.input == STDIN)
                if result.note:
                    notes.say(number, f"{shortened(result.source)}: {result.note}")
    notes.end()
    if options.json:
        print(json.dumps(saved, ensure_ascii=False))
    if pictures:
        print(f"{said_of(pictures)}, with data as JSON beside", file=sys.stderr)
    if endless:
        print(
            f"note: {counted(endless, 'translation')} did not end, and {'was' if endless == 1 else 'were'} cut off; "
            "has the model learnt enough?",
            file=sys.stderr,
        )
    return 0


def given_texts(options: argparse.Namespace, *, whole: bool) -> Iterable[list[str]]:
    """What is to be translated, in parts: standard input as it arrives, or `whole`; all else at once."""
    from saccade.data.text.splits import read_texts

    if options.input is not None and options.inputs:
        raise UserError(f"--input {options.input}: and texts as well; give one of both")
    if options.input == STDIN:
        arriving = arriving_lines(sys.stdin.buffer)
        return [[line for part in arriving for line in part]] if whole else arriving
    if options.input is not None:
        texts = read_texts(options.input)
        if not texts:
            raise UserError(f"{options.input}: is empty; there is nothing to translate")
        return [texts]
    for text in options.inputs:
        if text == STDIN:
            raise UserError("-: is no text; for the lines of standard input, use --input -")
        if os.path.splitext(text)[1] and os.path.isfile(text):
            raise UserError(
                f"{text}: is a file, and texts are translated as they stand; for its lines, use --input {text}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{text[:40]!a}: is not UTF-8; put it into a file and use --input FILE") from None
    if not any(text.strip() for text in options.inputs):
        raise UserError("the text: is empty; there is nothing to translate")
    return [options.inputs]


def arriving_lines(stream: BinaryIO) -> Iterator[list[str]]:
    """The lines of a pipe or a terminal, as many at a time as are there."""
    from saccade.data.text.lines import not_utf8

    number, rest = 0, b""
    while True:
        data = stream.read1(PIECE)  # pyright: ignore[reportAttributeAccessIssue]
        *lines, rest = (rest + data).split(b"\n")
        if not data and rest:
            lines.append(rest)
        texts = []
        for line in lines:
            number += 1
            try:
                texts.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r"))
            except UnicodeDecodeError as error:
                raise UserError(f"standard input, line {number}: {not_utf8(line, error)}") from None
        if texts:
            yield texts
        if not data:
            break
    if not number:
        raise UserError("standard input: is empty; there is nothing to translate")


def said_of(pictures: Sequence[Path]) -> str:
    """Where they were written, and how many."""
    if len(pictures) == 1:
        return f"the picture is {pictures[0]}"
    return f"{len(pictures)} pictures are in {pictures[0].parent}"


def picture_path(options: argparse.Namespace, name: str, number: int) -> Path:
    """In a folder, lines of a file have their numbers in their pictures' names."""
    path = Path(options.save)
    if options.input is None or (path.suffix and not path.is_dir()):
        return path
    return path / f"{number:04d}-{name}.png"


class Notes:
    """What is to be said of single texts, where they come from; of many, only the first."""

    def __init__(self, file: str | None):
        self.file = "standard input" if file == STDIN else file
        self.count = 0

    def say(self, number: int, what: str) -> None:
        self.count += 1
        if self.count <= SHOWN_NOTES:
            line = "" if self.file is None else f"{self.file}, line {number}: "
            print(f"note: {line}{what}", file=sys.stderr)

    def end(self) -> None:
        if self.count > SHOWN_NOTES:
            print(f"note: the like of {counted(self.count - SHOWN_NOTES, 'text')} more", file=sys.stderr)


def stream_texts(model: Any, parts: Iterable[Sequence[str]], file: str | None) -> int:
    """A line for each text, which grows while it is translated."""
    import warnings

    notes = Notes(file)
    for number, text in enumerate((text for texts in parts for text in texts), 1):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for piece in model.stream(text):
                print(piece, end="", flush=True)
        print(flush=True)
        for warning in said:
            notes.say(number, str(warning.message))
    notes.end()
    return 0
