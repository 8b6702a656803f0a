"""What every parity test does: a reference model of random weights, converted, and both compared to the last digit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Backbone
from saccade.errors import UserError
from saccade.models.embedder import Embedder
from saccade.weights.formats.table import Rule, Stage, read_gradients, read_state, write_state

Logits = Callable[[nn.Module, Tensor], Tensor]
EMBEDDED = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Gap:
    """Largest differences: of logits and loss absolute, of gradients relative to the size of each parameter's own."""

    logits: float
    loss: float
    gradient: float
    worst: str = ""  # the parameter of ours with that gradient


# the promise; tests say beside it what they measured
LIMITS = {torch.float32: Gap(1e-4, 1e-4, 1e-3), torch.float64: Gap(1e-9, 1e-9, 1e-8)}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and every statistic gets a value of its own, so that no zero or one hides a wrong place.

    Matrices keep the size of what goes through them; factors lie around one, shifts around zero. The same values for
    every dtype. Other buffers (indices, rotary frequencies) are left as they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                shape = parameter.shape
                if parameter.ndim >= 2 and name.endswith("weight") and not isinstance(module, EMBEDDED):
                    value = normal(shape, shape[1:].numel() ** -0.5)
                elif parameter.ndim >= 2 and name != "logit_scale":
                    value = normal(shape, 0.3)  # tokens, positions, tables
                elif "bias" in name:
                    value = normal(shape, 0.2)
                else:
                    value = 1.0 + normal(shape, 0.2)  # of norms, LayerScale, temperatures
                parameter.copy_(value)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(normal(buffer.shape, 0.2))
                elif name == "running_var":
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
                elif name == "num_batches_tracked":
                    buffer.fill_(int(torch.randint(1, 1000, (), generator=generator)))
    return model


def convert(
    ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule], dtype: torch.dtype, ignored: Sequence[str] = ()
) -> None:
    """Both in `dtype` and in evaluation; ours with the weights of theirs, loaded strictly."""
    ours.to(dtype).eval()
    theirs.to(dtype).eval()
    ours.load_state_dict(read_state(theirs.state_dict(), rules, ignored, "theirs"), strict=True)


def agree(
    ours: nn.Module,
    theirs: nn.Module,
    rules: Sequence[Rule],
    images: Tensor,
    targets: Tensor | None = None,
    *,
    logits: Logits,
    dtype: torch.dtype = torch.float32,
    tol: Gap | None = None,
    ignored: Sequence[str] = (),
) -> Gap:
    """Convert, then compare logits, loss and the gradient of every parameter; the gaps are returned and printed.

    `ours` is a Classifier, or an Embedder or Backbone, whose summary then is compared; `logits` calls theirs. Without
    `targets` the loss is a fixed random projection, which sees every channel.
    """
    limit = tol or LIMITS[dtype]
    convert(ours, theirs, rules, dtype, ignored)
    images = images.to(dtype)
    got, expected = _outputs(ours, images), logits(theirs, images)
    assert got.shape == expected.shape, f"{tuple(got.shape)} against {tuple(expected.shape)}"
    assert expected.isfinite().all() and expected.std() > 1e-2, "a reference without contrast proves nothing"
    loss, expected_loss = _loss(got, targets), _loss(expected, targets)
    worst, name = _gradients(ours, theirs, rules, loss, expected_loss)
    measured = Gap(_largest(got, expected), _largest(loss, expected_loss), worst, name)
    print(f"{str(dtype).removeprefix('torch.')}: {measured}")
    assert measured.logits <= limit.logits, f"logits differ: {measured}"
    assert measured.loss <= limit.loss, f"loss differs: {measured}"
    assert measured.gradient <= limit.gradient, f"gradients differ: {measured}"
    return measured


def _outputs(ours: nn.Module, images: Tensor) -> Tensor:
    if isinstance(ours, Backbone):
        return ours(images).summary
    return ours(images).embedding if isinstance(ours, Embedder) else ours(images).logits


def _loss(outputs: Tensor, targets: Tensor | None) -> Tensor:
    if targets is not None:
        return F.cross_entropy(outputs, targets)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.dtype)
    return (outputs * weights).mean()


def _gradients(
    ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule], loss: Tensor, expected_loss: Tensor
) -> tuple[float, str]:
    """The largest difference, relative to the size of the gradient; and whose it is.

    A gradient that is nothing but rounding (far smaller than all others) counts relative to a millionth of the largest.
    """
    found, expected = _both_gradients(ours, theirs, rules, loss, expected_loss)
    own = dict(ours.named_parameters())
    least = 1e-6 * max(g.abs().max().item() for g in expected.values())
    worst, worst_name = 0.0, ""
    for name, gradient in found.items():
        if gradient is None:
            gradient = torch.zeros_like(own[name])
        assert gradient.shape == expected[name].shape, name
        difference = _largest(gradient, expected[name]) / max(least, expected[name].abs().max().item())
        if not difference <= worst:
            worst, worst_name = difference, name
    return worst, worst_name


def _both_gradients(
    ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule], loss: Tensor, expected_loss: Tensor
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Ours, and theirs under our names."""
    for model, own_loss in ((ours, loss), (theirs, expected_loss)):
        model.zero_grad(set_to_none=True)
        own_loss.backward()
    own = dict(ours.named_parameters())
    found = {name: parameter.grad for name, parameter in own.items()}
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    foreign = theirs.named_parameters(remove_duplicate=False)
    state |= {name: parameter.grad for name, parameter in foreign if parameter.grad is not None}
    expected = read_gradients(state, [rule for rule in rules if rule.ours in own])
    assert expected.keys() == own.keys(), f"no rule for {sorted(own.keys() - expected.keys())}"
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    return found, expected


def gradients_differ_by_rounding_alone(
    ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule], images: Tensor, targets: Tensor, *, logits: Logits
) -> None:
    """In float32, all gradients of ours together are as near to those of float64 as theirs are; see
    `no_further_off`. For models whose gradients jump where a value crosses a corner."""

    def gradients(dtype: torch.dtype, x: Tensor) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
        convert(ours, theirs, rules, dtype, ())
        x = x.to(dtype)
        losses = F.cross_entropy(_outputs(ours, x), targets), F.cross_entropy(logits(theirs, x), targets)
        return _both_gradients(ours, theirs, rules, *losses)

    exact = gradients(torch.float64, images)[1]
    own, foreign = (error_of(each, exact) for each in gradients(torch.float32, images))
    no_further_off(own, foreign, lambda k: error_of(gradients(torch.float32, last_bits(images, k))[1], exact))


def error_of(gradients: Mapping[str, Tensor | None], exact: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all together."""
    off = [(exact[n] - (0.0 if g is None else g.double())).square().sum() for n, g in gradients.items()]
    return float((torch.stack(off).sum() / sum(g.square().sum() for g in exact.values())).sqrt())


def last_bits(images: Tensor, seed: int) -> Tensor:
    """The same but for about the last bit of each float32."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    return images * (1 + 6e-8 * noise)


def no_further_off(own: float, foreign: float, again: Callable[[int], float], tries: int = 10) -> None:
    """The error of our gradients is that of theirs, within a half.

    Where a value lies next to a corner, the processor's order of sums decides which side of it is taken, and with it
    the error, several times as large on one side: for theirs as for ours, whose last bit of a picture decides as
    well. So theirs is the largest of what `again` finds with other last bits, as far as it is needed.
    """
    print(f"error of float32 gradients: ours {own:.1e}, theirs {foreign:.1e}")
    for k in range(tries):
        if own <= 1.5 * foreign:
            break
        foreign = max(foreign, again(k))
    assert own <= 1.5 * foreign, f"ours are off by {own:.1e}, theirs by {foreign:.1e} at most in {tries} tries"


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def stages_agree(
    ours: nn.Module,
    theirs: nn.Module,
    stages: Sequence[Stage],
    images: Tensor,
    *,
    logits: Logits,
    limit: float = 1e-9,
) -> float:
    """The output of every stage, with weights that are converted already; run it in float64."""
    assert stages and len({stage.name for stage in stages}) == len(stages)
    own, foreign = (
        _watched(ours, [stage.ours for stage in stages], lambda: _outputs(ours, images)),
        _watched(theirs, [stage.theirs for stage in stages], lambda: logits(theirs, images)),
    )
    worst = 0.0
    for stage in stages:
        a, b = own[stage.ours], foreign[stage.theirs]
        a = stage.ours_as(a) if stage.ours_as else a
        b = stage.theirs_as(b) if stage.theirs_as else b
        assert a.shape == b.shape, f"{stage.name}: {tuple(a.shape)} against {tuple(b.shape)}"
        worst = max(worst, difference := _largest(a, b))
        assert difference <= limit, f"{stage.name}: {difference}"
    print(f"stages: {worst}")
    return worst


def _watched(model: nn.Module, paths: Sequence[str], call: Callable[[], Tensor]) -> dict[str, Any]:
    """The outputs of the modules at these paths during a call."""
    seen: dict[str, Any] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[path] = output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in set(paths)]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    assert not (unseen := sorted(set(paths) - seen.keys())), f"never called: {unseen}"
    return seen


def round_trip(ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule], ignored: Sequence[str] = ()) -> None:
    """Ours -> theirs -> ours is bitwise the same, for values that never were theirs; the peer loads them strictly.

    Keys that are `ignored` carry nothing; the peer gets its own back.
    """
    state = {name: value.clone() for name, value in randomise(copy.deepcopy(ours), seed=99).state_dict().items()}
    written = write_state(state, rules)
    again = read_state(written, rules, ignored, "written")
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(again[name], value), name
    blank = copy.deepcopy(theirs)
    known = blank.state_dict()
    left_out = {name for name in known if name not in written}
    assert left_out <= {name for name in known if _is_ignored(name, ignored)}, sorted(left_out)
    blank.load_state_dict({**{name: known[name] for name in left_out}, **written}, strict=True)


def _is_ignored(name: str, ignored: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ignored)


def wrong_keys_are_refused(
    ours: nn.Module, state: Mapping[str, Tensor], rules: Sequence[Rule], ignored: Sequence[str] = ()
) -> None:
    """A missing key, a left-over key and a misshapen tensor: each is refused, for every key of theirs."""
    for name in state:
        if _is_ignored(name, ignored):
            continue
        with pytest.raises(UserError, match="missing"):
            read_state({key: value for key, value in state.items() if key != name}, rules, ignored, "theirs")
        wide = torch.cat([state[name].reshape(-1), torch.zeros(1)])
        with pytest.raises((UserError, RuntimeError)):
            ours.load_state_dict(read_state({**state, name: wide}, rules, ignored, "theirs"), strict=True)
    with pytest.raises(UserError, match="left over: something.else"):
        read_state({**state, "something.else": torch.zeros(1)}, rules, ignored, "theirs")
