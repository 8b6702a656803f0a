"""Text to numbers and back: nothing is lost that the training text has, nothing crashes on what it has not."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece

from saccade.errors import UserError
from saccade.tokenizer import (
    UNKNOWN_SHOWN,
    LearntTokenizer,
    MarianTokenizer,
    Tokenizer,
    clean,
    learn_tokenizer,
    read_tokenizer,
    whole,
)

TEXT = [
    "Two young, White males are outside near many bushes.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    'A man in a "blue" shirt (number 17) is standing on a ladder - cleaning a window!',
    "Ein Mann mit 'blauem' Hemd steht auf einer Leiter und putzt ein Fenster; gut?",
] * 5


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def learnt(request: pytest.FixtureRequest) -> LearntTokenizer:
    return learn_tokenizer(TEXT, 150, request.param)


@pytest.fixture(scope="module")
def marian() -> MarianTokenizer:
    return make_marian(TEXT)


def make_marian(text: list[str]) -> MarianTokenizer:
    models = []
    for _ in range(2):
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=90, minloglevel=2, num_threads=1
        )
        models.append(file.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[0])
    pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    kept = [piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>")]
    names = ["</s>", "<unk>", *kept, ">>fra<<", "<pad>"]
    return MarianTokenizer(models[0], models[1], {name: i for i, name in enumerate(names)})


def test_there_and_back(learnt: LearntTokenizer) -> None:
    encoded = learnt.encode(TEXT)
    assert learnt.decode(encoded) == [clean(text) for text in TEXT]
    assert all(tokens[-1] == learnt.end for tokens in encoded)
    assert not any({learnt.pad, learnt.start} & {*tokens} for tokens in encoded)
    assert max(token for tokens in encoded for token in tokens) < learnt.size <= 150
    assert "".join(learnt.pieces(encoded[0])).strip() == TEXT[0]


def test_bpe_is_the_same_each_time() -> None:
    assert learn_tokenizer(TEXT, 150).to_text() == learn_tokenizer(TEXT, 150).to_text()


def both() -> list[Tokenizer]:
    return [learn_tokenizer(TEXT, 150), make_marian(TEXT)]


@pytest.mark.parametrize("tokenizer", both(), ids=["learnt", "marian"])
def test_unknown_characters_and_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["", "  \t "]) == [[tokenizer.end]] * 2
    assert tokenizer.decode([[], [tokenizer.pad, tokenizer.end]]) == ["", ""]
    encoded = tokenizer.encode(["日本 ☃ many \x00 Men 🦊."])[0]
    assert tokenizer.unknown in encoded
    assert "⁇" in "".join(tokenizer.pieces(encoded))
    assert "many" in tokenizer.decode([encoded], target=False)[0]


@pytest.mark.parametrize("tokenizer", both(), ids=["learnt", "marian"])
def test_in_a_model_file(tokenizer: Tokenizer) -> None:
    again = read_tokenizer(tokenizer.to_text(), "file")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.encode(TEXT, target=True) == tokenizer.encode(TEXT, target=True)
    assert (again.size, again.pad, again.start, again.end) == (
        tokenizer.size, tokenizer.pad, tokenizer.start, tokenizer.end,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"kind": "other"}', '{"kind": "learnt", "tokenizer": {}}', '{"kind": "marian"}',
     json.dumps({"kind": "marian", "source": "!!", "target": "", "vocabulary": {}}),
     json.dumps({"kind": "marian", "source": "eA==", "target": "eA==",
                 "vocabulary": {"<pad>": 0, "</s>": 1, "<unk>": 2}})],
)  # fmt: skip
def test_damaged(text: str) -> None:
    with pytest.raises(UserError, match="^file: "):
        read_tokenizer(text, "file")


def test_marian_languages(marian: MarianTokenizer) -> None:
    code = marian.vocabulary[">>fra<<"]
    assert marian.encode([">>fra<< Two young"])[0][0] == code
    assert marian.encode([">>fra<< Two young"])[0][1:] == marian.encode(["Two young"])[0]
    assert code not in marian.encode([">>fra<< Two young"], target=True)[0]


def test_numbers_without_a_piece(marian: MarianTokenizer) -> None:
    """Weights may know more tokens than the list names."""
    known = marian.encode(["Two"])[0][:-1]
    assert marian.pieces([*known, marian.size + 3])[-1] == UNKNOWN_SHOWN
    assert UNKNOWN_SHOWN in marian.decode([[*known, marian.size + 3]])[0]


@pytest.mark.parametrize("tokenizer", both(), ids=["learnt", "marian"])
def test_halves_of_characters_are_unknown(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["Two \ud800"]) == tokenizer.encode(["Two \ufffd"])
    assert whole("Zwei 🎉 ▁ \u2028") == "Zwei 🎉 ▁ \u2028" and whole("\ud83c\udf89") == "🎉"


def test_names_of_steering_tokens_are_text(learnt: LearntTokenizer) -> None:
    (tokens,) = learnt.encode(["Two <s> </s> <pad>"])
    assert not {learnt.pad, learnt.start, learnt.end} & {*tokens[:-1]}
    assert len(learnt.pieces(tokens)) == len(tokens) - 1
    (again,) = read_tokenizer(learnt.to_text(), "file").encode(["Two <s> </s> <pad>"])
    assert again == tokens


def test_a_vocabulary_has_the_size_that_was_asked_for() -> None:
    """Also where there are more characters than that: the rarest are unknown, and words still have tokens."""
    many = ["".join(chr(0x4E00 + (7 * i + k) % 900) for k in range(9)) for i in range(900)] + TEXT * 20
    learnt = learn_tokenizer(many, 200)
    assert learnt.size == 200 and any(len(piece) > 2 for piece in learnt.inner.get_vocab() if piece[0] != "<")
    with pytest.raises(UserError, match="text.vocabulary 200: no unigram tokenizer can be learnt"):
        learn_tokenizer(many, 200, "unigram")
