"""Numbers with their nouns, and what several rooms must call the same."""

from __future__ import annotations

import re
from collections.abc import Sequence

# codes of three letters that data use in the place of the usual ones
LANGUAGES = {
    "zho": "zh", "chi": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko", "tha": "th", "lao": "lo", "khm": "km", "mya": "my",
    "bur": "my", "eng": "en", "deu": "de", "ger": "de", "fra": "fr", "fre": "fr", "spa": "es", "rus": "ru",
}  # fmt: skip


def language(code: str) -> str:
    """`zh` for zh, zh-CN, zh_Hans and zho."""
    primary = re.split("[-_]", code)[0].lower()
    return LANGUAGES.get(primary, primary)


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 picture`, `2 pictures`; `many` where the plural is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def with_article(noun: str) -> str:
    """With its article, `a` or `an`: by how it is said, which of names in small letters the first one tells."""
    spelt = bool(re.match(r"(rnn|lstm|lw|rf)", noun))  # said letter by letter
    return f"{'an' if noun[:1] in 'aeio' or spelt else 'a'} {noun}"


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# by task: what data hold, and what a model does
HOLDS = {"classify": "a class for each picture", "detect": "boxes around things", "translate": "pairs of texts"}
DOES = {
    "classify": "classifies pictures",
    "detect": "detects objects",
    "translate": "translates texts",
    "embed": "has no classes",
}
