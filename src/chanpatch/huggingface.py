"""Axis names for models from Hugging Face transformers, and views that split axes into heads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

from torch import nn

from .errors import UnsupportedModelError
from .views import View, view

__all__ = ["axes"]

_HIDDEN = "batch position feature"
_HEADS = "batch position (head feature)"


class _Family(NamedTuple):
    """Hook points of one family of models, grouped by the names of their axes.

    Each entry is the end of a hook point's name, such as `q_proj`.

    Attributes:
        hidden: Hidden states whose axis names do not propagate from other hook points.
        heads: Hook points whose feature axis is split into query heads.
        key_heads: Hook points whose feature axis is split into key-value heads.
        weights: Attention weights, which the model returns only with the "eager" implementation of attention.
        others: Dict that maps other hook points to axis names or to patterns for `view`.
    """

    hidden: Sequence[str]
    heads: Sequence[str]
    key_heads: Sequence[str]
    weights: Sequence[str]
    others: Mapping[str, str] = {}


_PROJECTIONS = ("q_proj", "o_proj.in[0]", "out_proj.in[0]"), ("k_proj", "v_proj")
_LLAMA = _Family(("embed_tokens", "lm_head.in[0]"), *_PROJECTIONS, ("self_attn.out[1]",))
_QWEN_3 = _LLAMA._replace(others=dict.fromkeys(("q_norm.in[0]", "k_norm.in[0]"), "batch position head feature"))
_GEMMA_3 = _LLAMA._replace(others=dict.fromkeys(("q_norm.in[0]", "k_norm.in[0]"), "batch head position feature"))

_FAMILIES = {
    "gpt2": _Family(
        ("wte", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head.in[0]", 'out["last_hidden_state"]'),
        ("attn.c_proj.in[0]",),
        (),
        ("attn.out[1]",),
        {"attn.c_attn": "batch position (part head feature)"},
    ),
    "gpt_neox": _Family(
        ("embed_in", "lm_head.in[0]", "embed_out.in[0]"),
        ("attention.dense.in[0]",),
        (),
        ("attention.out[1]",),
        {"attention.query_key_value": "batch position (head part feature)"},
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "gemma2"), _LLAMA),
    "qwen3": _QWEN_3,
    "gemma3_text": _GEMMA_3,
    "bert": _Family(
        ("word_embeddings", "token_type_embeddings", "predictions.in[0]"),
        ("self.query", "attention.output.dense.in[0]"),
        ("self.key", "self.value"),
        ("attention.self.out[1]",),
    ),
    "t5": _Family(
        ("embed_tokens", "lm_head.in[0]"),
        ("q", "o.in[0]"),
        ("k", "v"),
        ("SelfAttention.out[2]", "EncDecAttention.out[2]"),
        {"relative_attention_bias": "query key head"},
    ),
    "whisper": _Family(
        ("layers.0.in[0]", "decoder.embed_tokens", "decoder.embed_positions"),
        *_PROJECTIONS,
        ("self_attn.out[1]", "encoder_attn.out[1]"),
    ),
    "vit": _Family(("patch_embeddings", "embeddings.dropout.in[0]"), *_PROJECTIONS, ("attention.out[1]",)),
}


def axes(model: nn.Module) -> dict[str, View | str]:
    """Return axis names, and views that split axes into heads, as a dict for the argument `axes` of `hook_points`.

    To use the dict, call `hook_points(model, *inputs, axes=axes(model))`. The keys are patterns for names of hook
    points. Hidden states have the axes `(batch, position, feature)`. Queries, keys, values and the input of each
    attention layer's output projection have an axis `head`; fused projections also have an axis `part` with the labels
    q, k, v. If a module does not run (for example, the embedding if you pass `inputs_embeds`), remove the module's
    pattern from the dict; otherwise, `hook_points` raises HookPointError.

    Args:
        model: Model with a config, from one of these families: GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma
            (text models of the first three generations), BERT, T5, Whisper and ViT.

    Raises:
        UnsupportedModelError: If the family is unknown.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
        >>> model.config = SimpleNamespace(model_type="llama", hidden_size=8, num_attention_heads=2)
        >>> print(axes(model)["**.q_proj"])
        batch position (head feature)
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _FAMILIES:
        raise UnsupportedModelError(
            f"The axes of {type(model).__name__} are unknown: model.config.model_type must be one of "
            f"{', '.join(_FAMILIES)}; got {kind!r}. Name the axes yourself:\n"
            f'heads = chanpatch.view("{_HEADS}", head={getattr(config, "num_attention_heads", 12)})\n'
            f'points = hook_points(model, inputs, axes={{".in[0]": "batch position", "**.o_proj.in[0]": heads}})'
        )
    family, modules = _FAMILIES[kind], [f".{name}" for name, _ in model.named_modules()]
    found: dict[str, View | str] = dict.fromkeys(family.hidden, _HIDDEN)
    for scope, heads, key_heads in _head_counts(config):
        lengths: dict[str, Any] = {"feature": getattr(config, "head_dim", None) or config.hidden_size // heads}
        found |= dict.fromkeys((scope + end for end in family.heads), view(_HEADS, head=heads, **lengths))
        found |= dict.fromkeys((scope + end for end in family.key_heads), view(_HEADS, head=key_heads, **lengths))
        lengths |= {"part": ("q", "k", "v"), "head": heads}
        found |= {end: view(text, **lengths) if "(" in text else text for end, text in family.others.items()}
    if getattr(config, "_attn_implementation", None) == "eager":
        found |= dict.fromkeys(family.weights, "batch head query key")
    return {f"**.{end}": names for end, names in found.items() if _exists(end, modules)}


def _head_counts(config: Any) -> list[tuple[str, int, int]]:
    """Return one tuple (start of the patterns, number of heads, number of key-value heads) for the whole model.

    If the encoder and the decoder have different numbers of heads, return one tuple for each of the two.
    """
    heads = config.num_attention_heads
    decoder = getattr(config, "decoder_attention_heads", heads)
    if decoder != heads:
        return [("encoder.**.", heads, heads), ("decoder.**.", decoder, decoder)]
    return [("", heads, getattr(config, "num_key_value_heads", None) or heads)]


def _exists(end: str, modules: Iterable[str]) -> bool:
    """Return whether the model has a module whose name matches `end`, the end of a hook point's name."""
    module = re.sub(r"\.?(in|out)\[.*", "", end).replace("**", "*")
    return not module or any(fnmatch(name, f"*.{module}") for name in modules)


# For each hook in TransformerLens, the ends of the corresponding hook points' names in transformers.
_BLOCKS = (".h.", ".layers.", ".layer.")
_OWN_NAMES = {
    "hook_embed": ".wte .embed_tokens .embed_in .word_embeddings",
    "hook_pos_embed": ".wpe .position_embeddings",
    "ln_final.hook_normalized": ".ln_f .model.norm .final_layer_norm .layernorm",
    "hook_resid_pre": ".in[0]",
    "hook_resid_mid": """.ln_2.in[0] .pre_feedforward_layernorm.in[0] .post_attention_layernorm.in[0]
        .layernorm_after.in[0] .intermediate.in[0]""",
    "hook_resid_post": ".out",
    "hook_attn_out": ".attn .self_attn .attention.output.dense .attention",
    "hook_mlp_out": ".post_feedforward_layernorm .mlp .output.dense",
    "attn.hook_q": ".attn.c_attn .self_attn.q_proj .attention.query_key_value .attention.q_proj .attention.self.query",
    "attn.hook_k": ".attn.c_attn .self_attn.k_proj .attention.query_key_value .attention.k_proj .attention.self.key",
    "attn.hook_v": ".attn.c_attn .self_attn.v_proj .attention.query_key_value .attention.v_proj .attention.self.value",
    "attn.hook_z": """.attn.c_proj.in[0] .self_attn.o_proj.in[0] .attention.dense.in[0] .attention.o_proj.in[0]
        .attention.output.dense.in[0]""",
    "mlp.hook_pre": ".mlp.c_fc .mlp.gate_proj .mlp.dense_h_to_4h .mlp.fc1 .intermediate.dense",
    "mlp.hook_post": """.mlp.c_proj.in[0] .mlp.down_proj.in[0] .mlp.dense_4h_to_h.in[0] .mlp.fc2.in[0]
        .output.dense.in[0]""",
}


def own_name(name: str, known: Iterable[str]) -> str:
    """Find the hook point that corresponds to a hook in TransformerLens, such as `blocks.1.attn.hook_z`.

    Return the quoted name of the hook point, followed by the part to select if the projection is fused; or an empty
    string if no hook point corresponds. `known` contains the names of the model's hook points or modules.
    """
    parts = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name)
    assert parts  # any text matches
    starts = [f"{block}{parts[1]}" for block in _BLOCKS] if parts[1] else [""]
    for start, end in itertools.product(starts, _OWN_NAMES.get(parts[2], "").split()):
        module, side, path = (start + end.removesuffix(".out")).partition(".in[")
        for found in known:
            if f".{found}".endswith((module, *[f"{module}.out[0]"] * (not side))):
                part = parts[2][-1] if end in (".attn.c_attn", ".attention.query_key_value") else ""
                return f"'{found}{side}{path}'" + (f" with part='{part}'" if part else "")
    return ""
