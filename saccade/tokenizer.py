"""Text as numbers and back. A tokenizer travels in the model file as plain data; nothing of it is executed."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from saccade.errors import UserError

PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
UNKNOWN_SHOWN = "⁇"  # in text, for what the vocabulary has no token for
NAMED = 10  # unknown characters that a note names
WORD = "▁"  # what a token begins with that begins a word


class Tokenizer(ABC):
    """One vocabulary for both languages. Encoded texts end with `end`; `pad` fills up batches and means nothing."""

    pad: int
    start: int
    end: int
    unknown: int

    @property
    @abstractmethod
    def size(self) -> int:
        """Tokens in the vocabulary."""

    @abstractmethod
    def encode(self, texts: Sequence[str], *, target: bool = False) -> list[list[int]]:
        """Numbers of each text, with `end` behind them; `target`: of the language that is translated into."""

    @abstractmethod
    def decode(self, tokens: Sequence[Sequence[int]], *, target: bool = True) -> list[str]:
        """Texts, without what only steers: padding, start and end."""

    @abstractmethod
    def pieces(self, tokens: Sequence[int], *, target: bool = True) -> list[str]:
        """Each token as it is shown to people; one that begins a word begins with a space."""

    @abstractmethod
    def to_text(self) -> str:
        """For the model file; `read_tokenizer` reads it."""


def refuse_text(texts: Sequence[str]) -> None:
    """A text alone would be taken for as many texts as it has characters."""
    if isinstance(texts, str):
        raise UserError(f"{texts[:40]!r}: is one text; give a list of them")


def unknown_characters(tokenizer: Tokenizer, text: str, *, target: bool = False) -> list[str]:
    """Those of a text that have no token."""
    letters = [letter for letter in dict.fromkeys(text) if not letter.isspace()]
    encoded = zip(letters, tokenizer.encode(letters, target=target), strict=True)
    return [letter for letter, tokens in encoded if tokenizer.unknown in tokens]


def listed(characters: Sequence[str]) -> str:
    """For a note that names them."""
    more = " ..." if len(characters) > NAMED else ""
    return f": {' '.join(characters[:NAMED])}{more}" if characters else ""


class LearntTokenizer(Tokenizer):
    """Subwords learnt from the training text: BPE (https://arxiv.org/abs/1508.07909) or a unigram model
    (https://arxiv.org/abs/1804.10959), by Hugging Face's `tokenizers`.

    Words are split at spaces, and punctuation and digits stand alone, so that `snow.` needs no token of its own. What
    is decoded is the text itself but for runs of spaces and for characters that the training text has not.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        ids = [inner.token_to_id(name) for name in (PAD, START, END, UNKNOWN)]
        if None in ids:
            raise UserError(f"its tokenizer lacks one of {PAD} {START} {END} {UNKNOWN}; get the file anew")
        self.pad, self.start, self.end, self.unknown = ids
        inner.encode_special_tokens = True  # a text that says <s> says three characters
        numbers = sorted(inner.get_vocab().values())
        if numbers != list(range(len(numbers))):
            raise UserError("the tokens of its tokenizer are not numbered one after the other; get the file anew")

    @property
    def size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, texts: Sequence[str], *, target: bool = False) -> list[list[int]]:
        refuse_text(texts)
        found = self.inner.encode_batch([clean(text) for text in texts], add_special_tokens=False)
        return [[*each.ids, self.end] for each in found]

    def decode(self, tokens: Sequence[Sequence[int]], *, target: bool = True) -> list[str]:
        return ["".join(self.pieces(each)).strip() for each in tokens]

    def pieces(self, tokens: Sequence[int], *, target: bool = True) -> list[str]:
        steering = {self.pad, self.start, self.end}
        return [self._shown(token) for token in tokens if token not in steering]

    def _shown(self, token: int) -> str:
        return UNKNOWN_SHOWN if token == self.unknown else self._vocabulary[token].replace(WORD, " ")

    @cached_property
    def _vocabulary(self) -> dict[int, str]:
        return {number: piece for piece, number in self.inner.get_vocab().items()}

    def to_text(self) -> str:
        return json.dumps({"kind": "learnt", "tokenizer": json.loads(self.inner.to_str())})


def learn_tokenizer(texts: Sequence[str], size: int, kind: str = "bpe") -> LearntTokenizer:
    """A joint vocabulary of at most `size` tokens from the training text of both languages."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = [PAD, START, END, UNKNOWN]
    if kind == "bpe":
        inner = Inner(models.BPE(unk_token=UNKNOWN))
        most = max(1, size // 2)  # characters: the rarest of many are unknown, so that words have room, too
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=most, show_progress=False)
    else:
        inner = Inner(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token=UNKNOWN, show_progress=False
        )
    inner.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    inner.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Metaspace(replacement=WORD, prepend_scheme="always"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    inner.decoder = decoders.Metaspace(replacement=WORD)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        inner.train_from_iterator(_cleaned(texts), trainer=trainer, length=len(texts))
    except Exception as error:  # `tokenizers` has no other
        raise UserError(f"--text.vocabulary {size}: no {kind} tokenizer can be learnt ({error}); allow more") from None
    return LearntTokenizer(inner)


def _cleaned(texts: Sequence[str], chunk: int = 1000) -> Iterator[list[str]]:
    for start in range(0, len(texts), chunk):
        yield [clean(text) for text in texts[start : start + chunk]]


def clean(text: str) -> str:
    """Any run of spaces, tabs and line ends is one space; a literal ▁ is an underscore, for it means a space here."""
    return " ".join(whole(text).replace(WORD, "_").split())


def whole(text: str) -> str:
    """Halves of characters, which Python's strings may hold, are unknown characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class MarianTokenizer(Tokenizer):
    """A sentencepiece model for each language over one list of pieces, as the opus-mt models have it."""

    def __init__(self, source: bytes, target: bytes, vocabulary: dict[str, int], where: str = "model file"):
        self.models = source, target
        self.vocabulary = vocabulary
        self.where = where
        missing = [name for name in (PAD, END, UNKNOWN) if name not in vocabulary]
        if missing:
            raise UserError(f"{where}: its vocabulary lacks {', '.join(missing)}; get it anew")
        self.pad = self.start = vocabulary[PAD]
        self.end, self.unknown = vocabulary[END], vocabulary[UNKNOWN]
        self.processors = tuple(
            self._processor(data, name) for data, name in ((source, "source.spm"), (target, "target.spm"))
        )

    def _processor(self, data: bytes, name: str) -> Any:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except (RuntimeError, TypeError):
            raise UserError(f"{self.where}: {name} is damaged or no sentencepiece model; get it anew") from None
        return processor

    @property
    def size(self) -> int:
        return max(self.vocabulary.values()) + 1

    def encode(self, texts: Sequence[str], *, target: bool = False) -> list[list[int]]:
        """`>>fra<<` in front of a source text is a token: it tells a model of several languages which one is wanted."""
        refuse_text(texts)
        found = []
        for text in texts:
            code: list[str] = []
            if not target and text.startswith(">>") and "<<" in text:
                code, text = [text[: text.index("<<") + 2]], text[text.index("<<") + 2 :].strip()
            pieces = code + self.processors[target].EncodeAsPieces(whole(text))
            found.append([*(self.vocabulary.get(piece, self.unknown) for piece in pieces), self.end])
        return found

    def decode(self, tokens: Sequence[Sequence[int]], *, target: bool = True) -> list[str]:
        texts = []
        for each in tokens:
            pieces = [self._pieces.get(token, UNKNOWN) for token in each if token not in (self.pad, self.end)]
            texts.append(self.processors[target].DecodePieces(pieces).replace(WORD, " ").strip())
        return texts

    def pieces(self, tokens: Sequence[int], *, target: bool = True) -> list[str]:
        kept = [token for token in tokens if token not in (self.pad, self.end)]
        shown = {**self._pieces, self.unknown: UNKNOWN_SHOWN}  # weights may know more tokens than the list names
        return [shown.get(token, UNKNOWN_SHOWN).replace(WORD, " ") for token in kept]

    def missing(self) -> dict[str, float]:
        """By file: the share of its pieces that the list lacks, which texts lose. The published ones lack none."""
        shares = {}
        for name, processor in zip(("source.spm", "target.spm"), self.processors, strict=True):
            numbers = (i for i in range(processor.GetPieceSize()) if not processor.IsControl(i))
            pieces = [processor.IdToPiece(i) for i in numbers]
            shares[name] = sum(piece not in self.vocabulary for piece in pieces) / max(1, len(pieces))
        return shares

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {number: piece for piece, number in self.vocabulary.items()}

    def to_text(self) -> str:
        source, target = (base64.b64encode(data).decode() for data in self.models)
        return json.dumps({"kind": "marian", "source": source, "target": target, "vocabulary": self.vocabulary})


def read_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer that a model file holds; every fault is a UserError that names `where`."""
    try:
        values = json.loads(text)
        if values["kind"] == "learnt":
            from tokenizers import Tokenizer as Inner

            return LearntTokenizer(Inner.from_str(json.dumps(values["tokenizer"])))
        if values["kind"] == "marian":
            source, target = (base64.b64decode(values[name], validate=True) for name in ("source", "target"))
            vocabulary = {str(piece): int(number) for piece, number in values["vocabulary"].items()}
            return MarianTokenizer(source, target, vocabulary, where)
    except UserError as error:
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from None
    except Exception as error:  # whatever `tokenizers` says of a damaged description: its own are bare Exceptions
        raise UserError(f"{where}: its tokenizer is damaged ({error!r:.200}); get the file anew") from None
    raise UserError(f"{where}: a tokenizer of the kind {values['kind']!r}; update the library")
