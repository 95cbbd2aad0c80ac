"""Path patching on a residual network whose paths are written out by hand."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import hook_points, patch_in, patched, tap
from chanpatch.errors import ContrastError, HookPointError, MetricError, SiteError
from chanpatch.metrics import kl_divergence
from chanpatch.sweeps import path_patch


class Residual(nn.Module):
    """A residual stream that `first` and `second` write to and read from; `aside` reads what comes before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.aside = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.relu = nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        one = self.first(stream)
        other = self.aside(stream)
        stream = stream + one + other
        stream = stream + self.relu(self.second(self.norm(stream)))
        return self.head(stream)


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = Residual()
    CLEAN, CORRUPTED = torch.randn(2, 5, 4)
POINTS = hook_points(MODEL, CLEAN)
BASELINE = MODEL(CLEAN).detach()


@torch.no_grad()
def by_hand(*, to_second: bool, to_head: bool) -> Tensor:
    """The change of the first logit where `first` is corrupted in what goes to `second`, or past it to the head."""
    stream, changed = MODEL.embed(CLEAN), MODEL.first(MODEL.embed(CORRUPTED))
    clean = stream + MODEL.first(stream) + MODEL.aside(stream)
    corrupted = stream + changed + MODEL.aside(stream)
    read = corrupted if to_second else clean
    past = corrupted if to_head else clean
    patched_logits = MODEL.head(past + MODEL.second(MODEL.norm(read)).relu())
    return (patched_logits - BASELINE)[:, 0]


def first_logit(output: Tensor) -> Tensor:
    return output[:, 0]


def effect(sender: Any, receivers: Any, **options: Any) -> Tensor:
    return path_patch(POINTS, CLEAN, CORRUPTED, sender, receivers, metric=first_logit, **options)


def test_the_direct_path_to_the_head_leaves_out_what_the_second_block_does_with_it() -> None:
    torch.testing.assert_close(effect("first", "head.in[0]"), by_hand(to_second=False, to_head=True))


def test_the_path_through_the_second_block_leaves_out_what_goes_past_it() -> None:
    torch.testing.assert_close(effect("first", "second.in[0]"), by_hand(to_second=True, to_head=False))


def test_the_paths_to_both_receivers_together_are_the_whole_effect_of_the_sender() -> None:
    whole = by_hand(to_second=True, to_head=True)
    torch.testing.assert_close(effect("first", ["second.in[0]", "head.in[0]"]), whole)
    with torch.no_grad(), patched(POINTS, patch_in(POINTS.site("first"), MODEL.first(MODEL.embed(CORRUPTED)))):
        torch.testing.assert_close((MODEL(CLEAN) - BASELINE)[:, 0], whole)


def test_with_nothing_frozen_every_path_to_the_receiver_counts() -> None:
    torch.testing.assert_close(effect("first", "head.in[0]", frozen=()), by_hand(to_second=True, to_head=True))


@pytest.mark.parametrize("frozen", ["second", "relu", "norm", ["second", "first", "head", "embed"]])
def test_what_is_frozen_can_be_chosen(frozen: Any) -> None:
    torch.testing.assert_close(effect("first", "head.in[0]", frozen=frozen), by_hand(to_second=False, to_head=True))


def test_a_frozen_norm_cuts_the_path_through_it() -> None:
    assert (effect("first", "second.in[0]", frozen="norm") == 0).all()
    assert effect("first", "second.in[0]").abs().min() > 1e-4


def test_a_path_that_does_not_lead_to_a_receiver_has_no_effect() -> None:
    assert (effect("first", "aside.in[0]") == 0).all()


def test_one_feature_sends_and_one_receives() -> None:
    sender, receiver = POINTS.site("first", feature=2), POINTS.site("head.in[0]", feature=[2, 4])
    with torch.no_grad():
        change = MODEL.first(MODEL.embed(CORRUPTED))[:, 2] - MODEL.first(MODEL.embed(CLEAN))[:, 2]
        expected = change * MODEL.head.weight[0, 2]
    torch.testing.assert_close(effect(sender, receiver), expected)
    assert (effect(sender, POINTS.site("head.in[0]", feature=4)) == 0).all()


def test_corrupted_inputs_equal_to_the_clean_ones_have_no_effect() -> None:
    assert (path_patch(POINTS, CLEAN, CLEAN, "first", "head.in[0]", metric=first_logit) == 0).all()


def test_a_metric_that_compares_gets_the_clean_output() -> None:
    found = path_patch(POINTS, CLEAN, CORRUPTED, "first", ["second.in[0]", "head.in[0]"], metric=kl_divergence)
    with torch.no_grad(), patched(POINTS, patch_in(POINTS.site("first"), MODEL.first(MODEL.embed(CORRUPTED)))):
        expected = kl_divergence(MODEL(CLEAN), baseline=BASELINE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_inputs_may_be_positional_or_keywords() -> None:
    expected = effect("first", "head.in[0]")
    for clean, corrupted in (((CLEAN,), (CORRUPTED,)), ({"vector": CLEAN}, {"vector": CORRUPTED})):
        points = hook_points(MODEL, *clean) if isinstance(clean, tuple) else hook_points(MODEL, **clean)
        found = path_patch(points, clean, corrupted, "first", "head.in[0]", metric=first_logit)
        torch.testing.assert_close(found, expected)


class Attending(nn.Module):
    """Two attention layers on a residual stream; a block with a weight of its own is part of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.MultiheadAttention(4, 2, batch_first=True)
        self.block = Block()
        self.head = nn.Linear(4, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        sequence = sequence + self.one(sequence, sequence, sequence)[0]
        return self.head(self.block(sequence))[:, -1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        return sequence + self.scale * self.attention(sequence, sequence, sequence)[0]


def test_attention_is_frozen_and_a_block_that_calls_it_is_not() -> None:
    torch.manual_seed(0)
    model = Attending().eval()
    clean, corrupted = torch.randn(2, 5, 7, 4)
    points = hook_points(model, clean)
    found = path_patch(points, clean, corrupted, "one.out[0]", "head.in[0]", metric=first_logit)
    with torch.no_grad():
        change = model.one(corrupted, corrupted, corrupted)[0] - model.one(clean, clean, clean)[0]
        expected = (change[:, -1] @ model.head.weight.T)[:, 0]
    torch.testing.assert_close(found, expected)


class Recurring(nn.Module):
    """A residual stream that one block writes to three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        for _ in range(3):
            stream = stream + self.block(stream.relu())
        return self.head(stream)


@pytest.mark.parametrize("frozen", [None, ["block#0", "block#1"]])
def test_the_other_calls_of_a_receiving_module_are_held(frozen: Any) -> None:
    torch.manual_seed(0)
    model = Recurring()
    points = hook_points(model, CLEAN)
    found = path_patch(points, CLEAN, CORRUPTED, "embed", "block#2.in[0]", metric=first_logit, frozen=frozen)
    with torch.no_grad():
        stream = model.embed(CLEAN)
        one = model.block(stream.relu())
        two = model.block((stream + one).relu())
        received = (model.embed(CORRUPTED) + one + two).relu()
        expected = model.head(stream + one + two + model.block(received))[:, 0] - model(CLEAN)[:, 0]
    torch.testing.assert_close(found, expected)


def test_a_baseline_of_the_users_own_is_kept() -> None:
    theirs = torch.randn(5, 3)
    metric = functools.partial(kl_divergence, baseline=theirs)
    found = path_patch(POINTS, CLEAN, CORRUPTED, "first", ["second.in[0]", "head.in[0]"], metric=metric)
    with torch.no_grad(), patched(POINTS, patch_in(POINTS.site("first"), MODEL.first(MODEL.embed(CORRUPTED)))):
        expected = kl_divergence(MODEL(CLEAN), baseline=theirs) - kl_divergence(BASELINE, baseline=theirs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "a pattern for two senders": (
        lambda: effect("?e*.in[0]", "head.in[0]"),
        SiteError,
        "Expected one site, but got 3: Site('second.in[0]'), Site('relu.in[0]'), Site('head.in[0]'). Pass "
        "one of these sites.",
    ),
    "no receiver": (
        lambda: effect("first", []),
        SiteError,
        "There are no receivers. Pass at least one receiver, such as 'head.in[0]'.",
    ),
    "several metrics": (
        lambda: path_patch(POINTS, CLEAN, CORRUPTED, "first", "head.in[0]", metric={"first": first_logit}),  # type: ignore[arg-type]
        MetricError,
        "The metric must be a function of the model's output; got dict. Only sweep() accepts a dict of several "
        "metrics.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_path_is_refused(fault: str) -> None:
    fails, kind, message = FAULTS[fault]
    with pytest.raises(kind) as caught:
        fails()
    assert str(caught.value) == message


def test_nothing_is_left_of_path_patching() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 3))
    clean, corrupted = torch.randn(2, 8, 4)
    points, state = hook_points(model, clean), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = path_patch(points, clean, corrupted, "0", "4.in[0]", metric=first_logit)
    assert found.shape == (8,)
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_receiver_that_comes_before_the_sender_is_refused() -> None:
    with pytest.raises(SiteError) as caught:
        effect("second", "first.in[0]")
    assert str(caught.value) == (
        "The receiver Site('first.in[0]') does not come after the sender Site('second') in the forward pass, so no "
        "path connects the two. Print the HookPoints to see their execution order."
    )
    with pytest.raises(SiteError, match="does not come after the sender"):
        effect("second", ["head.in[0]", "second"])


def test_unpaired_inputs_and_unknown_names_are_refused() -> None:
    with pytest.raises(ContrastError) as caught:
        path_patch(POINTS, CLEAN, CORRUPTED[:3], "first", "head.in[0]", metric=first_logit)
    assert str(caught.value) == "clean and corrupted must have the same number of inputs, at least 1; got 5 and 3."
    for names in (("frist", "head.in[0]"), ("first", "haed.in[0]")):
        with pytest.raises(HookPointError, match="Did you mean"):
            effect(*names)
    with pytest.raises(HookPointError, match="Did you mean"):
        effect("first", "head.in[0]", frozen="secnod")


def test_a_model_is_traced_with_the_clean_inputs() -> None:
    both = [
        path_patch(each, CLEAN, CORRUPTED, "first", "head.in[0]", metric=first_logit) for each in (POINTS.model, POINTS)
    ]
    assert torch.equal(*both)


def test_what_is_neither_a_model_nor_its_hook_points_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Expected HookPoints or a torch\.nn\.Module, not list\.$"):
        path_patch([], CLEAN, CORRUPTED, "first", "head.in[0]", metric=first_logit)  # type: ignore[arg-type]


class WithAHookInside(nn.Module):
    """A linear layer of its own weights with an identity inside, as transformer libraries have them."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(like.weight.data.clone()), nn.Parameter(like.bias.data.clone())
        self.hook = nn.Identity()

    def forward(self, vector: Tensor) -> Tensor:
        return self.hook(vector @ self.weight.T + self.bias)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.a(vector)
        stream = stream + self.b(stream).relu()
        stream = stream + self.c(stream).relu()
        return self.head(stream)


def test_paths_are_held_in_whatever_way_a_layer_keeps_its_weights() -> None:
    torch.manual_seed(0)
    plain = Stream()
    hooked, normed = copy.deepcopy(plain), copy.deepcopy(plain)
    hooked.b, hooked.c = WithAHookInside(plain.b), WithAHookInside(plain.c)
    for name in "bc":
        nn.utils.parametrizations.weight_norm(getattr(normed, name))
    clean, corrupted = torch.randn(2, 6, 4)
    direct = [
        path_patch(hook_points(model, clean), clean, corrupted, "a", "head.in[0]", metric=lambda output: output[:, 0])
        for model in (plain, hooked, normed)
    ]
    by_hand = (plain.a(corrupted) - plain.a(clean)) @ plain.head.weight[0]
    torch.testing.assert_close(torch.as_tensor(direct[0]).float(), by_hand.detach(), rtol=1e-4, atol=1e-5)
    for other in direct[1:]:
        torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(direct[0]), rtol=1e-4, atol=1e-5)


def test_the_output_of_the_head_as_receiver_is_its_input_as_receiver() -> None:
    torch.testing.assert_close(effect("first", "head"), by_hand(to_second=False, to_head=True))


def test_what_computes_a_receiving_blocks_output_is_not_held() -> None:
    model = Stacked()
    points = hook_points(model, CLEAN)
    into, out = (
        path_patch(points, CLEAN, CORRUPTED, "embed", receiver, metric=first_logit)
        for receiver in ("block.in[0]", "block")
    )
    torch.testing.assert_close(out, into)
    assert into.abs().max() > 1e-3


class Stacked(nn.Module):
    """A block of several layers beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        return self.head(stream + self.block(stream))


def test_the_whole_models_output_is_no_receiver_unless_it_is_said_what_is_frozen() -> None:
    with pytest.raises(SiteError) as caught:
        effect("first", ".out")
    assert str(caught.value) == (
        "The receiver Site('.out') is the model's final output. By default, the module that computes this output may "
        "be frozen, which blocks all paths through it. Use that module or its input (such as 'head.in[0]') as the "
        "receiver, or choose the hook points to freeze with frozen=[...]."
    )
    torch.testing.assert_close(effect("first", ".out", frozen=()), by_hand(to_second=True, to_head=True))


class WritesInPlace(nn.Module):
    """Reads its stream again after the ReLU has written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.relu = nn.ReLU(inplace=True)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        return self.head(stream + self.layer(self.relu(stream)))


def test_an_activation_that_is_written_into_in_place_makes_no_effect_of_its_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WritesInPlace()
    points = hook_points(model, CLEAN)
    assert not path_patch(points, CLEAN, CLEAN, "embed", "relu.in[0]", metric=first_logit).any()
    assert path_patch(points, CLEAN, CORRUPTED, "embed", "relu.in[0]", metric=first_logit).any()


class Head(nn.Module):
    """Attention of two heads; `out` mixes their z."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4, bias=False) for _ in range(4))

    def z(self, stream: Tensor) -> Tensor:
        query, key, value = (each(stream).unflatten(-1, (2, 2)) for each in (self.query, self.key, self.value))
        pattern = torch.einsum("bqhf,bkhf->bhqk", query, key).softmax(-1)
        return torch.einsum("bhqk,bkhf->bqhf", pattern, value).flatten(-2)

    def forward(self, stream: Tensor) -> Tensor:
        return self.out(self.z(stream))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Head(), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(stream)
        return stream + self.down(self.up(stream).relu())


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 3)

    def forward(self, stream: Tensor) -> Tensor:
        for layer in self.h:
            stream = layer(stream)
        return self.head(stream)[:, -1]


@torch.no_grad()
def transformer_run(model: Any, stream: Tensor) -> dict[str, Tensor]:
    """The activations of a forward, written out."""
    found = {}
    for number, layer in enumerate(model.h):
        found[f"z{number}"] = layer.attention.z(stream)
        stream = stream + layer.attention.out(found[f"z{number}"])
        found[f"neurons{number}"] = layer.up(stream).relu()
        found[f"mlp{number}"] = layer.down(found[f"neurons{number}"])
        stream = stream + found[f"mlp{number}"]
        found[f"stream{number}"] = stream
    return found


@pytest.fixture
def transformer() -> tuple[Any, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(), torch.randn(3, 5, 4), torch.randn(3, 5, 4)


def test_a_heads_z_reaches_the_logits_by_its_own_output_projection_alone(transformer: Any) -> None:
    model, clean, corrupted = transformer
    points = hook_points(model, clean)
    sender = points.site("h.0.attention.out.in[0]", feature=slice(2, 4))  # the second head
    found = path_patch(points, clean, corrupted, sender, "head.in[0]", metric=first_logit)
    with torch.no_grad():
        change = (transformer_run(model, corrupted)["z0"] - transformer_run(model, clean)["z0"])[:, -1, 2:]
        expected = change @ model.h[0].attention.out.weight[:, 2:].T @ model.head.weight[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_heads_z_reaches_a_later_query_past_the_mlp_between_them(transformer: Any) -> None:
    model, clean, corrupted = transformer
    one, two = transformer_run(model, clean), transformer_run(model, corrupted)
    with torch.no_grad():
        attention, later = model.h[0].attention, model.h[1]
        queried = one["stream0"] + attention.out(two["z0"]) - attention.out(one["z0"])
        query = later.attention.query(queried).unflatten(-1, (2, 2))
        key, value = (
            each(one["stream0"]).unflatten(-1, (2, 2)) for each in (later.attention.key, later.attention.value)
        )
        pattern = torch.einsum("bqhf,bkhf->bhqk", query, key).softmax(-1)
        z = torch.einsum("bhqk,bkhf->bqhf", pattern, value).flatten(-2)
        stream = one["stream0"] + later.attention.out(z)
        stream = stream + later.down(later.up(stream).relu())
        expected = model.head(stream)[:, -1, 0] - model(clean)[:, 0]
    found = path_patch(
        model, clean, corrupted, "h.0.attention.out.in[0]", "h.1.attention.query.in[0]", metric=first_logit
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sender", ["h.0.down.in[0]", "h.0.down"])
def test_neurons_send_what_their_mlp_returns(transformer: Any, sender: str) -> None:
    model, clean, corrupted = transformer
    one, two = transformer_run(model, clean), transformer_run(model, corrupted)
    with torch.no_grad():
        expected = (two["mlp0"] - one["mlp0"])[:, -1] @ model.head.weight[0]
    found = path_patch(model, clean, corrupted, sender, "head.in[0]", metric=first_logit)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Tapped(WithAHookInside):
    def forward(self, vector: Tensor) -> Tensor:
        return tap("inside", self.hook(vector @ self.weight.T)) + self.bias


@pytest.mark.parametrize("sender", ["b.hook.in[0]", "b.hook", "inside", "b.in[0]"])
def test_a_module_with_weights_around_the_sender_is_not_held(sender: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, clean, corrupted = Stream(), torch.randn(6, 4), torch.randn(6, 4)
    model.b = Tapped(model.b)
    found = path_patch(model, clean, corrupted, sender, "head.in[0]", metric=first_logit)
    with torch.no_grad():
        one, two = model.a(clean), model.a(corrupted)
        expected = (model.b(two).relu() - model.b(one).relu()) @ model.head.weight[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_call_that_the_sender_is_the_input_of_is_not_held_and_the_next_call_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recurring()
    found = path_patch(model, CLEAN, CORRUPTED, "block#1.in[0]", "head.in[0]", metric=first_logit)
    with torch.no_grad():

        def second(vector: Tensor) -> Tensor:
            stream = model.embed(vector)
            return model.block((stream + model.block(stream.relu())).relu())

        expected = (second(CORRUPTED) - second(CLEAN)) @ model.head.weight[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_module_called_before_around_its_own_layer_is_held() -> None:
    class Twice(nn.Module):
        """Calls a layer of the block by itself, and the block, which has weights, after it."""

        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Tapped(nn.Linear(4, 4)), nn.Linear(4, 3)

        def forward(self, vector: Tensor) -> Tensor:
            vector = self.block.hook(vector)
            return self.head(vector + self.block(vector))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Twice()
    found = path_patch(model, CLEAN, CORRUPTED, "block.hook#0", "head.in[0]", metric=first_logit)
    expected = ((CORRUPTED - CLEAN) @ model.head.weight[0]).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_path_that_only_held_modules_carry_is_refused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    points = hook_points(model, CLEAN)
    with pytest.raises(SiteError) as caught:
        path_patch(points, CLEAN, CORRUPTED, "0", "3.in[0]", metric=first_logit)
    assert str(caught.value) == (
        "All paths from Site('0') to the receivers pass through frozen sites: '1'. Choose the sites to freeze with "
        "frozen=[...], or freeze nothing with frozen=()."
    )
    assert path_patch(points, CLEAN, CORRUPTED, "0", "3.in[0]", metric=first_logit, frozen=()).any()
    assert not path_patch(points, CLEAN, CORRUPTED, "0", "3.in[0]", metric=first_logit, frozen="1").any()
    assert not path_patch(points, CLEAN, CLEAN, "0", "3.in[0]", metric=first_logit).any()


def test_a_pattern_names_receivers_and_frozen_sites(transformer: Any) -> None:
    model, clean, corrupted = transformer
    ends, layers = ["h.0.down.in[0]", "h.1.down.in[0]"], ["h.0.down", "h.1.down"]
    for pattern, names in (("h.*.down.in[0]", ends), ("h.?.down.in", ends)):
        found, expected = (
            path_patch(model, clean, corrupted, "h.0.attention.out.in[0]", receivers, metric=first_logit, frozen=frozen)
            for receivers, frozen in ((pattern, "h.*.down"), (names, layers))
        )
        assert torch.equal(found, expected) and found.any()
