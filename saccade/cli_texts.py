"""What the command does with texts: translations in lines, drawn, streamed, and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from saccade.errors import UserError
from saccade.flags import natural, positive, share
from saccade.words import counted

OF_TEXTS = ("input", "stream", "beams", "length_penalty", "temperature", "top_k", "top_p", "seed")


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
    texts.add_argument("--input", metavar="FILE", help="a file with a text in each line, plain or .gz")
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

    from saccade.data.text.parallel import read_texts
    from saccade.engine.progress import counter
    from saccade.engine.translate import Search

    for flag, value in (("--threshold", options.threshold), ("--coco", options.coco)):
        if value is not None:
            raise UserError(f"{flag} {value}: is for pictures, and {options.model} translates texts")
    if options.input is not None and options.inputs:
        raise UserError(f"--input {options.input}: and texts as well; give one of both")
    for text in options.inputs:
        if os.path.splitext(text)[1] and os.path.isfile(text):
            raise UserError(
                f"{text}: is a file, and texts are translated as they stand; for its lines, use --input {text}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{text[:40]!a}: is not UTF-8; put it into a file and use --input FILE") from None
    texts = options.inputs if options.input is None else read_texts(options.input)
    if not any(text.strip() for text in texts):
        raise UserError(f"{options.input or 'the text'}: is empty; there is nothing to translate")
    names = ("beams", "length_penalty", "temperature", "top_k", "top_p", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.stream:
        return stream_texts(model, texts, [*given, *(name for name in ("save", "json") if getattr(options, name))])
    search = Search(**given)
    saved: list[dict[str, Any]] = []
    endless = 0
    with counter("translating") as progress:
        for result in model.each(
            texts, search, explained=options.save is not None, batch_size=options.batch_size, progress=progress
        ):
            endless += result.cut
            facts = result.to_dict()
            if options.save is not None and result.relevance is not None:
                facts["picture"] = str(result.save(options.save))
            if options.json:
                saved.append(facts)
            else:
                print(result)
            if result.note:
                print(f"note: {result.source[:40]!r}...: {result.note}", file=sys.stderr)
    if options.json:
        print(json.dumps(saved, ensure_ascii=False))
    if endless:
        print(
            f"note: {counted(endless, 'translation')} did not end, and {'was' if endless == 1 else 'were'} cut off; "
            "has the model learnt enough?",
            file=sys.stderr,
        )
    return 0


def stream_texts(model: Any, texts: Sequence[str], further: Sequence[str]) -> int:
    """A line for each text, which grows while it is translated."""
    import warnings

    if further:
        flags = ", ".join("--" + name.replace("_", "-") for name in further)
        raise UserError(f"--stream: says the likeliest token each time, at once; it does not go with {flags}")
    for text in texts:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for piece in model.stream(text):
                print(piece, end="", flush=True)
        print()
        for warning in said:
            print(f"note: {warning.message}", file=sys.stderr)
    return 0
