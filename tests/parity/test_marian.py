"""Marian's models against transformers, with random weights: every block, logits, loss, gradients, and what the search
finds, token for token; and their tokenizers, made here and laid out as on the hub."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from compare import randomise
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import saccade.verification as verification
import saccade.verification.texts as verification_texts
from saccade.cli import main
from saccade.decoding import beam_search, greedy
from saccade.errors import UserError
from saccade.models.transformer import Transformer, TransformerRow
from saccade.tokenizer import MarianTokenizer, read_tokenizer
from saccade.verification import Subject, open_subject, verify
from saccade.verification.texts import ask_ours, choose_texts
from saccade.weights.convert import import_weights
from saccade.weights.export import convert
from saccade.weights.formats.marian import FORMATS, build_peer
from saccade.weights.formats.table import read_gradients, read_state, write_state
from saccade.weights.load import load_network
from saccade.weights.source import open_weights

transformers = pytest.importorskip("transformers")
(FORMAT,) = FORMATS

# logits and encoder states, loss; gradients relative to each parameter's largest. Measured at worst: see the tests.
LIMITS = {torch.float32: (1e-4, 1e-4, 1e-3), torch.float64: (1e-9, 1e-9, 1e-8)}
TINY = TransformerRow(
    width=32, heads=4, hidden=48, encoder_depth=2, decoder_depth=3, mlp="silu", logit_bias=True, dropout=0.0,
    max_length=64, vocabulary=120, pad=119, begin=119, end=0,
)  # fmt: skip
BASE = TransformerRow(
    width=512, heads=8, hidden=2048, encoder_depth=6, decoder_depth=6, mlp="silu", logit_bias=True, dropout=0.0,
    max_length=512, vocabulary=8000, pad=7999, begin=7999, end=0,
)  # fmt: skip


def twins(row: TransformerRow, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Transformer, Any]:
    theirs = random_peer(row, seed)
    ours = Transformer(row)
    state = FORMAT.complete(theirs.state_dict(), {}) if FORMAT.complete else {}
    ours.load_state_dict(read_state(state, FORMAT.rules(row, 0), (), "theirs"))
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def random_peer(row: TransformerRow, seed: int) -> Any:
    """With a bias of the scores, and with positions as they were: they are computed, not learnt."""
    theirs: Any = build_peer(row)
    waves = theirs.model.encoder.embed_positions.weight.clone()
    randomise(theirs, seed)
    with torch.no_grad():
        theirs.model.shared.weight.mul_(row.width**-0.5)
        theirs.final_logits_bias.copy_(0.3 * torch.randn(row.vocabulary, generator=torch.Generator().manual_seed(seed)))
        for part in (theirs.model.encoder, theirs.model.decoder):
            part.embed_positions.weight.copy_(waves)
    return theirs


def texts(row: TransformerRow, rows: int = 4, length: int = 11, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(2, row.vocabulary - 1, (rows, length), generator=generator)
    for i, used in enumerate(torch.randint(2, length, (rows - 1,), generator=generator).tolist()):
        source[i, used] = row.end
        source[i, used + 1 :] = row.pad
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("row", [TINY, pytest.param(BASE, marks=pytest.mark.slow)], ids=["tiny", "base"])
def test_states_logits_loss_and_gradients(row: TransformerRow, dtype: torch.dtype) -> None:
    """Measured, logits and gradients: tiny float32 0 and 4e-7, float64 2e-15 and 2e-15; base float32 2e-7 and 1e-6,
    float64 5e-15 and 5e-15."""
    ours, theirs = twins(row, dtype)
    source, target = texts(row), texts(row, length=7, seed=1)
    inputs = torch.cat((torch.full((4, 1), row.begin), target[:, :-1]), dim=1)
    expected = theirs(input_ids=source, attention_mask=(source != row.pad).long(), decoder_input_ids=inputs)
    memory, keep = ours.encode(source)
    got = ours(source, inputs).logits
    kept = keep[:, 0, 0]
    most_logits, most_loss, most_gradient = LIMITS[dtype]
    assert (memory - expected.encoder_last_hidden_state)[kept].abs().max() <= most_logits
    assert got.std() > 0.1 and (got - expected.logits).abs().max() <= most_logits
    losses = [
        F.cross_entropy(each.flatten(0, 1), target.flatten(), ignore_index=row.pad) for each in (got, expected.logits)
    ]
    assert abs(losses[0] - losses[1]) <= most_loss
    for loss in losses:
        loss.backward()
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    rules = [rule for rule in FORMAT.rules(row, 0) if rule.ours != "logit_bias"]  # theirs is a buffer; see `verify`
    gradients = read_gradients(named, rules)
    for name, parameter in ours.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            size = gradients[name].abs().max()
            gap = (parameter.grad - gradients[name]).abs().max() / size
            assert size > 0 and gap <= most_gradient, f"{name}: {float(gap)}"


def test_published_loss_is_ours() -> None:
    """transformers' own loss, from its own shift of the labels."""
    ours, theirs = twins(TINY)
    source, target = texts(TINY), texts(TINY, length=7, seed=1)
    labels = target.masked_fill(target == TINY.pad, -100)
    expected = theirs(input_ids=source, attention_mask=(source != TINY.pad).long(), labels=labels).loss
    inputs = torch.cat((torch.full((4, 1), TINY.begin), target[:, :-1]), dim=1)
    loss = F.cross_entropy(ours(source, inputs).logits.flatten(0, 1), target.flatten(), ignore_index=TINY.pad)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def taught(row: TransformerRow, seed: int) -> tuple[Transformer, Any]:
    """Half taught to say texts backwards, so that translations differ and end at different places."""
    torch.manual_seed(seed)
    ours, theirs = Transformer(row), build_peer(row)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(ours.parameters(), lr=5e-3)
    for _ in range(80):
        length = int(torch.randint(4, 10, (), generator=generator))
        words = torch.randint(2, row.vocabulary - 1, (24, length), generator=generator)
        ends = torch.full((24, 1), row.end)
        target = torch.cat((words.flip(1), ends), dim=1)
        inputs = torch.cat((torch.full_like(ends, row.begin), target[:, :-1]), dim=1)
        logits = ours(torch.cat((words, ends), dim=1), inputs).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    theirs.load_state_dict({**theirs.state_dict(), **written(ours)})
    return ours.eval(), theirs.eval()


def written(ours: Transformer) -> dict[str, torch.Tensor]:
    state = write_state({name: p.detach() for name, p in ours.state_dict().items()}, FORMAT.rules(ours.config, 0))
    tokens = state["model.shared.weight"]
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    return {**state, **dict.fromkeys(copies, tokens)}


def generated(theirs: Any, source: torch.Tensor, row: TransformerRow, most: int, **how: Any) -> list[list[int]]:
    found = theirs.generate(
        source, attention_mask=(source != row.pad).long(), max_length=most + 1, bad_words_ids=[[row.pad]],
        renormalize_logits=True, decoder_start_token_id=row.begin, do_sample=False, **how,
    )  # fmt: skip
    rows = [each[1:] for each in found.tolist()]
    return [each[: each.index(row.end)] if row.end in each else each for each in rows]


@pytest.mark.parametrize("seed", [0, 1])
def test_search_finds_the_same_tokens(seed: int) -> None:
    """Greedy, and beams with every kind of length penalty; a cut one's last token is the end, as their files ask."""
    ours, theirs = taught(TINY, seed)
    source = texts(TINY, rows=12, length=9, seed=seed)
    found = greedy(ours, source, 16)
    assert found == generated(theirs, source, TINY, 16, num_beams=1)
    assert len({len(tokens) for tokens in found}) > 2
    for beams, penalty in ((2, 1.0), (4, 1.0), (4, 0.0), (6, 0.6), (3, 2.0)):
        mine = beam_search(ours, source, 12, beams=beams, length_penalty=penalty)
        expected = generated(
            theirs, source, TINY, 12, num_beams=beams, length_penalty=penalty, num_return_sequences=beams
        )
        assert [list(each.tokens) for several in mine for each in several] == expected


# --- a folder in the hub's layout ------------------------------------------------------------------------------------

SENTENCES = [
    "Two young white men are outside near many bushes.", "A dog runs through the deep white snow, and barks!",
    "Zwei junge weiße Männer sind im Freien.", "Ein Hund rennt durch den tiefen weißen Schnee.",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, as transformers writes it, with tokenizers learnt from a few sentences."""
    place = tmp_path_factory.mktemp("hub") / "opus-mt-xx-yy"
    place.mkdir()
    pieces: list[str] = []
    for name, lines in (("source.spm", SENTENCES[:2]), ("target.spm", SENTENCES[2:])):
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 5), model_writer=file, vocab_size=34, minloglevel=2, num_threads=1
        )
        (place / name).write_bytes(file.getvalue())
        model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
        pieces += [piece for i in range(34) if (piece := model.IdToPiece(i)) not in ("<s>", "</s>", "<unk>", *pieces)]
    vocabulary = {name: i for i, name in enumerate(["</s>", "<unk>", *pieces, "<pad>"])}
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    (place / "tokenizer_config.json").write_text(json.dumps({"source_lang": "xx", "target_lang": "yy"}))
    row = TransformerRow(
        width=16, heads=2, hidden=24, encoder_depth=2, decoder_depth=2, mlp="silu", logit_bias=True, dropout=0.1,
        max_length=64, vocabulary=len(vocabulary), pad=len(vocabulary) - 1, begin=len(vocabulary) - 1, end=0,
    )  # fmt: skip
    theirs = random_peer(row, 5)
    with torch.no_grad():
        theirs.final_logits_bias[:, row.end] -= 1.5  # so that translations have some length
    theirs.save_pretrained(place)
    (place / "README.md").write_text("---\nlicense: cc-by-4.0\ndatasets:\n- opus\n---\n")
    return place


def test_a_folder_as_the_hub_has_it(folder: Path) -> None:
    network, card = load_network(folder)
    assert isinstance(network, Transformer) and card.task == "translate" and card.licence == "cc-by-4.0"
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    assert card.tokenizer is not None
    own = read_tokenizer(card.tokenizer, "card")
    lines = [*SENTENCES, "An unknown ☃ word.", ""]
    expected = tokenizer(lines)["input_ids"]
    assert own.encode(lines) == expected
    assert own.encode(lines, target=True) == tokenizer(text_target=lines)["input_ids"]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in expected], True, network.config.pad)
    row = network.config
    found = [list(several[0].tokens) for several in beam_search(network, padded, 20, beams=4)]
    assert found == generated(theirs, padded, row, 20, num_beams=4)
    known = tokenizer(text_target=SENTENCES[2:])["input_ids"]
    assert own.decode(known) == SENTENCES[2:]
    assert own.decode(known) == tokenizer.batch_decode(known, skip_special_tokens=True, use_source_tokenizer=False)


def test_what_a_folder_leaves_out_is_as_transformers_has_it(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text())
    del values["activation_function"]
    (copy / "config.json").write_text(json.dumps(values))
    state = load_file(copy / "model.safetensors")
    del state["final_logits_bias"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    network, _ = load_network(copy)
    theirs = transformers.MarianMTModel.from_pretrained(copy).eval()
    assert isinstance(network, Transformer) and network.config.mlp == "gelu"
    source, start = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[network.config.begin, 8, 9]])
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=start).logits
        assert torch.allclose(network(source, start).logits, expected, atol=1e-5)  # measured: below 1e-6


def test_there_and_back_is_bitwise_equal(folder: Path) -> None:
    theirs = load_file(folder / "model.safetensors")
    found = import_weights(open_weights(folder))
    again = write_state(found.weights, FORMAT.rules(found.row, 0))
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], theirs[name]) for name in theirs)
    shapes = {name: tuple(tensor.shape) for name, tensor in again.items()}
    assert FORMAT.row(shapes, FORMAT.write_config(found.row, 0)) == found.row


def test_written_for_transformers(folder: Path, tmp_path: Path) -> None:
    """A model file of ours becomes a folder that transformers loads, tokenizer included."""
    convert(folder, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "back", to="hf")
    places = folder, tmp_path / "back"
    one, other = (transformers.MarianMTModel.from_pretrained(place).state_dict() for place in places)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    texts_of = [transformers.MarianTokenizer.from_pretrained(place) for place in places]
    assert texts_of[0](SENTENCES)["input_ids"] == texts_of[1](SENTENCES)["input_ids"]
    assert (texts_of[1].source_lang, texts_of[1].target_lang) == ("xx", "yy")
    network, card = load_network(tmp_path / "m.safetensors")
    assert isinstance(network, Transformer) and card.languages == ("xx", "yy")
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "back").eval()
    given = texts_of[1](SENTENCES, padding=True, return_tensors="pt")
    found = model.generate(**given, max_length=21)
    row, cut = network.config, [each[1:] for each in found.tolist()]
    mine = beam_search(network, given["input_ids"], 20, beams=4)
    assert [each[: each.index(row.end)] for each in cut] == [list(several[0].tokens) for several in mine]
    assert model.generation_config.max_length == row.max_length


def test_what_was_read_is_described(folder: Path, tmp_path: Path) -> None:
    found = convert(folder, tmp_path / "m.safetensors")
    (first, *_) = found.lines()
    assert re.search(r", [\d,]+ parameters, \d+ tokens, from xx into yy, texts of at most 64 tokens$", first)
    assert "pixels" not in first and (found.image_size, found.longest_text, found.languages) == (0, 64, ("xx", "yy"))
    with pytest.raises(UserError, match="cannot be written for timm, which has no such model; --to hf can$"):
        convert(folder, tmp_path / "back", to="timm")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json is damaged"):
        load_network(copy)
    (copy / "tokenizer_config.json").unlink()
    assert load_network(copy)[1].languages is None


def test_older_files_hold_copies_and_positions(folder: Path, tmp_path: Path) -> None:
    network, _ = load_network(folder)
    copy = tmp_path / "old"
    shutil.copytree(folder, copy)
    state = transformers.MarianMTModel.from_pretrained(folder).state_dict()
    assert any("embed_positions" in name for name in state) and "lm_head.weight" in state
    save_file({name: tensor.clone() for name, tensor in state.items()}, copy / "model.safetensors", {"format": "pt"})
    again, _ = load_network(copy)
    pairs = zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def _config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _vocabulary(folder: Path) -> None:
    values = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**values, "more": len(values) + 5}))


def _other_end(folder: Path) -> None:
    values = json.loads((folder / "vocab.json").read_text())
    values["</s>"], values["<unk>"] = values["<unk>"], values["</s>"]
    (folder / "vocab.json").write_text(json.dumps(values))


def _other_pieces(folder: Path) -> None:
    values = json.loads((folder / "vocab.json").read_text())
    kept = ("</s>", "<unk>", "<pad>")
    (folder / "vocab.json").write_text(json.dumps({k if k in kept else f"{k}x": v for k, v in values.items()}))


def _different_table(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.shared.weight"] + 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify(folder: Path, tmp_path: Path) -> None:
    """Measured: float32 3e-7 in the logits token by token and 2e-7 in gradients, 0 elsewhere; float64 3e-15."""
    torch.set_num_threads(1)
    result = verify(folder)
    assert result.agrees, result.verdict
    names = [gap.name for gap in result.comparisons["float64"].forward]
    assert names == [
        "tokens of the texts", "encoder, block 0", "encoder, block 1", "encoder states", "decoder, block 0",
        "decoder, block 1", "logits", "logits of predict", "greedy translation", "translation by 4 beams", "loss",
    ]  # fmt: skip
    network, _ = load_network(folder)
    gradients = {gap.name for gap in result.comparisons["float64"].gradients}
    assert gradients == {name for name, _ in network.named_parameters()} and "logit_bias" in gradients
    assert result.facts["texts"]["count"] == 6 and "made-up tokens" in result.facts["texts"]["origin"]
    assert max(gap.relative for gap in result.comparisons["float64"].forward) <= 1e-12
    result.save(tmp_path / "certificate.json")
    assert verify(folder, certificate=tmp_path / "certificate.json").agrees
    convert(folder, tmp_path / "ours.safetensors")
    written = verify(tmp_path / "ours.safetensors", dtype="float64")
    assert written.agrees and written.facts["reference_weights"] == "written from ours"


def test_what_is_compared_says_something(folder: Path) -> None:
    """Texts of several lengths, translations that differ, and a gradient of every parameter."""
    subject = open_subject(str(folder))
    assert isinstance(subject.row, TransformerRow)
    shown = choose_texts(None, subject.tokenizer, subject.row, "it")
    network = subject.network("float64")
    assert isinstance(network, Transformer)
    outcome = ask_ours(network, shown, subject.format.stages(subject.row))
    assert len({int(row.ne(shown.pad).sum()) for row in shown.source}) > 3
    assert outcome.logits.std() > 0.1
    assert len({tuple(row) for row in outcome.answers["translation by 4 beams"].tolist()}) > 2
    assert all(float(gradient.abs().max()) > 0 for gradient in outcome.gradients.values())


def _ours_spoilt(name: str) -> Any:
    def spoil(patch: pytest.MonkeyPatch) -> None:
        def spoilt(source: str, *rest: Any) -> Subject:
            subject = open_subject(source, *rest)
            subject.ours[name].view(-1)[3] += 0.05
            return subject

        patch.setattr(verification, "open_subject", spoilt)

    return spoil


def _heads(patch: pytest.MonkeyPatch) -> None:
    def spoilt(source: str, *rest: Any) -> Subject:
        subject = open_subject(source, *rest)
        return replace(subject, row=replace(subject.row, heads=4))  # pyright: ignore[reportCallIssue]

    patch.setattr(verification, "open_subject", spoilt)


def _beams(patch: pytest.MonkeyPatch) -> None:
    def second(*given: Any, **how: Any) -> Any:
        return [each[1:] for each in beam_search(*given, **how)]

    patch.setattr(verification_texts, "beam_search", second)


def _greedy(patch: pytest.MonkeyPatch) -> None:
    def other(*given: Any) -> Any:
        *rest, last = greedy(*given)
        return [*rest, [*last[:-1], last[-1] + 1]]

    patch.setattr(verification_texts, "greedy", other)


def _kept(patch: pytest.MonkeyPatch) -> None:
    begin = Transformer.begin

    def late(self: Transformer, *given: Any) -> Any:
        state = begin(self, *given)
        state.time = 1
        return state

    patch.setattr(Transformer, "begin", late)


def _tokens(patch: pytest.MonkeyPatch) -> None:
    encode = MarianTokenizer.encode

    def without(self: MarianTokenizer, texts: Any, *, target: bool = False) -> Any:
        return encode(self, [text.lower() for text in texts], target=target)

    patch.setattr(MarianTokenizer, "encode", without)


@pytest.mark.parametrize("recorded", [False, True], ids=["beside", "recorded"])
@pytest.mark.parametrize(
    ("spoil", "stage"),
    [
        (_tokens, "tokens of the texts"),
        (_heads, "encoder, block 0"),
        (_ours_spoilt("encoder.1.mlp.up.bias"), "encoder, block 1"),
        (_ours_spoilt("decoder.1.cross_attention.qkv.weight"), "decoder, block 1"),
        (_ours_spoilt("logit_bias"), "logits"),
        (_kept, "logits of predict"),
        (_greedy, "greedy translation"),
        (_beams, "translation by 4 beams"),
    ],
    ids=["tokens", "heads", "encoder", "decoder", "bias", "kept", "greedy", "beams"],
)  # fmt: skip
def test_verify_names_what_departs(
    spoil: Any, stage: str, recorded: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    certificate = None
    if recorded:
        certificate = tmp_path / "certificate.json"
        verify(folder, dtype="float64").save(certificate)
    spoil(monkeypatch)
    result = verify(folder, dtype="float64", certificate=certificate)
    assert not result.agrees and result.first_departure is not None
    assert result.first_departure[1].name == stage


def test_verify_without_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate = str(tmp_path / "certificate.json")
    assert main(["verify", str(folder), "--dtype=float32", "--out", certificate]) == 0
    shown = capsys.readouterr().out
    assert "6 texts of up to" in shown and "translation by 4 beams" in shown and "agrees with transformers" in shown
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    with pytest.raises(ImportError):
        verify(folder, dtype="float32")
    assert main(["verify", str(folder), "--dtype=float32", "--certificate", certificate]) == 0
    assert "what transformers" in capsys.readouterr().out


def test_verify_with_texts_of_ones_own(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(SENTENCES[:2]) + "\n\nA dog.\n")
    result = verify(folder, data=lines, dtype="float64")
    assert result.agrees and result.facts["texts"]["count"] == 3
    for name, side in (("en", SENTENCES[:2]), ("de", SENTENCES[2:])):
        (tmp_path / f"train.{name}").write_text("\n".join(side) + "\n")
    result = verify(folder, data=tmp_path, dtype="float64")
    names = [gap.name for gap in result.comparisons["float64"].forward]
    assert result.agrees and names[:2] == ["tokens of the texts", "tokens of their translations"]
    result.save(tmp_path / "c.json")
    assert verify(folder, data=tmp_path, dtype="float64", certificate=tmp_path / "c.json").agrees
    with pytest.raises(UserError, match=r"other texts \(2 of .*, up to \d+ tokens\); give those by --data$"):
        verify(folder, dtype="float64", certificate=tmp_path / "c.json")
    with pytest.raises(UserError, match="--image-size 32: is for pictures"):
        verify(folder, image_size="32")
    lines.write_text("\n")
    with pytest.raises(UserError, match="lines.txt: is empty"):
        verify(folder, data=lines)
    values = json.loads((tmp_path / "c.json").read_text())
    texts = values.pop("texts")
    values["pictures"] = {**texts, "height": 32, "width": 32}
    (tmp_path / "c.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="was not made with texts"):
        verify(folder, dtype="float64", certificate=tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({**values, "pictures": texts}))
    with pytest.raises(UserError, match=r"incomplete or damaged \(pictures.height: Field required"):
        verify(folder, dtype="float64", certificate=tmp_path / "c.json")


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("target.spm"), r"tokenizer is incomplete \(target.spm missing\)"),
        (_without("config.json"), "only in config.json"),
        (lambda folder: (folder / "source.spm").write_bytes(b"nonsense"), "source.spm is damaged or .*; get it anew$"),
        (lambda folder: (folder / "vocab.json").write_text('{"</s>": 0'), "vocab.json"),
        (lambda folder: (folder / "vocab.json").write_text('{"</s>": 0}'), "lacks <pad>, <unk>"),
        (_vocabulary, "its tokenizer has .* tokens, its weights know"),
        (_other_pieces, r"9\d% of the pieces of source.spm are not in vocab.json; they are not of one model"),
        (_other_end, "end is 1 to the tokenizer and 0 to the weights"),
        (_different_table, "lm_head.weight differ"),
        (_config(share_encoder_decoder_embeddings=False), "a vocabulary for each language"),
        (_config(activation_function="tanh"), "activation 'tanh'"),
        (_config(d_model=None), "description is incomplete"),
        (_config(encoder_layers=3), "missing: model.encoder.layers.2"),
        (_config(d_model=10**9), "claims width|the weights do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(spoil: Any, message: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy)
    with pytest.raises(UserError, match=message):
        load_network(copy)
