"""Models from transformers: the value of every split equals the one from reshaping by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import (
    PatchedPolicy,
    contrast,
    hook_points,
    load,
    patched,
    recording,
    run_with_cache,
    save,
    zero_ablate,
)
from chanpatch.errors import HookPointError, SiteError, TraceMismatchError, UnsupportedModelError
from chanpatch.huggingface import axes

transformers = pytest.importorskip("transformers")  # needs Python 3.11

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
SPEECH = {
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 2},
    **{"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50, "num_mel_bins": 8},
    **{"max_source_positions": 10, "max_target_positions": 12, "decoder_start_token_id": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
IDS = torch.randint(1, 50, (3, 5), generator=torch.Generator().manual_seed(0))

# By family: model class, config, first input, and for each kind of head the hook point and its lengths by hand.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, tuple[int, ...]]]] = {
    "gpt2": (
        *("GPT2LMHeadModel", "GPT2Config"),
        {"n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
        "ids",
        {"transformer.h.1.attn.c_attn": (3, 4, 4), "transformer.h.1.attn.c_proj.in[0]": (4, 4)},
    ),
    "gpt_neox": (
        *("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, "ids"),
        {
            "gpt_neox.layers.1.attention.query_key_value": (4, 3, 4),
            "gpt_neox.layers.1.attention.dense.in[0]": (4, 4),
        },
    ),
    **{
        family: (
            *(f"{name}ForCausalLM", config, GROUPED | ({} if family == "qwen2" else {"head_dim": size}), "ids"),
            {
                "model.layers.1.self_attn.q_proj": (4, size),
                "model.layers.1.self_attn.k_proj": (2, size),
                "model.layers.1.self_attn.v_proj": (2, size),
                "model.layers.1.self_attn.o_proj.in[0]": (4, size),
            },
        )
        for family, name, config, size in [
            ("llama", "Llama", "LlamaConfig", 4),
            ("mistral", "Mistral", "MistralConfig", 4),
            ("qwen2", "Qwen2", "Qwen2Config", 4),
            ("qwen3", "Qwen3", "Qwen3Config", 6),
            ("gemma", "Gemma", "GemmaConfig", 6),
            ("gemma2", "Gemma2", "Gemma2Config", 6),
            ("gemma3_text", "Gemma3", "Gemma3TextConfig", 6),
        ]
    },
    "bert": (
        *("BertForMaskedLM", "BertConfig", SMALL, "ids"),
        {
            "bert.encoder.layer.1.attention.self.query": (4, 4),
            "bert.encoder.layer.1.attention.self.key": (4, 4),
            "bert.encoder.layer.1.attention.self.value": (4, 4),
            "bert.encoder.layer.1.attention.output.dense.in[0]": (4, 4),
        },
    ),
    "t5": (
        *("T5ForConditionalGeneration", "T5Config"),
        {"num_layers": 1, "num_heads": 4, "d_model": 16, "d_kv": 3, "d_ff": 24, "vocab_size": 50},
        "both",
        {
            "encoder.block.0.layer.0.SelfAttention.q": (4, 3),
            "decoder.block.0.layer.1.EncDecAttention.k": (4, 3),
            "decoder.block.0.layer.1.EncDecAttention.o.in[0]": (4, 3),
        },
    ),
    "whisper": (
        *("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, "speech"),
        {
            "model.encoder.layers.0.self_attn.q_proj": (4, 4),
            "model.decoder.layers.0.self_attn.v_proj": (2, 8),
            "model.decoder.layers.0.encoder_attn.out_proj.in[0]": (2, 8),
        },
    ),
    "vit": (
        *("ViTModel", "ViTConfig"),
        {**SMALL, "image_size": 8, "patch_size": 4},
        "image",
        {"layers.1.attention.k_proj": (4, 4), "layers.1.attention.o_proj.in[0]": (4, 4)},
    ),
}
INPUTS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    "ids": (IDS, {}),
    "both": (IDS, {"decoder_input_ids": IDS[:, :4]}),
    "speech": (torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(1)), {"decoder_input_ids": IDS[:, :4]}),
    "image": (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), {}),
}


def model_of(family: str, **options: Any) -> nn.Module:
    name, config, settings, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**{**settings, **options})).eval()
    for parameter in model.parameters():  # random weights, and outputs that depend on every head
        nn.init.normal_(parameter, std=0.3)
    return model


def traced(family: str, **options: Any):
    model = model_of(family, **options)
    x, keywords = INPUTS[FAMILIES[family][3]]
    return model, hook_points(model, x, axes=axes(model), **keywords), (x, keywords)


def by_hand(model: nn.Module, name: str, change: Callable[[Tensor], None], inputs: Any) -> Tensor:
    """Return the first output with a copy of a tensor changed by a hook of torch."""
    module = model.get_submodule(name.removesuffix(".in[0]"))

    def changed(tensor: Tensor) -> Tensor:
        change(tensor := tensor.clone())
        return tensor

    if name.endswith(".in[0]"):
        handle = module.register_forward_pre_hook(lambda _, args: (changed(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: changed(output))
    try:
        return model(inputs[0], **inputs[1])[0]
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_of_a_head_equals_the_patch_by_reshaping_by_hand(family):
    model, points, inputs = traced(family)
    for name, lengths in FAMILIES[family][-1].items():
        point = points[name]
        assert point.shape[1:] == lengths
        part = {"part": "v"} if "part" in point.axes else {}

        index = tuple({"head": 1, "part": 2}.get(axis, slice(None)) for axis in point.axes)

        def change(tensor, lengths=lengths, index=index):
            tensor.unflatten(-1, lengths)[index] = 0

        with patched(points, zero_ablate(points.site(name, head=1, **part))):
            found = model(inputs[0], **inputs[1])[0]
        assert torch.equal(found, by_hand(model, name, change, inputs))
        assert not torch.allclose(found, model(inputs[0], **inputs[1])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_with_rows_has_names_for_all_axes(family):
    for attention in ["eager"] if family == "gemma2" else ["sdpa", "eager"]:
        _, points, _ = traced(family, attn_implementation=attention)
        outputs = [each for each in points.values() if each.side == "out" and each.batch_axis is not None]
        assert len(outputs) > 20
        assert not [each.name for each in outputs if re.search(r"axis\d", " ".join(each.axes))]


def test_keys_and_queries_of_grouped_attention_have_different_numbers_of_heads():
    _, points, _ = traced("llama")
    q, k = (points[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert (q.length("head"), k.length("head")) == (4, 2)
    with pytest.raises(SiteError, match="head 2 is out of range"):
        points.site(k.name, head=2)


def test_a_contrast_ranks_the_features_of_each_layer_and_head_by_default():
    model, points, _ = traced("bert")
    found = contrast(points, IDS, IDS.flip(0))
    ranked = {record["site"].split("'")[1] for record in found.to_records()}
    left_out = {name for name, why in found.skipped.items() if "same activations" not in why}
    assert left_out == {"bert.embeddings.position_embeddings"}  # one row for all inputs
    assert "bert.encoder.layer.1.attention.self.query" in ranked
    _, clean = run_with_cache(points, IDS, sites="bert.encoder.layer.1.attention.self.key")
    _, other = run_with_cache(points, IDS.flip(0), sites="bert.encoder.layer.1.attention.self.key")
    by_hand = (clean - other)["bert.encoder.layer.1.attention.self.key"].sum(1).mean(0)  # (head, feature)
    by_site = {repr(site): value for site, value in zip(found.sites, found.difference, strict=True)}
    site = "Site('bert.encoder.layer.1.attention.self.key', feature=3, head=2)"
    assert by_site[site] == pytest.approx(float(by_hand[2, 3]), abs=1e-5)


def test_an_unknown_family_is_an_error_that_shows_two_lines_to_write():
    model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError) as caught:
        axes(model)
    assert str(caught.value) == (
        "The axes of Linear are unknown: model.config.model_type must be one of gpt2, gpt_neox, llama, mistral, qwen2, "
        "gemma, gemma2, qwen3, gemma3_text, bert, t5, whisper, vit; got None. Name the axes yourself:\n"
        'heads = chanpatch.view("batch position (head feature)", head=12)\n'
        'points = hook_points(model, inputs, axes={".in[0]": "batch position", "**.o_proj.in[0]": heads})'
    )


def test_a_config_that_does_not_fit_the_model_is_an_error_when_the_model_is_traced():
    model = model_of("llama")
    model.config.num_attention_heads = 8
    with pytest.raises(SiteError, match="an axis of length 16 cannot be split into head 8 x feature 4"):
        hook_points(model, IDS, axes=axes(model))


@pytest.mark.parametrize(
    ("family", "name", "own"),
    [
        ("gpt2", "blocks.0.attn.hook_z", "'transformer.h.0.attn.c_proj.in[0]'"),
        ("gpt2", "blocks.1.hook_resid_post", "'transformer.h.1'"),
        ("gpt2", "blocks.1.hook_attn_out", "'transformer.h.1.attn.out[0]'"),
        ("gpt2", "blocks.0.attn.hook_q", "'transformer.h.0.attn.c_attn' with part='q'"),
        ("gpt2", "hook_embed", "'transformer.wte'"),
        ("llama", "blocks.1.hook_resid_pre", "'model.layers.1.in[0]'"),
        ("llama", "blocks.1.hook_resid_mid", "'model.layers.1.post_attention_layernorm.in[0]'"),
        ("llama", "blocks.0.mlp.hook_post", "'model.layers.0.mlp.down_proj.in[0]'"),
        ("gpt_neox", "blocks.0.attn.hook_v", "'gpt_neox.layers.0.attention.query_key_value' with part='v'"),
        ("bert", "blocks.0.hook_mlp_out", "'bert.encoder.layer.0.output.dense'"),
    ],
)
def test_a_name_from_transformer_lens_is_an_error_that_shows_the_name_in_this_model(family, name, own):
    model, points, _ = traced(family)
    message = f"'{name}' is a name from TransformerLens. In this model, the name is {own}."
    with pytest.raises(HookPointError) as caught:
        points.site(name)
    assert str(caught.value) == f"{message} ({len(points)} hook points; print the HookPoints to list them.)"
    if ".out[0]" not in own:
        with pytest.raises(HookPointError, match=re.escape(message)):
            run_with_cache(model, IDS, sites=name)


VALUES = {"gpt2": "transformer.h.1.attn.c_proj.in[0]", "llama": "model.layers.1.self_attn.o_proj.in[0]"}


@pytest.fixture(scope="module", params=VALUES)
def decoder(request):
    """A decoder, its hook points with free positions, and the site of its second head in the last layer."""
    model = model_of(request.param)
    points = hook_points(model, IDS, axes=axes(model), free={"position": 1})
    return model, points, VALUES[request.param]


def second_head(tensor: Tensor) -> None:
    tensor.unflatten(-1, (4, 4))[:, :, 1] = 0


@torch.no_grad()
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 9), (3, 5), (4, 4)])
def test_one_set_of_hook_points_serves_prompts_of_any_length(decoder, rows, length):
    model, points, name = decoder
    ids = torch.randint(1, 50, (rows, length))
    with patched(points, zero_ablate(points.site(name, head=1))):
        found = model(ids).logits
    assert torch.equal(found, by_hand(model, name, second_head, (ids, {})))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_equal_prompts_without_padding_row_by_row(decoder, side):
    model, points, name = decoder
    lengths, ids = (7, 4), torch.randint(1, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(3) if side == "left" else slice(4, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with patched(points, zero_ablate(points.site(name, head=1))):
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        alone = by_hand(model, name, second_head, (ids[row : row + 1, mask[row].bool()], {}))
        torch.testing.assert_close(padded[row, mask[row].bool()], alone[0], atol=1e-5, rtol=1e-4)
        assert alone.shape == (1, length, 50)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_patched_with_and_without_a_cache(decoder, use_cache):
    model, points, name = decoder
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    last, patch = points.site(name, position=-1), zero_ablate(points.site(name, head=1))
    with patched(points, patch) as ledger, recording(points, last) as cache:
        found = model.generate(IDS, **options)
    ids = IDS
    for step in range(6):  # greedy decoding by hand
        split = []
        logits = by_hand(model, name, lambda tensor, kept=split: (second_head(tensor), kept.append(tensor)), (ids, {}))
        torch.testing.assert_close(cache[last][3 * step : 3 * step + 3, 0].flatten(1), split[0][:, -1])
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids) and ledger.to_records()[0]["firings"] == 6
    assert torch.equal(PatchedPolicy(points, patch).generate(IDS, **options), ids)


@torch.no_grad()
def test_a_saved_patch_is_loaded_for_prompts_of_another_length(tmp_path, decoder):
    model, points, name = decoder
    save(tmp_path / "head.safetensors", zero_ablate(points.site(name, head=1)))
    ids = torch.randint(1, 50, (2, 8))
    others = hook_points(model, ids, axes=axes(model), free={"position": 1})
    with patched(others, load(tmp_path / "head.safetensors", others)):
        found = model(ids).logits
    assert torch.equal(found, by_hand(model, name, second_head, (ids, {})))


@torch.no_grad()
def test_the_two_lengths_of_an_encoder_and_a_decoder_are_free_if_they_are_equal_in_the_trace():
    model = model_of("t5")
    points = hook_points(model, IDS, decoder_input_ids=IDS, axes=axes(model), free={"position": 1})
    name = "decoder.block.0.layer.1.EncDecAttention.k"
    inputs = torch.randint(1, 50, (2, 8)), {"decoder_input_ids": torch.randint(1, 50, (2, 3))}
    with patched(points, zero_ablate(points.site(name, head=1, position=-1))):
        found = model(inputs[0], **inputs[1])[0]

    def change(tensor):
        tensor.unflatten(-1, (4, 3))[:, -1, 1] = 0

    assert torch.equal(found, by_hand(model, name, change, inputs))


@torch.no_grad()
@pytest.mark.parametrize(
    ("ids", "keywords", "message"),
    [
        (
            IDS[:, :3],
            lambda model: {},
            "the first input has shape (3, 3). The length of axis 1 must be at least 2 and differ from the batch "
            "size. Trace with other example inputs.",
        ),
        (
            IDS,
            lambda model: {"past_key_values": model(IDS).past_key_values},
            "to find the axes that grow with this axis, the model runs on inputs with one more entry, but a cache "
            "(DynamicCache) in the inputs would keep its length. Trace without this cache.",
        ),
        (
            IDS,
            lambda model: {"attention_mask": torch.zeros(3, 1, 5, 5)},
            "another input has shape (3, 1, 5, 5), so length 5 does not identify a single axis. Trace with a length "
            "that no other axis has, or without that other input.",
        ),
    ],
)
def test_inputs_that_do_not_identify_a_free_axis_are_an_error(decoder, ids, keywords, message):
    with pytest.raises(SiteError) as caught:
        hook_points(decoder[0], ids, free={"position": 1}, **keywords(decoder[0]))
    assert str(caught.value) == f"free={{'position': 1}}: {message}"


@torch.no_grad()
def test_generation_with_a_fixed_length_is_an_error_that_shows_how_to_free_it(decoder):
    model, _, name = decoder
    points = hook_points(model, IDS, axes=axes(model))
    with pytest.raises(TraceMismatchError, match=r"pass free=\{'position': 1\} to hook_points\(\)"):
        with patched(points, zero_ablate(points.site(name, head=1))):
            model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
