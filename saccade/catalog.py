"""What there is: every model with its size and cost, counted from the model itself and kept in `facts.json`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.json")
CLASSES = {"classify": 1000, "detect": 91, "translate": 0}  # that models are counted with, as they are published
VOCABULARY, TOKENS = 10_000, 32  # of translators, and of each of the two texts that they are counted with
HEADS = {
    "classify": "With a head of 1000 classes, at the resolution shown",
    "detect": "With a head for COCO's 91 numbers, at the resolution shown",
    "translate": f"With a vocabulary of {VOCABULARY:,} tokens, a text of {TOKENS} and a translation of {TOKENS}",
}
OTHERS = {
    "translate": "other vocabularies change its table alone, and longer texts the GFLOPs. Forms are as published: the "
    "recipe for few pairs trains the Transformers pre-norm"
}
USUAL_OTHERS = "other sizes and shapes work too (--image-size)"


@dataclass(frozen=True)
class ModelFacts:
    """`gflops`: multiplications and additions, each counted, of one picture of `image_size`^2 pixels, or of reading a
    text of `TOKENS` tokens and saying as many."""

    name: str
    task: str
    family: str
    parameters: int
    gflops: float
    image_size: int
    stride: int
    about: str
    tokens: int = 0  # that either text may have, of a translator


def list_models(task: str | None = None) -> list[ModelFacts]:
    """Facts of every model, or of those for one task, in the order of the tables."""
    models = [ModelFacts(**values) for values in json.loads(FACTS.read_text(encoding="utf-8"))]
    return [model for model in models if task in (None, model.task)]


def count(name: str, classes: int | None = None) -> ModelFacts:
    """The facts of a model, counted, on the meta device where that can be, so that nothing is allocated."""
    try:
        return _count(name, classes, "meta")
    except NotImplementedError:  # orders of tokens by windows need indices with values
        return _count(name, classes, "cpu")


def _count(name: str, classes: int | None, device: str) -> ModelFacts:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from saccade.models import build_network, model_row, task_of
    from saccade.models.translator import TranslationOutputs, TranslatorRow

    row = model_row(name)
    task = task_of(row)
    longest = row.max_length if isinstance(row, TranslatorRow) else 0
    if isinstance(row, TranslatorRow):
        row = replace(row, vocabulary=VOCABULARY)
    with torch.device(device):
        model = build_network(row, CLASSES[task] if classes is None else classes).eval().requires_grad_(False)
        if longest:
            text = torch.full((1, TOKENS), VOCABULARY - 1)  # no padding
            inputs = (text, text)
        else:
            inputs = (torch.zeros(1, 3, row.image_size, row.image_size),)
        with _counted_recurrences(), FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = model(*inputs)
            if isinstance(outputs, TranslationOutputs):
                _ = outputs.logits  # which are not made before they are asked for
    parameters = sum(p.numel() for p in model.parameters())
    gflops = round(counter.get_total_flops() / 1e9, 3)
    return ModelFacts(name, task, row.family, parameters, gflops, row.image_size, row.stride, row.about, longest)


@contextmanager
def _counted_recurrences() -> Iterator[None]:
    """oneDNN's fused ones are not seen by the counter."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flags that are not touched here
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def write_facts(names: Sequence[str] = ()) -> None:
    """Count all models anew; with `names` only these and new ones, and keep what is known of the others."""
    from saccade.models import BACKBONES, DETECTORS, TRANSLATORS, model_row

    for name in names:
        model_row(name)  # refuses one that there is not
    known = {model.name: model for model in list_models()} if names else {}
    models = (*BACKBONES, *DETECTORS, *TRANSLATORS)
    facts = [count(name) if name in names or name not in known else known[name] for name in models]
    rows = ({name: value for name, value in asdict(each).items() if name != "tokens" or value} for each in facts)
    FACTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def describe_models(task: str | None = None) -> list[dict[str, Any]]:
    """The facts with the published weights that fit each model, for JSON."""
    from saccade.weights.published import PUBLISHED

    return [asdict(m) | {"weights": [asdict(w) for w in PUBLISHED.get(m.name, ())]} for m in list_models(task)]


def render_models(name: str | None = None, task: str | None = None) -> None:
    """The table of all models, or of those for one task; with a name, one model and the weights published for it."""
    from rich.console import Console

    from saccade.weights.published import PUBLISHED

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)  # a pipe has no width; in a narrow terminal the forms are cut
    models = [m for m in list_models(task) if name in (None, m.name)]
    width = max(len(m.name) for m in models)
    for each in dict.fromkeys(m.task for m in models):
        console.print(_table([m for m in models if m.task == each], width, console.width))
        print(f"\n{HEADS[each]}; {OTHERS.get(each, USUAL_OTHERS)}." + ("\n" if name is None else ""))
    if name is None:
        print("weights: how many published ones are known to fit; `saccade models NAME` names them.")
        return
    for published in PUBLISHED.get(name, ()):
        print(f"\n{published.name}\n  {published.training_data}; licence: {published.licence}")
    if not PUBLISHED.get(name):
        print("\nNo published weights are known for it.")


def _table(models: list[ModelFacts], width: int, space: int) -> Any:
    """`width` is that of the names, `space` that of all; what does not fit is cut from the forms."""
    from rich.table import Table

    from saccade.weights.published import PUBLISHED

    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True, min_width=width)
    texts = models[0].task == "translate"
    sizes = ("tokens",) if texts else ("pixels", "stride")
    figures = ("parameters", "GFLOPs", *sizes, "weights")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    left = space - width - sum(len(column) + 2 for column in figures) - 2
    table.add_column("form", no_wrap=True, overflow="ellipsis", max_width=max(8, left))
    for m in models:
        size = f"{m.parameters / 1e6:.1f} M"
        weights = str(len(PUBLISHED.get(m.name, ())) or "")
        shown = (f"to {m.tokens}",) if texts else (f"{m.image_size}", f"{m.stride}")
        table.add_row(m.name, size, f"{m.gflops:.2f}", *shown, weights, m.about)
    return table
