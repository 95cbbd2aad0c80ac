"""What a mask selects is read: the same numbers as without the rest, by hand and row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanpatch import (
    HookPoints,
    Site,
    channel_sums,
    contrast,
    edit,
    hook_points,
    mean_ablate,
    patched,
    recording,
    run_with_cache,
    steer,
    view,
)
from chanpatch.errors import BatchAxisError, ContrastError, EditError, ProbeError, SiteError, UnsupportedModelError
from chanpatch.registry import Directions
from maze.policy.impala import Impala

LENGTHS = (5, 2, 4)  # tokens of each prompt
PROMPTS = torch.randint(3, 32, (3, 5), generator=torch.Generator().manual_seed(0))  # left-padded below
REAL = torch.arange(5) >= 5 - torch.tensor(LENGTHS)[:, None]  # (batch, position): whether a token is no padding


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor, scores: Tensor) -> Tensor:
        normed = self.norm(hidden)
        hidden = hidden + self.attend(normed, normed, normed, attn_mask=scores.repeat_interleave(2, 0))[0]
        return hidden + self.mlp(hidden)


class Decoder(nn.Module):
    """GPT-2 in small: causal attention that leaves out padding, and given positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(32, 8), nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask[:, None].bool()
        scores = torch.zeros(seen.shape).masked_fill(~seen, -1e9)
        hidden = self.embed(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            hidden = block(hidden, scores)
        return hidden


class Text(NamedTuple):
    """A language model with its trace."""

    model: nn.Module
    points: HookPoints
    name: str  # of the second block

    def whole(self, prompts: Tensor = PROMPTS) -> list[Tensor]:
        """The activation of each prompt alone, without padding: (position, feature) each."""
        rows = zip(prompts, LENGTHS, strict=True)
        with torch.no_grad():
            return [self.hidden(inputs(row[None, -length:], torch.ones(1, length).long())) for row, length in rows]

    def hidden(self, given: dict[str, Tensor]) -> Tensor:
        output = self.model(**given)
        return (output if isinstance(output, Tensor) else output.hidden_states[1])[0]


def inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


PADDED = inputs(PROMPTS * REAL, REAL.long())


def real(context: Any) -> Tensor:
    """The tokens that are no padding, from the attention mask."""
    return context.inputs[1].bool()[:, :, None]


def decoder() -> Text:
    torch.manual_seed(0)
    model = Decoder().eval()
    points = hook_points(model, **PADDED, axes={"blocks.*": ("batch", "position", "feature")})
    return Text(model, points, "blocks.1")


def gpt2() -> Text:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 16}
    config = transformers.GPT2Config(
        **sizes, bos_token_id=0, eos_token_id=0, output_hidden_states=True, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    points = hook_points(model, **PADDED, axes={"transformer.h.*": ("batch", "position", "feature")})
    return Text(model, points, "transformer.h.0")


@pytest.fixture(params=[decoder, gpt2])
def text(request: pytest.FixtureRequest) -> Text:
    made: Text = request.param()
    return made


def stacked(rows: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([reduce(row) for row in rows])


REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "sum": ("sum", lambda row: row.sum(0)),
    "mean": ("mean", lambda row: row.mean(0)),
    "max": ("max", lambda row: row.amax(0)),
    "norm": ("norm", lambda row: row.norm(dim=0)),
    "pair, sum": (("b p f -> b f", "sum"), lambda row: row.sum(0)),
    "pair, mean": (("b p f -> b f", "mean"), lambda row: row.mean(0)),
    "pair, max": (("b p f -> b f", "max"), lambda row: row.amax(0)),
    "pair, min": (("b p f -> b f", "min"), lambda row: row.amin(0)),
    "pair, prod": (("b ... f -> b f", "prod"), lambda row: row.prod(0)),
}


# --- a padded language model equals its prompts row by row ---


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_padded_prompt_reduces_to_the_numbers_of_the_same_prompt_without_padding(text: Text, name: str) -> None:
    reduce, by_hand = REDUCTIONS[name]
    for where in (real, REAL[:, :, None]):
        _, cache = run_with_cache(text.points, **PADDED, sites=text.name, reduce=reduce, where=where)
        torch.testing.assert_close(cache[text.name], stacked(text.whole(), by_hand))
        assert cache.counts is not None
        assert torch.equal(cache.counts[text.name], torch.tensor(LENGTHS)[:, None].expand(3, 8))


def test_a_bare_model_reads_the_same_as_a_traced_one(text: Text) -> None:
    reduce = ("b p f -> b f", "mean")
    _, traced = run_with_cache(text.points, **PADDED, sites=text.name, reduce=reduce, where=real)
    with torch.no_grad(), recording(text.model, text.name, reduce, where=real) as cache:
        text.model(**PADDED)
    assert torch.equal(cache[text.name], traced[text.name])


@pytest.mark.parametrize("where", [real, REAL[:, :, None]], ids=["function", "tensor"])
def test_channel_sums_in_batches_are_those_without_padding(text: Text, where: Any) -> None:
    sums = channel_sums(text.points, PADDED, text.name, where=where, batch_size=2)
    by_hand = stacked(text.whole(), lambda row: row.double().sum(0))
    np.testing.assert_allclose(sums, by_hand.numpy(), rtol=1e-5, atol=1e-6)


def test_a_contrast_and_its_steering_vector_are_those_without_padding(text: Text) -> None:
    other = inputs((PROMPTS.flip(0) + 1) % 32 * REAL, REAL.long())
    result = contrast(text.points, PADDED, other, text.name, reduce="mean", where=real, batch_size=2)
    ours, theirs = text.whole(), text.whole((PROMPTS.flip(0) + 1) % 32)
    by_hand = (stacked(ours, lambda row: row.mean(0)) - stacked(theirs, lambda row: row.mean(0))).mean(0)
    np.testing.assert_allclose(result.difference, by_hand.numpy(), rtol=1e-4, atol=1e-5)
    vector = result.steering_vector(text.name, over=("batch", "position"))
    torch.testing.assert_close(vector, (torch.cat(ours).mean(0) - torch.cat(theirs).mean(0)).view(1, 1, 8))
    last = torch.tensor([[[False]] * 4 + [[True]]])
    by_hand = (stacked(ours, lambda row: row[-1]) - stacked(theirs, lambda row: row[-1])).mean(0)
    vector = result.steering_vector(text.name, over=("batch", "position"), where=last)
    torch.testing.assert_close(vector, by_hand.view(1, 1, 8))
    assert steer(text.points.site(text.name), vector).edit.vector is vector


def test_a_steering_vector_reads_what_its_contrast_selected(text: Text) -> None:
    other = inputs((PROMPTS + 1) % 32 * REAL, REAL.long())
    result = contrast(text.points, PADDED, other, text.name, where=real)
    ours, theirs = text.whole(), text.whole((PROMPTS + 1) % 32)
    first = ours[0][0] - theirs[0][0]  # only the longest prompt has a token at position 0
    torch.testing.assert_close(result.steering_vector(text.name)[0, 0], first)
    last = torch.stack([one[-1] - two[-1] for one, two in zip(ours, theirs, strict=True)]).mean(0)
    torch.testing.assert_close(result.steering_vector(text.name)[0, -1], last)


def test_a_mean_ablation_averages_the_selected_elements_of_its_reference(text: Text) -> None:
    site = text.points.site(text.name, feature=[1, 3])
    _, cache = run_with_cache(text.points, **PADDED, sites=text.name)
    over = ("batch", "position")
    patch = mean_ablate(site, cache, over=over, reference_where=REAL[:, :, None], where=real)
    mean = torch.cat(text.whole()).mean(0)[[1, 3]]
    torch.testing.assert_close(patch.edit.value, mean.view(1, 1, 2))
    with patched(text.points, patch) as ledger, recording(text.points, text.name) as after:
        text.model(**PADDED)
    written = after[text.name][:, :, [1, 3]]
    assert torch.equal(written[REAL], patch.edit.value.expand_as(written)[REAL])
    assert torch.equal(written[~REAL], cache[text.name][:, :, [1, 3]][~REAL])  # `where` selects the elements to write
    assert ledger.to_records()[0]["elements"] == 2 * sum(LENGTHS)


# --- images and recurrent networks ---


@pytest.fixture(scope="module")
def impala() -> tuple[Impala, HookPoints, Tensor]:
    torch.manual_seed(0)
    policy, images = Impala(1, 4).eval(), torch.rand(3, 3, 64, 64)
    return policy, hook_points(policy, images), images


def bright(context: Any) -> Tensor:
    """The 8 x 8 cells whose eight by eight pixels are brighter than the average."""
    cells = nn.functional.avg_pool2d(context.inputs[0].mean(1, keepdim=True), 8)
    return cells > 0.5


def test_a_mask_over_cells_reads_those_cells_of_an_impala_policy(impala: tuple[Impala, HookPoints, Tensor]) -> None:
    policy, points, images = impala
    site = points.site("embedder.relu3", channel=[0, 5, 31])
    with torch.no_grad():
        cache = run_with_cache(points, images, sites=site, reduce="mean", where=bright, stop=True)
        activation = policy.embedder[:4](images)[:, [0, 5, 31]]
    cells = nn.functional.avg_pool2d(images.mean(1), 8) > 0.5
    for row in range(3):
        for number in range(3):
            torch.testing.assert_close(cache[site][row, number], activation[row, number][cells[row]].mean())
            assert cache.counts[site][row, number] == cells[row].sum()


def test_a_mask_may_select_other_cells_in_every_channel(impala: tuple[Impala, HookPoints, Tensor]) -> None:
    _, points, images = impala
    mask = torch.rand(1, 32, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    _, whole = run_with_cache(points, images, sites="embedder.relu3")
    sums = channel_sums(points, images, "embedder.relu3", where=mask, batch_size=2)
    by_hand = (whole["embedder.relu3"].double() * mask).sum((2, 3))
    np.testing.assert_allclose(sums, by_hand.numpy(), rtol=1e-4)


class Recurrent(nn.Module):
    """An LSTM whose first axis is the position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.lstm(sequence.transpose(0, 1))[0].sum(0)


def test_a_mask_over_the_steps_of_a_recurrent_network_equals_the_shorter_sequences() -> None:
    torch.manual_seed(0)
    model, sequences = Recurrent(), torch.randn(3, 5, 3)
    points = hook_points(model, sequences)
    assert points["lstm.out[0]"].batch_axis == 1
    begun = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).T[:, :, None]  # (position, batch, 1)
    rows = zip(sequences, LENGTHS, strict=True)
    with torch.no_grad():
        shorter = torch.stack([model.lstm(row[:length])[0].sum(0) for row, length in rows])
    for where in (begun, lambda context: begun[:, context.rows]):
        sums = channel_sums(points, sequences, "lstm.out[0]", where=where, batch_size=2)
        np.testing.assert_allclose(sums, shorter.double().numpy(), rtol=1e-5, atol=1e-6)


# --- split axes, free axes and coordinates ---


def test_a_mask_selects_positions_of_split_and_free_axes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 12))
    axes = {"1": view("batch position (head feature)", head=3)}
    points = hook_points(model, PROMPTS[:, :4], axes=axes, free={"position": 1})
    heads = model(PROMPTS).view(3, 5, 3, 4).detach()
    mask = REAL[:, :, None, None] & torch.tensor([True, False, True])[:, None]
    reduce = ("b p h f -> b h f", "max")
    _, cache = run_with_cache(points, PROMPTS, sites="1", reduce=reduce, where=mask)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(cache["1"][row, [0, 2]], heads[row, -length:].amax(0)[[0, 2]])
    assert cache["1"][:, 1].isnan().all() and cache.counts["1"][:, 1].eq(0).all()
    tokens, over = REAL[:, :, None, None], ("batch", "position")
    patch = mean_ablate(points.site("1", head=2), heads, over=over, reference_where=tokens)
    torch.testing.assert_close(patch.edit.value.flatten(), heads[:, :, 2][REAL].mean(0))


def test_a_mask_selects_positions_of_coordinates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 6))
    points = hook_points(model, PROMPTS, axes={"1": ("batch", "position", "feature")})
    basis, tokens, other = Directions(torch.randn(2, 6)), REAL[:, :, None], (PROMPTS + 1) % 32
    site = points.site("1").along("feature", basis)
    with torch.no_grad():
        ours, theirs = basis.encode(model(PROMPTS)), basis.encode(model(other))
    sums = channel_sums(points, PROMPTS, site, reduce="mean", where=tokens, batch_size=2)
    by_hand = torch.stack([row[-length:].mean(0) for row, length in zip(ours, LENGTHS, strict=True)])
    np.testing.assert_allclose(sums, by_hand.double().numpy(), rtol=1e-5)
    vector = contrast(points, PROMPTS, other, site, where=tokens).steering_vector(site, over=("batch", "position"))
    torch.testing.assert_close(vector.flatten(), ours[REAL].mean(0) - theirs[REAL].mean(0))


# --- counts, and rows without any element ---

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([True, False, True, False]).view(4, 1, 1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Linear(2, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(image)).sum((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def points(net: Net) -> HookPoints:
    return hook_points(net, IMAGES)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "norm", ("b c h w -> b c", "prod")])
def test_a_row_without_selected_elements_is_nan_and_named(points: HookPoints, reduce: Any) -> None:
    _, cache = run_with_cache(points, IMAGES, sites="conv", reduce=reduce, where=ROWS)
    assert cache["conv"].isnan().all(1).tolist() == [False, True, False, True]
    assert cache.counts["conv"].tolist() == [[16, 16], [0, 0], [16, 16], [0, 0]]
    assert repr(cache).splitlines()[-1] == "NaN at Site('conv'): `where` selects nothing in rows 1, 3."


def test_channel_sums_of_a_row_without_selected_elements_are_nan(points: HookPoints) -> None:
    sums = channel_sums(points, IMAGES, "conv", where=ROWS, batch_size=3)
    assert np.isnan(sums).all(1).tolist() == [False, True, False, True]


def test_the_notes_name_eight_rows_at_most() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    _, cache = run_with_cache(model, torch.ones(20, 2), sites="0", reduce="sum", where=lambda context: False)
    assert repr(cache).endswith("`where` selects nothing in rows 0, 1, 2, 3, 4, 5, 6, 7, ....")


def test_values_without_a_batch_axis_are_counted_together(points: HookPoints) -> None:
    _, cache = run_with_cache(points, IMAGES, sites="conv", reduce=("b c h w -> c", "sum"), where=lambda context: False)
    assert cache.counts["conv"].tolist() == [0, 0]
    assert repr(cache).endswith("NaN at Site('conv'): `where` selects nothing for some values.")


def test_counts_of_several_forward_passes_are_joined_and_kept_on_another_device(net: Net, points: HookPoints) -> None:
    with torch.no_grad(), recording(points, "conv", "sum", where=lambda context: ROWS[: len(context.rows)]) as cache:
        net(IMAGES)
        net(IMAGES[:1])
    assert cache.counts["conv"][:, 0].tolist() == [16, 0, 16, 0, 16]
    assert cache.to(torch.float64).counts is cache.counts
    assert (cache - cache).counts is None


def test_a_recording_without_where_has_no_counts(points: HookPoints) -> None:
    assert run_with_cache(points, IMAGES, sites="conv", reduce="sum")[1].counts is None


def test_an_output_without_positions_is_kept_or_nan(points: HookPoints) -> None:
    where = torch.tensor([[True, False]])
    output, cache = run_with_cache(points, IMAGES, sites="fc", reduce="sum", where=where)
    assert torch.equal(cache["fc"][:, 0], output[:, 0]) and cache["fc"][:, 1].isnan().all()
    assert cache.counts["fc"].tolist() == [[1, 0]] * 4


# --- with patches, gradients and modes ---


def test_a_recording_reads_the_selected_elements_after_patches_or_before(net: Net, points: HookPoints) -> None:
    double = edit(points.site("conv"), lambda activation: activation * 2)
    with torch.no_grad(), recording(points, "conv", "sum", where=ROWS) as clean:
        net(IMAGES)
    with torch.no_grad(), patched(points, double), recording(points, "conv", "sum", where=ROWS) as after:
        with recording(points, "conv", "sum", before=True, where=ROWS) as before:
            net(IMAGES)
    torch.testing.assert_close(after["conv"], clean["conv"] * 2, equal_nan=True)
    torch.testing.assert_close(before["conv"], clean["conv"], equal_nan=True)


def test_a_stateful_function_runs_once_for_all_sites_of_a_forward_pass(points: HookPoints) -> None:
    class Drawn:
        def __call__(self, context: Any) -> Tensor:
            return torch.rand(4, 1, 4, 4) < 0.5

    _, cache = run_with_cache(points, IMAGES, sites=["conv", "relu"], reduce="sum", where=Drawn())
    assert torch.equal(cache.counts["conv"], cache.counts["relu"])
    assert list(cache.select("re*").counts) == list(cache.select("re*"))


def test_gradients_flow_only_through_selected_elements(net: Net, points: HookPoints) -> None:
    image = IMAGES.clone().requires_grad_()
    _, cache = run_with_cache(points, image, sites="conv", reduce="mean", where=ROWS, detach=False)
    cache["conv"].nansum().backward()
    assert image.grad is not None and image.grad.isfinite().all()
    assert image.grad.flatten(1).any(1).tolist() == [True, False, True, False]


def test_nan_outside_the_mask_is_not_read(net: Net, points: HookPoints) -> None:
    image = torch.where(ROWS, IMAGES, torch.nan)
    _, cache = run_with_cache(points, image, sites="conv", reduce=("b c h w -> c", "mean"), where=ROWS)
    by_hand = net.conv(IMAGES[[0, 2]]).mean((0, 2, 3))
    torch.testing.assert_close(cache["conv"], by_hand.detach())


def test_inference_mode_changes_no_number(net: Net, points: HookPoints) -> None:
    _, expected = run_with_cache(points, IMAGES, sites="conv", reduce="mean", where=ROWS)
    with torch.inference_mode():
        _, cache = run_with_cache(points, IMAGES, sites="conv", reduce="mean", where=ROWS)
    assert torch.equal(cache["conv"].nan_to_num(), expected["conv"].nan_to_num())


class Same(nn.Module):
    """Its submodule returns the input, in any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()

    def forward(self, tensor: Tensor) -> Tensor:
        return self.body(tensor)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_integer_and_half_activations_are_read_exactly(dtype: torch.dtype, reduce: str) -> None:
    numbers = torch.tensor([[3, 200, 7, 0], [1, 1, 0, 0]]).to(dtype)[:, None]
    points = hook_points(Same(), numbers, axes={"**": ("batch", "channel", "col")})
    mask = torch.tensor([[True, True, False, False], [False] * 4])[:, None]
    _, cache = run_with_cache(points, numbers, sites="body", reduce=reduce, where=mask)
    selected = numbers[0, 0, :2].double()
    by_hand = {"sum": selected.sum(), "mean": selected.mean(), "max": selected.amax()}[reduce]
    assert cache["body"].dtype == (torch.float32 if dtype.is_floating_point else torch.float64)
    assert cache["body"][0, 0] == by_hand and cache["body"][1].isnan().all()


def test_a_half_reference_is_averaged_without_overflow() -> None:
    points = hook_points(Same(), torch.ones(2, 3).half(), axes={"**": ("batch", "feature")})
    reference = torch.full((40, 3), 6e4).half()
    patch = mean_ablate(points.site("body"), reference, reference_where=torch.arange(40)[:, None] < 30)
    assert torch.equal(patch.edit.value, torch.full((1, 3), 6e4).half())


def test_a_recording_inside_vmap_is_refused_with_a_mask_too(net: Net, points: HookPoints) -> None:
    with recording(points, "conv", "sum", where=ROWS[:1], allow_unreached="conv"):
        with pytest.raises(UnsupportedModelError, match="inside torch.vmap"):
            torch.vmap(net)(IMAGES[:, None])


# --- mistakes ---


def message(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_where_without_a_reduction_is_refused(points: HookPoints) -> None:
    for call in (
        lambda: run_with_cache(points, IMAGES, sites="conv", where=ROWS),
        lambda: recording(points.model, "conv", where=lambda context: ROWS),
    ):
        assert message(SiteError, call) == (
            "`where` needs a reduction of the selected elements, as in reduce='mean'. Without a reduction, omit "
            "`where`, and apply the mask to the recorded activation."
        )


WHOLE = "`where` at Site('conv', channel=1): the mask has shape (4, 2, 4, 4), but the region has axes "


def test_a_mask_of_the_whole_hook_point_is_refused_at_a_site_with_fewer_channels(points: HookPoints) -> None:
    mask, site = torch.ones(4, 2, 4, 4, dtype=torch.bool), points.site("conv", channel=1)
    for call in (
        lambda: recording(points, site, "sum", where=mask),
        lambda: channel_sums(points, IMAGES, site, where=mask),
        lambda: contrast(points, IMAGES, IMAGES, site, where=mask),
    ):
        assert message(EditError, call) == (
            f"{WHOLE}(batch, channel, row, col) = (any, 1, 4, 4). Each axis of the mask must have the region's length "
            "or length 1."
        )
    bare = recording(points.model, Site("conv", channel=1), "sum", where=mask)
    with pytest.raises(EditError) as caught, bare:
        points.model(IMAGES)
    assert str(caught.value).startswith(f"{WHOLE}(batch, channel, row, col) = (4, 1, 4, 4).")


def test_a_mask_of_another_dtype_is_refused_when_the_context_is_made(points: HookPoints) -> None:
    for model in (points, points.model):
        assert message(EditError, lambda model=model: recording(model, "conv", "sum", where=ROWS.float())) == (
            "`where` at Site('conv') must be a bool tensor (such as column < 12) or a function that returns a bool "
            "tensor; got a torch.float32 tensor."
        )


def test_a_function_that_returns_another_shape_is_refused_with_a_view_that_fits(points: HookPoints) -> None:
    call = lambda: run_with_cache(points, IMAGES, sites="conv", reduce="sum", where=lambda context: ROWS.flatten())  # noqa: E731
    assert message(EditError, call) == (
        "`where` at Site('conv'): the mask has shape (4,), but the region has axes (batch, channel, row, col) = (4, 2, "
        "4, 4). Each axis of the mask must have the region's length or length 1. For example, mask.view(4, 1, 1, 1) "
        "selects along the 'batch' axis."
    )


@pytest.mark.parametrize("reduce", [("b c h w -> b c", torch.amax), ("b c h w -> b c", "any")])
def test_a_reduction_without_a_rule_for_unselected_elements_is_refused(points: HookPoints, reduce: Any) -> None:
    text = message(SiteError, lambda: recording(points, "conv", reduce, where=ROWS))
    assert text == (
        "With `where`, the reduction at Site('conv') must be one of 'sum', 'mean', 'norm', 'max', 'min', 'prod'; got "
        f"{reduce[1]!r}."
    )


@pytest.mark.parametrize("inputs", [IMAGES, iter(IMAGES.split(2))], ids=["tensor", "batches"])
def test_a_mask_without_one_row_per_input_is_refused(points: HookPoints, inputs: Any) -> None:
    count = "4" if isinstance(inputs, Tensor) else "an unknown number of"
    text = message(ProbeError, lambda: channel_sums(points, inputs, "conv", where=torch.cat([ROWS] * 2)))
    assert text == (
        f"`where` has 8 rows, but there are {count} inputs. Pass a mask with one row per input, a mask with a "
        "single row, or a function of the context, which is called for each batch."
    )


def test_a_contrast_names_the_first_input_in_which_nothing_is_selected(points: HookPoints) -> None:
    text = message(ContrastError, lambda: contrast(points, IMAGES, IMAGES, "conv", where=ROWS, batch_size=1))
    assert text == (
        "`where` selects nothing in clean[1] at Site('conv'). Leave out that input, or select at least one element in "
        "each channel."
    )


def test_a_search_skips_hook_points_that_a_mask_does_not_fit(points: HookPoints) -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    result = contrast(points, IMAGES, IMAGES.flip(0), where=mask)
    assert {site.name for site in result.sites} == {"conv", "relu"}
    assert result.skipped["fc"].startswith("`where` at Site('fc'): the mask has shape (1, 1, 4, 4)")


def test_a_steering_vector_with_elements_that_no_pair_selects_is_refused(points: HookPoints) -> None:
    left = torch.arange(4).view(1, 1, 1, 4) < 1
    result = contrast(points, IMAGES, IMAGES.flip(0), "conv", where=left)
    assert message(ContrastError, lambda: result.steering_vector("conv")) == (
        "steering_vector at Site('conv'): `where` selects nothing for 24 of the 32 elements in the mean. Select more "
        "elements, or pass more axes in over=."
    )
    assert result.steering_vector("conv", over=("batch", "row", "col")).shape == (1, 2, 1, 1)
    text = message(SiteError, lambda: result.steering_vector("conv", over="position"))
    assert text.startswith("steering_vector at Site('conv'): the argument over= contains ['position']")
    assert message(SiteError, lambda: result.steering_vector("conv", over=("row", "col"))) == (
        "steering_vector at Site('conv'): over= must contain 'batch'; got ('row', 'col')."
    )


def test_a_reference_mask_that_does_not_fit_or_selects_nothing_is_refused(points: HookPoints) -> None:
    site, reference = points.site("conv", channel=1), torch.randn(4, 2, 4, 4)

    def ablate(mask: Any) -> str:
        return message(EditError, lambda: mean_ablate(site, reference, reference_where=mask))

    assert ablate(torch.ones(4, 2, 4, 4, dtype=torch.bool)).startswith(WHOLE.replace("where", "reference_where", 1))
    assert message(EditError, lambda: mean_ablate(site, torch.zeros(2))) == (
        "mean_ablate at Site('conv', channel=1): the reference has shape (2,), but the region has axes (batch, "
        "channel, row, col) = (any, 1, 4, 4). Each axis of the reference must have the region's length or length 1."
    )
    assert ablate(lambda context: ROWS) == (
        "`reference_where` at Site('conv', channel=1) must be a bool tensor (such as column < 12); got function."
    )
    assert ablate(torch.arange(4).view(1, 1, 1, 4) < 1) == (
        "mean_ablate at Site('conv', channel=1): `reference_where` selects nothing for 12 of the 16 elements in the "
        "mean. Select more elements, or pass more axes in over=."
    )
    assert mean_ablate(site, reference, reference_where=ROWS).edit.value.shape == (1, 1, 4, 4)


def test_a_function_that_asks_for_rows_without_a_proved_batch_is_refused() -> None:
    points = hook_points(nn.Sequential(nn.Linear(6, 4)), torch.randn(6), axes={"0": ("feature",)})
    with pytest.raises(BatchAxisError, match="context.rows at Site\\('0'\\) needs a known batch axis"):
        run_with_cache(points, torch.randn(6), sites="0", reduce="sum", where=lambda context: context.rows > 0)


def test_a_sparse_activation_is_refused_with_a_mask() -> None:
    sparse = torch.eye(3).to_sparse()
    text = message(
        UnsupportedModelError,
        lambda: run_with_cache(Same(), sparse, sites="body", reduce=("a b -> a", "sum"), where=lambda context: True),
    )
    assert text == (
        "`where` at Site('body') needs a dense tensor; got a sparse_coo tensor. Omit `where`, or make the tensor dense "
        "in the model."
    )
