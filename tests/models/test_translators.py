"""Recurrent models and the Transformer: every parameter learns, padding and batch mates change nothing, and no place
sees what comes after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_translators import SMALL, VOCABULARY
from torch.nn import functional as F

from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.models import build_network, model_row, name_of, read_row, task_of
from saccade.models.transformer import Transformer, TransformerRow
from saccade.models.translator import Translator, TranslatorRow


def build(row: TranslatorRow, seed: int = 0) -> Translator:
    torch.manual_seed(seed)
    model = build_network(row, 0)
    assert isinstance(model, Translator)
    with torch.no_grad():
        for parameter in model.parameters():  # no two tokens alike, no shift hidden by a zero
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> Translator:
    return build(SMALL[request.param])


def texts(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def test_every_parameter_learns(model: Translator) -> None:
    model.train()
    inputs, targets = texts(3, 5), texts(3, 6)[:, 1:]
    logits = model(texts(), inputs).logits
    assert logits.shape == (3, 5, VOCABULARY)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_padding_and_batch_mates_change_nothing(model: Translator) -> None:
    source, inputs = texts(), texts(3, 5)
    source[1, 4:] = 0
    with torch.no_grad():
        together = model(source, inputs).logits
        for i, length in enumerate((7, 4, 7)):
            alone = model(source[i : i + 1, :length], inputs[i : i + 1]).logits
            torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


def test_no_place_sees_what_comes_after_it(model: Translator) -> None:
    inputs = texts(2, 6)
    changed = inputs.clone()
    changed[:, 3] = 5
    with torch.no_grad():
        one, other = (model(texts(2), each).logits for each in (inputs, changed))
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert (one[:, 3:] - other[:, 3:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_only_the_places_that_are_asked_for(model: Translator) -> None:
    inputs = texts(3, 5)
    where = inputs > 25
    with torch.no_grad():
        torch.testing.assert_close(model(texts(), inputs, where).logits, model(texts(), inputs).logits[where])


def test_state_gives_the_same_scores_token_by_token(model: Translator) -> None:
    source, inputs = texts(), texts(3, 20)
    source[1, 4:] = 0
    with torch.inference_mode():
        expected = model(source, inputs).logits
        state = model.begin(source)
        for time in range(20):
            torch.testing.assert_close(
                state.advance(inputs[:, time : time + 1])[:, 0], expected[:, time], atol=1e-4, rtol=1e-4
            )


def test_beams_go_on_with_the_past_of_others(model: Translator) -> None:
    """Whatever is selected and let go: the scores are those of the tokens that each beam has said."""
    source = texts(3)
    source[0, 5:] = 0
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        state = model.begin(source, 3)
        said = torch.full((3, 3, 1), 1)
        rows = torch.arange(3)
        for time in range(14):
            scores = state.advance(said[:, :, -1])
            for k, row in enumerate(rows.tolist()):
                whole = model(source[row : row + 1].expand(3, -1), said[k]).logits[:, -1]
                torch.testing.assert_close(scores[k], whole, atol=1e-4, rtol=1e-4)
            parents = torch.randint(0, 3, said.shape[:2], generator=generator)
            state.select(parents)
            said = said.gather(1, parents[..., None].expand_as(said))
            if time == 5:
                state.keep(torch.tensor([2, 0]))
                rows, said = rows[[2, 0]], said[[2, 0]]
            said = torch.cat((said, torch.randint(3, VOCABULARY, (*said.shape[:2], 1), generator=generator)), dim=2)


def test_weights_that_changed_are_seen(model: Translator) -> None:
    """What is laid out anew for single tokens is not that of an older state, however the weights were changed."""
    source = texts()
    begin = torch.ones(3, 1, dtype=torch.long)
    with torch.inference_mode():
        model.begin(source).advance(begin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def learn() -> None:
        model.train()
        model(source, begin).logits.square().mean().backward()
        optimizer.step()
        model.eval()

    @torch.no_grad()
    def assign() -> None:
        for parameter in model.parameters():
            parameter.mul_(0.5)

    for change in (learn, assign, lambda: model.double()):
        change()
        with torch.inference_mode():
            torch.testing.assert_close(
                model.begin(source).advance(begin), model(source, begin).logits, atol=1e-4, rtol=1e-4
            )


def test_alignment(model: Translator) -> None:
    source, inputs = texts(), texts(3, 5)
    source[1, 4:] = 0
    with torch.no_grad():
        outputs, weights = model.with_alignment(source, inputs)
        torch.testing.assert_close(outputs.logits, model(source, inputs).logits, atol=1e-4, rtol=1e-4)
    if weights is None:
        assert not getattr(model.config, "attention", True)
        return
    assert weights.shape == (3, 5, 7)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, 5))
    assert weights[1, :, 4:].abs().max() == 0


def test_relevance_of_the_text_needs_gradients_at_its_embeddings(model: Translator) -> None:
    source = texts()
    embedded = model.embed_source(source).detach().requires_grad_()
    model.hidden(source, texts(3, 5), embedded).square().sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum(dim=2).min() > 0


def test_depths_of_parameters(model: Translator) -> None:
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert depths["embeddings"] == 0 and {*depths.values()} <= {*range(model.depth + 1)}
    for i, layer in enumerate(model.layers):
        own = {id(parameter) for parameter in layer.parameters()}
        assert {depths[name] for name, p in model.named_parameters() if id(p) in own} == {i + 1}


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        model = build(SMALL["transformer_tiny"]).train()
        model.activation_checkpointing = on
        model(texts(), texts(3, 5)).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_by_name_and_by_description() -> None:
    row = model_row("transformer_tiny")
    assert isinstance(row, TransformerRow) and task_of(row) == "translate" and row.family == "transformer"
    full = replace(row, vocabulary=100).changed(NetworkConfig(dropout=0.25, norm_first=True))
    assert full.dropout == 0.25 and full.norm_first and full.vocabulary == 100
    assert read_row(full.to_dict(), "file") == full
    assert name_of(replace(row, vocabulary=77, end=5)) == "transformer_tiny" and name_of(full) == "transformer-custom"
    with pytest.raises(UserError, match="file: .*heads"):
        read_row({**full.to_dict(), "heads": "many"}, "file")
    with pytest.raises(UserError, match="has no such setting"):
        row.changed(NetworkConfig(registers=4))


def test_published_size() -> None:
    """2.6 M parameters with 10,000 tokens, 65 M with 37,000: as the papers say."""
    counts = []
    for name, vocabulary in (("transformer_tiny", 10_000), ("transformer_base", 37_000)):
        with torch.device("meta"):
            row = model_row(name)
            assert isinstance(row, TransformerRow)
            counts.append(sum(p.numel() for p in Transformer(replace(row, vocabulary=vocabulary)).parameters()) / 1e6)
    assert counts[0] == pytest.approx(2.6, abs=0.15) and counts[1] == pytest.approx(65, abs=3)
