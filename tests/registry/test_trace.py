"""Finding hook points: which fire, in what order, which axis is proved to be the batch, and nothing left behind."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanpatch import patched, resample_ablate, zero_ablate
from chanpatch.errors import BatchAxisError, HookPointError, SiteError, UnsupportedModelError
from chanpatch.registry import hook_points, tap


def hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def batch_axes(points) -> dict[str, int | None]:
    return {name: point.batch_axis for name, point in points.items()}


# --- what fires ---


def test_hook_points_are_listed_in_execution_order(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    assert list(points) == [
        ".in[0]", "conv1.in[0]", "conv1", "relu1.in[0]", "relu1", "conv2.in[0]", "conv2", "relu2.in[0]", "relu2",
        "fc.in[0]", "fc", ".out",
    ]  # fmt: skip


def test_a_hook_point_says_what_its_tensor_is(plain_cnn):
    point = hook_points(plain_cnn.module, *plain_cnn.inputs(2))["conv1"]
    assert (point.axes, point.shape, point.batch_axis) == (("batch", "channel", "row", "col"), (8, 8, 8), 0)
    assert (point.dtype, point.device) == (torch.float32, torch.device("cpu"))
    assert (point.module_type, point.parameters) == ("Conv2d", 3 * 8 * 9 + 8)
    assert (point.module, point.side, point.path, point.call) == ("conv1", "out", (), None)


def test_every_tensor_of_a_nested_output_is_a_hook_point(dict_output):
    points = hook_points(dict_output.module, *dict_output.inputs(2))
    assert [name for name in points if name.startswith("encoder.out")] == [
        'encoder.out["hidden"]', 'encoder.out["memory"].mean', 'encoder.out["memory"].spread',
        'encoder.out["layers"][0]', 'encoder.out["layers"][1]',
    ]  # fmt: skip


def test_the_parameter_of_a_distribution_is_a_hook_point(tuple_output):
    points = hook_points(tuple_output.module, *tuple_output.inputs(2))
    assert (points[".out[0].logits"].axes, points[".out[0].logits"].shape) == (("batch", "feature"), (4,))


def test_only_the_parameter_that_a_distribution_was_built_with_is_a_hook_point(tuple_output):
    assert list(hook_points(tuple_output.module, *tuple_output.inputs(2)))[-2:] == [".out[0].logits", ".out[1]"]


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, *, vector, bonus=None):
        return self.fc(input=vector) + (0 if bonus is None else bonus)


def test_keyword_inputs_are_hook_points_by_their_names():
    points = hook_points(Keywords(), vector=torch.randn(2, 6), bonus=torch.randn(2, 4))
    assert list(points) == ['.in["vector"]', '.in["bonus"]', 'fc.in["input"]', "fc", ".out"]


def test_a_module_that_is_called_again_has_one_name_per_call(shared_module):
    points = hook_points(shared_module.module, *shared_module.inputs(2))
    assert [name for name in points if name.startswith("relu")] == ["relu#0.in[0]", "relu#0", "relu#1.in[0]", "relu#1"]
    assert [points[f"relu#{call}"].call for call in (0, 1)] == [0, 1]
    assert points.calls["relu"] == 2


def test_a_module_with_two_names_is_one_hook_point_with_an_alias(shared_module):
    points = hook_points(shared_module.module, *shared_module.inputs(2))
    assert points["fc2"].aliases == ("tied",)
    assert points["tied"] is points["fc2"]
    assert points["tied.in[0]"] is points["fc2.in[0]"]
    assert "tied" not in list(points)


def test_calls_of_a_shared_module_are_counted_over_both_its_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Linear(6, 6)

        def forward(self, vector):
            return self.other(self.one(vector))

    points = hook_points(Twice(), torch.randn(2, 6))
    assert points["other#1"] is points["one#1"]


class Taps(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, vector):
        for _ in range(2):
            vector = vector + tap("loop", vector.sin())
        return tap("logits", self.fc(vector))


def test_a_tap_is_a_hook_point_and_each_time_it_runs_is_a_call():
    points = hook_points(Taps(), torch.randn(2, 6))
    assert [name for name, point in points.items() if point.side == "tap"] == ["loop#0", "loop#1", "logits"]
    assert points["loop#1"].module_type == "tap"
    assert points["loop#1"].parameters == 0


def test_a_tap_has_the_names_that_its_tensor_has():
    assert hook_points(Taps(), torch.randn(2, 6))["logits"].axes == ("batch", "feature")


class Branch(nn.Module):
    """Two entries, and a module that only one of them calls."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Linear(6, 4)
        self.critic = nn.Linear(6, 1)

    def forward(self, vector):
        return self.actor(vector)

    def value(self, vector, *, scale=1.0):
        return self.critic(vector) * scale


def test_a_module_that_is_not_called_is_no_hook_point_but_known():
    points = hook_points(Branch(), torch.randn(2, 6))
    assert points.not_called == ("critic",)
    with pytest.raises(HookPointError, match="'critic' is not a hook point"):
        points["critic"]


def test_another_method_is_traced_on_request():
    points = hook_points(Branch(), torch.randn(2, 6), method="value", scale=2.0)
    assert list(points) == ["critic.in[0]", "critic"]
    assert (points.method, points.not_called) == ("value", ("actor",))


def test_what_is_no_module_is_a_type_error():
    with pytest.raises(TypeError, match="expects a torch.nn.Module, not function"):
        hook_points(lambda x: x, torch.randn(2))


@pytest.mark.parametrize("given", [{"axes": "batch feature"}, {"free": ["position"]}], ids=str)
def test_axes_and_free_lengths_are_dicts(given):
    expected = f"{[*given][0]}= must be a dict, such as .*; got {type([*given.values()][0]).__name__}"
    with pytest.raises(TypeError, match=expected):
        hook_points(nn.Linear(6, 4), torch.randn(2, 6), **given)


@pytest.mark.parametrize("use", [lambda points: points[0], lambda points: points.select([".out"])])
def test_hook_points_are_found_by_strings_only(use):
    with pytest.raises(TypeError, match="must be a string, such as 'conv1'; got (int|list)"):
        use(hook_points(nn.Linear(6, 4), torch.randn(2, 6)))


def test_a_model_whose_own_name_is_a_tap_is_told():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, vector):
            return tap("fc", self.fc(vector))

    with pytest.raises(HookPointError, match="has the same name as a module"):
        hook_points(Clash(), torch.randn(2, 6))


# --- which axis is the batch ---


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_batch_axis_is_proved_at_any_batch_size(model, rows):
    points = hook_points(model.module, *model.inputs(rows))
    assert all(point.axes[point.batch_axis] == "batch" for point in points.values())


class Recurrent(nn.Module):
    """Takes a hidden state (layer, batch, feature) beside its observations."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, sequence, hidden):
        out, hidden = self.gru(sequence, hidden)
        return self.head(out[:, -1]), hidden


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_hidden_state_has_its_batch_on_its_second_axis(rows):
    points = hook_points(Recurrent(), torch.randn(rows, 5, 6), torch.randn(2, rows, 4))
    assert batch_axes(points) == {
        ".in[0]": 0, ".in[1]": 1, "gru.in[0]": 0, "gru.in[1]": 1, "gru.out[0]": 0, "gru.out[1]": 1,
        "head.in[0]": 0, "head": 0, ".out[0]": 0, ".out[1]": 1,
    }  # fmt: skip


class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 2, 3)
        self.vector = nn.Linear(6, 2)

    def forward(self, observation):
        return self.image(observation["image"]).mean((2, 3)) + self.vector(observation["vector"])


def test_a_dict_of_observations_grows_in_all_its_items():
    points = hook_points(DictInput(), {"image": torch.randn(3, 3, 5, 5), "vector": torch.randn(3, 6)})
    assert set(batch_axes(points).values()) == {0}


def test_keyword_inputs_grow_together():
    points = hook_points(Keywords(), vector=torch.randn(2, 6), bonus=torch.randn(2, 4))
    assert set(batch_axes(points).values()) == {0}


def test_an_input_whose_named_axes_hold_no_batch_does_not_grow():
    vector, bonus = torch.randn(4, 6), torch.randn(4)
    points = hook_points(Keywords(), vector=vector, bonus=bonus, axes={'.in["bonus"]': ("feature",)})
    assert batch_axes(points) == {'.in["vector"]': 0, '.in["bonus"]': None, 'fc.in["input"]': 0, "fc": 0, ".out": 0}


def test_an_input_as_long_as_the_batch_by_chance_leaves_the_batch_unproved():
    points = hook_points(Keywords(), vector=torch.randn(4, 6), bonus=torch.randn(4))
    assert set(batch_axes(points).values()) == {None}


class Folded(nn.Module):
    """Folds time into the batch and out again."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, sequence):
        rows, steps, _ = sequence.shape
        return self.fc(sequence.flatten(0, 1)).unflatten(0, (rows, steps))


def test_a_batch_into_which_time_was_folded_is_not_proved():
    points = hook_points(Folded(), torch.randn(2, 5, 6))
    assert batch_axes(points) == {".in[0]": 0, "fc.in[0]": None, "fc": None, ".out": 0}
    assert points["fc"].axes == ("axis0", "feature")


class OneSize(nn.Module):
    """Works for the batch size it was written for."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, vector):
        return self.fc(vector.view(2, 6))


def test_a_model_of_one_batch_size_has_no_proved_batch():
    points = hook_points(OneSize(), torch.randn(2, 6))
    assert set(batch_axes(points).values()) == {None}


def test_an_unbatched_input_proves_no_batch():
    points = hook_points(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(3, 8, 8))
    assert set(batch_axes(points).values()) == {None}


def test_an_unbatched_vector_proves_no_batch():
    assert set(batch_axes(hook_points(nn.Linear(6, 4), torch.randn(6))).values()) == {None}


def test_a_sum_over_the_batch_has_no_batch_axis():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, vector):
            return self.fc(vector).sum(0)

    assert batch_axes(hook_points(Loss(), torch.randn(2, 6))) == {".in[0]": 0, "fc.in[0]": 0, "fc": 0, ".out": None}


def test_position_first_inputs_have_the_batch_that_axes_names():
    points = hook_points(nn.GRU(6, 4), torch.randn(5, 2, 6), axes={".in[0]": ("position", "batch", "feature")})
    assert batch_axes(points) == {".in[0]": 1, ".out[0]": 1, ".out[1]": 1}


# --- axes= ---


def test_axes_names_what_no_module_type_tells():
    names = ("batch", "position", "feature")
    points = hook_points(Folded(), torch.randn(2, 5, 6), axes={".out": names, ".in": names})
    assert (points[".in[0]"].axes, points[".out"].axes) == (names, names)


def test_names_that_axes_gives_are_passed_on_to_elementwise_modules():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    points = hook_points(model, torch.randn(2, 5, 6), axes={".in[0]": ("batch", "position", "feature")})
    assert points["1"].axes == ("batch", "position", "feature")


def test_names_that_axes_gives_stand_before_those_of_the_module_type():
    points = hook_points(nn.Linear(6, 4), torch.randn(2, 6), axes={".out": ("batch", "logit")})
    assert points[".out"].axes == ("batch", "logit")


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(
        HookPointError, match=r"axes=\{'fcc': ...\}: no hook point matches this pattern. Did you mean 'fc'\?"
    ):
        hook_points(Folded(), torch.randn(2, 5, 6), axes={"fcc": ("a", "b")})


@pytest.mark.parametrize("names", [("batch",), ("batch", "a", "b"), ("a", "a")])
def test_a_wrong_number_of_names_or_one_twice_is_refused(names):
    with pytest.raises(SiteError, match="has 2 axes. Pass one name per axis"):
        hook_points(Folded(), torch.randn(2, 5, 6), axes={"fc": names})


def test_axes_names_a_tap():
    points = hook_points(Taps(), torch.randn(2, 6), axes={"loop*": ("batch", "angle")})
    assert points["loop#1"].axes == ("batch", "angle")


# --- nothing is left behind ---


class Restless(nn.Module):
    """Draws from every generator, moves its statistics and its flags, replaces a buffer, and may raise."""

    def __init__(self, *, raises: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))
        self.raises = raises

    def forward(self, vector):
        random.random(), np.random.rand(), torch.rand(1)
        self.steps += 1
        self.last = vector.mean(0)
        self.dropout.eval()
        self.eval()
        if self.raises:
            raise KeyError("the model's own")
        return self.norm(self.dropout(vector))


def traces(model: nn.Module) -> None:
    try:
        hook_points(model, torch.randn(4, 6))
    except KeyError as error:
        assert error.args == ("the model's own",)


@pytest.fixture(params=[False, True], ids=["returns", "raises"])
def restless(request):
    return Restless(raises=request.param).train()


def test_tracing_leaves_the_random_number_generators_as_they_were(restless):
    inputs = torch.randn(4, 6)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(KeyError) if restless.raises else torch.no_grad():
        hook_points(restless, inputs)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_tracing_leaves_every_buffer_the_very_tensor_with_what_it_held(restless):
    before = {name: (buffer, buffer.clone()) for name, buffer in restless.named_buffers()}
    traces(restless)
    after = dict(restless.named_buffers())
    assert all(after[name] is buffer and torch.equal(buffer, held) for name, (buffer, held) in before.items())
    assert list(after) == list(before)


def test_tracing_leaves_the_training_flags_as_they_were(restless):
    restless.norm.eval()
    traces(restless)
    assert {name: module.training for name, module in restless.named_modules()} == {
        "": True, "norm": False, "dropout": True,
    }  # fmt: skip


def test_tracing_leaves_no_hook(restless):
    before = hooks(restless)
    traces(restless)
    assert hooks(restless) == before


def test_tracing_leaves_the_hooks_of_others(plain_cnn):
    seen = []
    plain_cnn.module.conv1.register_forward_hook(lambda *_: seen.append(1))
    hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    plain_cnn.module(*plain_cnn.inputs(2))
    assert len(seen) == 3  # traced, traced with one row more, and run


def test_tracing_builds_no_graph_and_leaves_no_gradient(plain_cnn):
    (image,) = plain_cnn.inputs(2)
    hook_points(plain_cnn.module, image.requires_grad_())
    assert image.grad is None
    assert all(parameter.grad is None for parameter in plain_cnn.module.parameters())


def test_tracing_between_a_forward_and_its_backward_does_not_spoil_the_graph(batch_norm):
    (image,) = batch_norm.inputs(4)
    loss = batch_norm.module(image).sum()
    hook_points(batch_norm.module, image)
    loss.backward()
    assert batch_norm.module.conv.weight.grad is not None


def test_tracing_leaves_the_example_inputs_as_they_were(inplace_relu):
    model = nn.Sequential(nn.ReLU(inplace=True), inplace_relu.module)
    (image,) = inplace_relu.inputs(2)
    before = image.clone()
    hook_points(model, image)
    assert torch.equal(image, before)


def test_two_traces_of_one_model_are_equal(model):
    inputs = model.inputs(2)
    one, other = hook_points(model.module, *inputs), hook_points(model.module, *inputs)
    assert dict(one) == dict(other)


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.compile(nn.Linear(6, 4), backend="eager"),
        lambda: nn.Sequential(torch.compile(nn.Linear(6, 4), backend="eager")),
        lambda: torch.jit.trace(nn.Linear(6, 4), torch.zeros(1, 6)),
    ],
    ids=["compiled", "compiled inside", "traced by jit"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_that_ignores_hooks_is_refused(build):
    with pytest.raises(UnsupportedModelError):
        hook_points(build(), torch.randn(2, 6))


# --- sequences whose batch is not their first axis ---


class LateEncoder(nn.Module):
    """Begins with a Linear, which leaves open which axis is the batch; a sequence-first encoder comes later."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
        self.head = nn.Linear(8, 2)

    def forward(self, sequence, other=None):
        return self.head(self.encoder(self.embed(sequence)))


def test_a_batch_that_only_a_later_module_knows_is_refused_until_axes_names_it():
    sequence = torch.randn(7, 3, 5)
    points = hook_points(LateEncoder().eval(), sequence)
    assert set(batch_axes(points).values()) == {None}
    assert "Hook points with unknown batch axis" in repr(points)
    with pytest.raises(BatchAxisError, match=r"Name the axes of the model's input: hook_points\(\.\.\., axes="):
        resample_ablate(points.site("head"), torch.zeros(7, 3, 2), seed=0)


def test_inputs_grow_along_the_axes_that_are_named_batch():
    axes = {".in[0]": ("position", "batch", "feature"), ".in[1]": ("layer", "batch", "feature")}
    points = hook_points(LateEncoder().eval(), torch.randn(7, 3, 5), torch.randn(1, 3, 4), axes=axes)
    assert points["head"].axes == ("position", "batch", "feature")
    assert set(batch_axes(points).values()) == {1}


def test_axes_names_the_inputs_of_another_method():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 4)

        def act(self, vector, state, done):
            state = tuple((1 - done).view(1, -1, 1) * part for part in state)
            return self.lstm(vector[None], state)

    inputs = torch.randn(3, 6), (torch.randn(1, 3, 4), torch.randn(1, 3, 4)), torch.zeros(3)
    assert set(batch_axes(hook_points(Policy(), *inputs, method="act")).values()) == {None}
    axes = {".in[1]": ("layer", "batch", "feature")}
    assert set(batch_axes(hook_points(Policy(), *inputs, method="act", axes=axes)).values()) == {1}


def test_modules_that_disagree_on_the_batch_leave_it_unproved():
    class Both(LateEncoder):
        def __init__(self):
            super().__init__()
            self.rows = nn.GRU(8, 8, batch_first=True)

        def forward(self, sequence):
            return self.head(self.rows(self.encoder(self.embed(sequence)))[0])

    points = hook_points(Both().eval(), torch.randn(7, 3, 5))
    assert set(batch_axes(points).values()) == {None}


# --- what is given to the model, and what it does with it ---


class Keys:
    """A cache of keys, as opaque as those of language models."""

    def __init__(self):
        self.held = [torch.zeros(2, 6)]


def test_an_opaque_input_is_left_as_it_was():
    class Appending(nn.Module):
        def forward(self, vector, keys):
            keys.held.append(vector)
            return torch.stack(keys.held).sum(0)

    keys = Keys()
    hook_points(Appending(), torch.randn(2, 6), keys)
    hook_points(Appending(), torch.randn(2, 6), keys=keys)
    assert len(keys.held) == 1


def test_an_input_that_cannot_be_copied_is_given_as_it_is():
    lock = threading.Lock()
    seen = []

    class Locking(nn.Module):
        def forward(self, vector, lock):
            seen.append(lock)
            return vector + 1

    assert hook_points(Locking(), torch.randn(2, 6), lock)[".out"].batch_axis == 0
    assert seen == [lock, lock]


def test_a_submodule_that_raises_and_is_caught_does_not_shift_the_calls():
    class Failing(nn.Module):
        def forward(self, vector):
            raise ValueError

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.failing, self.fc = Failing(), nn.Linear(6, 6)

        def forward(self, vector):
            try:
                return self.failing(vector)
            except ValueError:
                return self.fc(vector)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, vector):
            return self.block(self.block(vector))

    points = hook_points(Twice(), torch.randn(2, 6))
    assert [name for name in points if name.startswith("block#")] == ["block#0.in[0]", "block#0", "block#1.in[0]",
                                                                      "block#1"]  # fmt: skip


def test_a_model_on_the_meta_device_can_be_traced():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).to("meta")
    points = hook_points(model, torch.randn(2, 6, device="meta"))
    assert (points["1"].axes, points["1"].device.type) == (("batch", "feature"), "meta")


def test_packed_sequences_prove_no_batch():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    assert set(batch_axes(hook_points(nn.LSTM(6, 4), packed)).values()) == {None}


class OneExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, vector: Tensor) -> Tensor:
        hidden = self.router(vector)
        chosen = (vector[:, 0] > 0).nonzero()[:, 0]
        output = torch.zeros_like(hidden)
        output[chosen] = self.expert(hidden[chosen])
        return output


def test_rows_that_an_expert_was_given_are_not_the_batch() -> None:
    vectors = torch.randn(8, 4)
    vectors[:, 0] = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 1])
    points = hook_points(OneExpert(), vectors)
    assert points["router"].batch_axis == 0
    assert points["expert"].batch_axis is None


class OfOneBatch(dict):
    """A dict that knows its batch size, as a TensorDict does, and refuses tensors of another."""

    def __setitem__(self, key, tensor):
        if "x" in self and len(tensor) != len(self["x"]):
            raise RuntimeError("batch dimension mismatch")
        super().__setitem__(key, tensor)


def test_a_container_that_refuses_one_row_more_leaves_the_batch_axis_unproved():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, batch):
            return self.second(self.first(batch["x"]))

    points = hook_points(Model(), OfOneBatch(x=torch.randn(5, 4)))
    assert points["first"].axes == ("axis0", "feature")


def test_numpy_arrays_are_given_as_tensors_where_the_model_takes_none():
    with pytest.raises(TypeError, match=r"Linear does not accept NumPy arrays\. Pass torch\.as_tensor\(array\)"):
        hook_points(nn.Linear(4, 2), np.zeros((3, 4), np.float32))


class KeptKeys:
    """A cache that a model extends in place, as key-value caches of language models are."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Extending(nn.Module):
    """A model that extends the cache that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, cache: KeptKeys) -> Tensor:
        cache.keys = torch.cat([cache.keys, self.layer(x)], dim=1)
        return cache.keys.sum(1)


def test_a_cache_is_copied_for_each_run_and_one_with_gradients_is_refused():
    model, x = Extending(), torch.randn(3, 1, 2)
    cache = KeptKeys(torch.randn(3, 4, 2))
    hook_points(model, x, cache)
    assert cache.keys.shape == (3, 4, 2)
    with pytest.raises(UnsupportedModelError) as caught:
        hook_points(model, x, KeptKeys(model.layer(torch.randn(3, 4, 2))))
    assert str(caught.value) == (
        "An input of type KeptKeys contains tensors that require gradients, so the input cannot be copied for each "
        "forward pass. Create the KeptKeys under torch.no_grad()."
    )


def test_an_ensemble_whose_stacked_weights_run_in_vmap_can_be_traced() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)
            self.stacked = {
                name: torch.stack([each.detach(), -each.detach()]) for name, each in self.net.named_parameters()
            }

        def forward(self, inputs: Tensor) -> Tensor:
            call = torch.func.functional_call
            return torch.vmap(lambda weights: call(self.net, weights, (inputs,)))(self.stacked)[1]

    model, inputs = Ensemble(), torch.randn(4, 3)
    points = hook_points(model, inputs)
    with patched(points, zero_ablate(points.site("net", feature=0))):
        output = model(inputs)
    torch.testing.assert_close(output, -model.net(inputs) * torch.tensor([0.0, 1.0]))
