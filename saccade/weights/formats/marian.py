"""Marian's Transformers, such as the opus-mt models, as Hugging Face names them; https://arxiv.org/abs/1804.00344.

Their tokens are pieces of two sentencepiece models over one list, which lie beside the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.errors import UserError
from saccade.layers.positions import sinusoidal_1d
from saccade.models.transformer import TransformerRow
from saccade.tokenizer import MarianTokenizer
from saccade.weights.formats.table import (
    Format,
    NoWords,
    Rule,
    Shapes,
    Stage,
    State,
    TranslatorPeer,
    module,
    packed,
    same,
)

TOKENS = "model.shared.weight"
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
PLACES = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
BIAS = "final_logits_bias"
ACTIVATIONS = {"swish": "silu", "silu": "silu", "relu": "relu", "gelu": "gelu"}
FILES = ("source.spm", "target.spm", "vocab.json")  # of the tokenizer


def _recognises(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    if config:
        return config.get("model_type") == "marian"
    named = {BIAS, "model.decoder.layers.0.encoder_attn.q_proj.weight"} <= shapes.keys()
    return named and "model.encoder.layernorm_embedding.weight" not in shapes  # BART has the same names and this one


def _row(shapes: Shapes, config: Mapping[str, Any]) -> TransformerRow:
    if not config:
        raise UserError("the number of heads and the activation are only in config.json, which must lie beside it")
    if not config.get("share_encoder_decoder_embeddings", True):
        raise UserError("has a vocabulary for each language; only models with one for both can be read")
    if config["encoder_attention_heads"] != config["decoder_attention_heads"]:
        raise UserError("its encoder and decoder have different numbers of heads, which cannot be read")
    if config["encoder_ffn_dim"] != config["decoder_ffn_dim"]:
        raise UserError("its encoder and decoder have feed-forward networks of different widths, which cannot be read")
    activation = config.get("activation_function", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"its activation {activation!r} is not known")
    return TransformerRow(
        width=int(config["d_model"]),
        heads=int(config["encoder_attention_heads"]),
        hidden=int(config["encoder_ffn_dim"]),
        encoder_depth=int(config["encoder_layers"]),
        decoder_depth=int(config["decoder_layers"]),
        mlp=ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
        scale_embeddings=bool(config.get("scale_embedding", False)),
        logit_bias=True,
        dropout=float(config.get("dropout", 0.1)),
        max_length=int(config["max_position_embeddings"]),
        vocabulary=shapes[TOKENS][0],
        pad=int(config["pad_token_id"]),
        begin=int(config["decoder_start_token_id"]),
        end=int(config["eos_token_id"]),
    )


def _complete(tensors: State, config: Mapping[str, Any]) -> State:
    """Without the copies of one table that older files hold, and without positions, which are computed; with a bias,
    which transformers takes for zero where a file has none."""
    tables = [name for name in (TOKENS, *COPIES) if name in tensors]
    if not tables:
        raise UserError(f"lacks {TOKENS}")
    first = tensors[tables[0]]
    if different := [name for name in tables[1:] if not torch.equal(tensors[name], first)]:
        raise UserError(f"{', '.join(different)} differ from {tables[0]}; only one table for all can be read")
    for name in PLACES:
        if name in tensors:
            waves = sinusoidal_1d(*tensors[name].shape)
            if (tensors[name].float() - waves).abs().max() > 1e-2:
                raise UserError(f"{name}: learnt positions; only sines and cosines can be read")
    kept = {name: tensor for name, tensor in tensors.items() if name not in (TOKENS, *COPIES, *PLACES)}
    return {BIAS: first.new_zeros(1, len(first)), TOKENS: first, **kept}


def _attention(ours: str, theirs: str) -> list[Rule]:
    rules = [
        packed(f"{ours}.qkv.{what}", *(f"{theirs}.{part}_proj.{what}" for part in "qkv")) for what in ("weight", "bias")
    ]
    return [*rules, *module(f"{ours}.out", f"{theirs}.out_proj")]


def _rules(row: Row, classes: int) -> list[Rule]:
    assert isinstance(row, TransformerRow)
    if row.norm_first or row.norm_eps != 1e-5 or row.position != "sinusoidal" or not row.logit_bias:
        raise NoWords("Marian normalises after each layer, has sines and cosines, and a bias of the scores")
    bias = Rule("logit_bias", (BIAS,), lambda tensor: tensor[0], lambda tensor: (tensor[None],))
    rules = [same("embeddings", TOKENS), bias]
    for side, depth in (("encoder", row.encoder_depth), ("decoder", row.decoder_depth)):
        for i in range(depth):
            ours, theirs = f"{side}.{i}", f"model.{side}.layers.{i}"
            rules += _attention(f"{ours}.self_attention", f"{theirs}.self_attn")
            rules += module(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                rules += _attention(f"{ours}.cross_attention", f"{theirs}.encoder_attn")
                rules += module(f"{ours}.norm2", f"{theirs}.encoder_attn_layer_norm")
            rules += module(f"{ours}.mlp.up", f"{theirs}.fc1") + module(f"{ours}.mlp.down", f"{theirs}.fc2")
            rules += module(f"{ours}.norm3", f"{theirs}.final_layer_norm")
    return rules


def _stages(row: Row) -> list[Stage]:
    assert isinstance(row, TransformerRow)

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def blocks(side: str, depth: int) -> list[Stage]:
        paths = ((f"{side}.{i}", f"model.{side}.layers.{i}") for i in range(depth))
        return [Stage(f"{side}, block {i}", *path, theirs_as=first) for i, path in enumerate(paths)]

    states = Stage("encoder states", "encoder_norm", "model.encoder", theirs_as=lambda output: output[0])
    return [*blocks("encoder", row.encoder_depth), states, *blocks("decoder", row.decoder_depth)]


def _write_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, TransformerRow)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "silu"}
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "d_model": row.width,
        "vocab_size": row.vocabulary,
        "decoder_vocab_size": row.vocabulary,
        "encoder_layers": row.encoder_depth,
        "decoder_layers": row.decoder_depth,
        "encoder_attention_heads": row.heads,
        "decoder_attention_heads": row.heads,
        "encoder_ffn_dim": row.hidden,
        "decoder_ffn_dim": row.hidden,
        "activation_function": names[row.mlp],
        "max_position_embeddings": row.max_length,
        "scale_embedding": row.scale_embeddings,
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
        "normalize_before": False,
        "dropout": row.dropout,
        "is_encoder_decoder": True,
        "pad_token_id": row.pad,
        "decoder_start_token_id": row.begin,
        "eos_token_id": row.end,
        "forced_eos_token_id": row.end,
    }


def build_peer(row: Row, config: Mapping[str, Any] | None = None) -> nn.Module:
    """transformers' model with random weights, as a config.json describes it; without one, the row."""
    from transformers import MarianConfig, MarianMTModel

    return MarianMTModel(MarianConfig.from_dict(dict(config or _write_config(row, 0))))


def _peer_to_compare(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    """By the file's own description, which we may have read wrongly. The bias of the scores is a buffer there; as a
    parameter it has a gradient to compare."""
    from huggingface_hub.errors import StrictDataclassError

    described = {name: config[name] for name in _write_config(row, classes) if name in config}
    try:
        model = build_peer(row, {**described, "tie_word_embeddings": True})  # `_complete` found one table for all
    except (StrictDataclassError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"transformers builds no model of this config.json ({' '.join(str(error).split())})") from None
    bias = model.get_buffer(BIAS)
    delattr(model, BIAS)
    model.register_parameter(BIAS, nn.Parameter(bias))
    return model


def _peer_outputs(model: Any, source: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By its own loss, and its own beginnings of the translations."""
    pad = model.config.pad_token_id
    labels = targets.masked_fill(targets == pad, -100)  # which it leaves out
    found = model(input_ids=source, attention_mask=(source != pad).long(), labels=labels)
    return found.logits, found.loss


def _peer_translations(model: Any, source: Tensor, most: int, beams: int) -> list[list[int]]:
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    found = model.generate(
        source, attention_mask=(source != pad).long(), num_beams=beams, do_sample=False, length_penalty=1.0,
        early_stopping=False, max_length=most + 1, bad_words_ids=[[pad]], renormalize_logits=True,
        forced_eos_token_id=end, decoder_start_token_id=model.config.decoder_start_token_id,
    )  # fmt: skip
    rows = [row[1:] for row in found.tolist()]
    return [row[: row.index(end)] if end in row else row for row in rows]


def _peer_tokens(files: Mapping[str, bytes], texts: Sequence[str], target: bool) -> list[list[int]]:
    from transformers import MarianTokenizer as Theirs

    with TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        of, into, vocabulary = (str(Path(folder, name)) for name in FILES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends another package, for what it does not do here
            tokenizer = Theirs(of, into, vocabulary)
        found = tokenizer(text_target=list(texts)) if target else tokenizer(list(texts))
    return found["input_ids"]


def _tokenizer(files: Mapping[str, bytes], where: str) -> str:
    """For the model file, from what lies beside the weights."""
    if missing := [name for name in FILES if name not in files]:
        raise UserError(f"{where}: its tokenizer is incomplete ({', '.join(missing)} missing); get the folder anew")
    try:
        vocabulary = {str(piece): int(number) for piece, number in json.loads(files["vocab.json"]).items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: vocab.json is damaged ({error}); get it anew") from None
    return MarianTokenizer(files["source.spm"], files["target.spm"], vocabulary, where).to_text()


FORMATS: tuple[Format, ...] = (
    Format(
        dialect="huggingface",
        family=TransformerRow.family,
        recognises=_recognises,
        row=_row,
        classes=lambda shapes, config: 0,
        rules=_rules,
        stages=_stages,
        write_config=_write_config,
        ignored=(*COPIES, *PLACES),  # they are the one table, and computed
        peer=TranslatorPeer("transformers", _peer_to_compare, _peer_outputs, _peer_translations, _peer_tokens),
        complete=_complete,
        tokenizer=_tokenizer,
    ),
)
