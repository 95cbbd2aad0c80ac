import json
import pickle
import random

import numpy as np
import pytest
import torch
from procgen_tools import models
from safetensors.torch import load_file, save_file

from chanpatch import PatchedPolicy, edit, hook_points
from maze.command import UserError
from maze.environment.requirements import policy_models
from maze.levels import draw_levels, observe, policy_input
from maze.paths import Direction
from maze.policy import network
from maze.policy.impala import Impala
from maze.policy.network import ACTIONS, NO_MOVE, SHIPPED_WEIGHTS, load_policy, new_policy, original_policy


@pytest.fixture(scope="module")
def observations():
    return torch.from_numpy(policy_input(observe(draw_levels(6, seed=9))))


def original(width):
    """The published class with random weights, built as procgen-tools builds it."""
    torch.manual_seed(width)
    models.scale = width
    try:
        return models.CategoricalPolicy(models.InterpretableImpalaModel(3), 15).eval()
    finally:
        models.scale = 1


@pytest.mark.parametrize("width", [1, 4])
def test_the_network_is_procgen_tools_own_to_the_bit(observations, width):
    torch.manual_seed(width)
    ours, theirs = new_policy(width).eval(), original(width)
    assert {name: value.tolist() for name, value in ours.state_dict().items()} == {
        name: value.tolist() for name, value in theirs.state_dict().items()
    }
    with torch.no_grad():
        (given, value), (expected, their_value) = ours(observations), theirs(observations)
    assert torch.equal(given.logits, expected.logits)
    assert torch.equal(value, their_value)
    own, others = (
        {name: point.shape for name, point in hook_points(policy, observations).items()} for policy in (ours, theirs)
    )
    assert own == others


def test_a_policy_can_be_built_by_procgen_tools(observations):
    (ours, facts), (theirs, same_facts) = load_policy(), load_policy(build=original_policy)
    assert type(theirs).__module__ == "procgen_tools.models" != type(ours).__module__
    assert torch.equal(ours(observations)[0].logits, theirs(observations)[0].logits)
    assert facts == same_facts


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("wrapped", ["", "model_state_dict", "state_dict", "module."])
def test_a_pth_file_gives_the_policy_that_was_saved_through_a_twin_too(tmp_path, observations, width, wrapped):
    policy = original(width)
    with torch.no_grad():
        policy.fc_policy.weight.mul_(100)  # so that the logits differ visibly
    weights = policy.state_dict()
    if wrapped == "module.":  # as nn.DataParallel names them
        weights = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save({wrapped: weights} if wrapped.endswith("dict") else weights, tmp_path / "model.pth")
    loaded, facts = load_policy(tmp_path / "model.pth")
    with torch.no_grad():
        expected, value = policy(observations)
        given, given_value = loaded(observations)
        channel = hook_points(loaded, observations).site("embedder.relu3", channel=3)
        through_twin, value_through_twin = PatchedPolicy(loaded, edit(channel, lambda activation: activation + 0))(
            observations
        )
    assert expected.logits.std() > 0.01
    for logits in (given.logits, through_twin.logits):
        torch.testing.assert_close(logits, expected.logits, atol=1e-6, rtol=0)
    for each in (given_value, value_through_twin):
        torch.testing.assert_close(each, value, atol=1e-6, rtol=0)
    assert facts["width"] == width
    assert facts["parameters"] == {1: 626_256, 4: 3_653_136}[width]
    assert facts["name"] == "model.pth"


def test_a_safetensors_file_gives_the_policy_that_was_saved(tmp_path, observations):
    policy = original(2)
    save_file(policy.state_dict(), tmp_path / "model.safetensors")
    loaded, facts = load_policy(tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(observations)[0].logits, policy(observations)[0].logits, atol=1e-6, rtol=0)
    assert facts["width"] == 2


def test_the_shipped_policy_is_the_one_that_its_facts_describe():
    policy, facts = load_policy()
    recorded = json.loads((SHIPPED_WEIGHTS.parent / "facts.json").read_text())
    assert facts == {
        "name": "policy.safetensors",
        "sha256": recorded["sha256"],
        "width": recorded["width"],
        "parameters": recorded["parameters"],
    }
    assert not policy.training
    assert isinstance(policy, Impala)
    assert all(weight.requires_grad and weight.device.type == "cpu" for weight in policy.parameters())


def test_the_shipped_policy_and_the_two_seeds_were_trained_alike_from_random_weights():
    files = [SHIPPED_WEIGHTS.with_name(f"{name}.json") for name in ("facts", "seed1", "seed2")]
    settings = [json.loads(file.read_text())["settings"] for file in files]
    assert [each.pop("seed") for each in settings] == [0, 1, 2]
    assert [each.pop("observations") for each in settings] == [2_500_000, 1_000_000, 1_000_000]
    assert settings[0] == settings[1] == settings[2]
    assert settings[0]["start"] is None


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("control", "auxiliary", "cell"),
        ("reward", "algorithm", "ppo"),
        ("seed1", "seed", 1),
        ("seed2", "seed", 2),
        ("width4", "width", 4),
    ],
)
def test_another_shipped_policy_is_the_one_that_its_facts_describe(name, setting, value):
    _, facts = load_policy(SHIPPED_WEIGHTS.with_name(f"{name}.safetensors"))
    recorded = json.loads(SHIPPED_WEIGHTS.with_name(f"{name}.json").read_text())
    assert facts == {"name": f"{name}.safetensors"} | {key: recorded[key] for key in ("sha256", "width", "parameters")}
    assert recorded["settings"][setting] == value


def test_the_reward_policy_was_trained_from_the_shipped_one():
    recorded = json.loads(SHIPPED_WEIGHTS.with_name("reward.json").read_text())
    assert recorded["settings"]["start"] == load_policy()[1]["sha256"]


@pytest.mark.parametrize("build", [new_policy, original_policy])
def test_loading_restores_the_width_of_the_module_and_draws_no_random_numbers(build):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    models.scale = 3
    try:
        load_policy(build=build)
        assert policy_models().scale == 3
    finally:
        models.scale = 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_actions_are_those_of_procgen_tools():
    assert {move.name: list(actions) for move, actions in ACTIONS.items()} == {
        name: indices for name, indices in models.MAZE_ACTION_INDICES.items() if name != "NOOP"
    }
    assert NO_MOVE in models.MAZE_ACTION_INDICES["NOOP"]
    assert list(ACTIONS) == list(Direction)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.pth"
    assert refusal(path) == f"The weights '{path}' cannot be read: No such file or directory."


@pytest.mark.parametrize("name", ["policy", "width4"])
def test_without_the_shipped_weights_the_error_says_that_the_study_runs_in_a_clone(tmp_path, monkeypatch, name):
    monkeypatch.setattr(network, "SHIPPED_WEIGHTS", tmp_path / "policy.safetensors")
    path = tmp_path / f"{name}.safetensors"
    assert refusal(None if name == "policy" else path) == (
        f"The weights '{path}' cannot be read: No such file or directory. "
        "The source distribution contains no weights, so run the study in a clone of the repository."
    )


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    assert refusal(path) == (f"The weights '{path}' must be a '.safetensors' or '.pth' file.")


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_a_truncated_safetensors_file_is_refused(tmp_path, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(SHIPPED_WEIGHTS.read_bytes()[:kept])
    assert refusal(path) == f"The weights '{path}' are damaged, or contain code instead of tensors."


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, 2_000_000])
def test_a_truncated_pth_file_is_refused(tmp_path, kept, legacy):
    path = tmp_path / "short.pth"
    torch.save(load_file(SHIPPED_WEIGHTS), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(path).startswith(f"The weights '{path}' are damaged")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, save):
    path, trace = tmp_path / "trap.pth", tmp_path / "trace"
    save({"model_state_dict": {"weight": Trap(trace)}}, path)
    assert refusal(path) == (f"The weights '{path}' are damaged, or contain code instead of tensors.")
    assert not trace.exists()


def test_weights_of_another_network_are_refused_with_the_first_names(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(4), "conv1.bias": torch.zeros(4)}, path)
    assert refusal(path) == (
        f"The weights '{path}' do not fit the maze policy: 36 missing: embedder.block1.conv.weight, "
        "embedder.block1.conv.bias, embedder.block1.res1.conv1.weight, ...; "
        "2 unexpected: conv1.weight, conv1.bias."
    )


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(load_file(SHIPPED_WEIGHTS) | {"fc_policy.bias": torch.zeros(7)}, path)
    assert refusal(path) == (
        f"The weights '{path}' do not fit the maze policy: 1 with the wrong shape: "
        "fc_policy.bias (7,) instead of (15,)."
    )


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "diverged.safetensors"
    save_file(load_file(SHIPPED_WEIGHTS) | {"fc_policy.bias": torch.full((15,), torch.nan)}, path)
    assert refusal(path) == f"The weights '{path}' do not fit the maze policy: 1 not finite: fc_policy.bias."


def test_a_first_convolution_that_fits_no_width_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(load_file(SHIPPED_WEIGHTS) | {"embedder.block1.conv.weight": torch.zeros(17, 3, 3, 3)}, path)
    assert refusal(path) == (
        f"The weights '{path}' do not fit the maze policy: 1 with the wrong shape: "
        "embedder.block1.conv.weight (17, 3, 3, 3) instead of (16, 3, 3, 3)."
    )


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(15).to_sparse(),
        torch.zeros(15, device="meta"),
        torch.zeros(15, dtype=torch.int64),
        torch.zeros(15, dtype=torch.bool),
        torch.zeros(15, dtype=torch.complex64),
        torch.zeros(15).to(torch.float8_e5m2),
    ],
    ids=str,
)
def test_a_tensor_that_is_not_dense_floats_on_the_cpu_is_one_error_that_names_it(tmp_path, weight):
    path = tmp_path / "other.pth"
    torch.save(load_file(SHIPPED_WEIGHTS) | {"fc_policy.bias": weight}, path)
    assert refusal(path) == (
        f"The weights '{path}' do not fit the maze policy: 1 not dense floats on the CPU: fc_policy.bias."
    )


@pytest.mark.parametrize("content", [[1, 2], {"model_state_dict": 3}, {"epoch": 5}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert refusal(path) == (
        f"The weights '{path}' contain no state dict; expected tensors by name, plain or under 'model_state_dict' "
        "or 'state_dict'."
    )


def refusal(path):
    """The message of the error, which must be ours."""
    with pytest.raises(UserError) as error:
        load_policy(path)
    return str(error.value)
