"""Numbers with their nouns, and what several rooms must call the same."""

from __future__ import annotations


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 picture`, `2 pictures`; `many` where the plural is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


# by task: what data hold, and what a model does
HOLDS = {"classify": "a class for each picture", "detect": "boxes around things", "translate": "pairs of texts"}
DOES = {
    "classify": "classifies pictures",
    "detect": "detects objects",
    "translate": "translates texts",
    "embed": "has no classes",
}
