"""The maze policy: the IMPALA network of procgen-tools with weights from a file.

Only tensors are read from a file; a pickle that would run code is rejected before it runs.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from maze.command import UserError
from maze.environment.requirements import policy_models
from maze.paths import Direction

SHIPPED_WEIGHTS = Path(__file__).parents[1] / "weights" / "policy.safetensors"
POSTS_NAME, POSTS_WIDTH = "model_rand_region_5.pth", 4  # the network of the post

ACTIONS = {Direction.LEFT: (0, 1, 2), Direction.DOWN: (3,), Direction.UP: (5,), Direction.RIGHT: (6, 7, 8)}
NO_MOVE = 4  # procgen's action without a key; 9 to 14 do not move the mouse either
ACTION_COUNT = 15

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST_WEIGHT = "embedder.block1.conv.weight"  # its first axis has 16 channels at width 1


class WeightsError(UserError):
    """A file that is not the weights of a maze policy."""


def load_policy(path: str | Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The policy in eval mode, and facts about its weights.

    Args:
        path: a `.safetensors` file, or a `.pth` file with a state dict, plain or under `model_state_dict`.
            The width is read from it. None loads the weights shipped in `weights/`.

    Returns:
        The policy, which maps float32 (batch, channel=3, row=64, col=64) in [0, 1] to a `Categorical` over 15 actions
        and the value (batch,). And the facts: `name` and `sha256` of the file, `width` (1 gives 32 channels at
        `embedder.relu3`, 4 gives 128) and `parameters`, their number.

    Raises:
        WeightsError: the file is missing, damaged, would run code, or does not hold the weights of a maze policy.
        MissingRequirement: procgen-tools cannot be imported.
    """
    file = SHIPPED_WEIGHTS if path is None else Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise WeightsError(f"The weights '{file}' cannot be read: {error.strerror}.") from error
    weights = _tensors(file, content)
    # Without the first weight, the comparison with width 1 names all missing weights.
    first = weights.get(_FIRST_WEIGHT, torch.empty(16))
    width = max(first.shape[0] // 16, 1) if first.ndim else 1
    with torch.device("meta"):  # quick, and draws no random numbers
        policy = new_policy(width)
    _check_fit(file, weights, policy.state_dict())
    policy.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    facts = {
        "name": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": width,
        "parameters": sum(weight.numel() for weight in policy.parameters()),
    }
    return policy.eval(), facts


def is_posts(weights: Mapping[str, Any]) -> bool:
    """Whether the facts of `load_policy` have the name and width of the post's weights, so its channel numbers hold."""
    return (weights.get("name"), weights.get("width")) == (POSTS_NAME, POSTS_WIDTH)


def new_policy(width: int) -> nn.Module:
    """An untrained policy, its weights drawn from torch's generator; width 1 gives 32 channels at `embedder.relu3`.

    Raises:
        MissingRequirement: procgen-tools cannot be imported.
    """
    models = policy_models()
    before = models.scale
    try:
        models.scale = width  # read by the classes when they are instantiated
        return models.CategoricalPolicy(models.InterpretableImpalaModel(3), ACTION_COUNT)
    finally:
        models.scale = before


def _tensors(file: Path, content: bytes) -> dict[str, torch.Tensor]:
    """The content of the file, which must be tensors by name."""
    if file.suffix not in (".safetensors", ".pth"):
        raise WeightsError(f"The weights '{file}' have an unknown kind; expected a '.safetensors' or '.pth' file.")
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"The weights '{file}' are damaged, or hold more than tensors. They were not loaded: that could run code."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"The weights '{file}' are damaged.") from error
    if isinstance(loaded, Mapping) and "model_state_dict" in loaded:
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(weight, torch.Tensor) for weight in loaded.values()):
        raise WeightsError(
            f"The weights '{file}' hold no state dict; expected tensors by name, plain or under 'model_state_dict'."
        )
    return dict(loaded)


def _check_fit(file: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check the names, kinds, shapes and values of the weights."""
    both = {name: weight for name, weight in weights.items() if name in expected}
    dense = {
        name: weight
        for name, weight in both.items()
        if weight.dtype in _DTYPES and weight.layout == torch.strided and weight.device.type == "cpu"
    }
    named = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "not dense floats on the CPU": [name for name in both if name not in dense],
        "of another shape": [
            f"{name} {tuple(weight.shape)} instead of {tuple(expected[name].shape)}"
            for name, weight in both.items()
            if weight.shape != expected[name].shape
        ],
        "not finite": [name for name, weight in dense.items() if not weight.isfinite().all()],
    }
    faults = "; ".join(
        f"{len(names)} {fault}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"
        for fault, names in named.items()
        if names
    )
    if faults:
        raise WeightsError(f"The weights '{file}' do not fit the maze policy: {faults}.")
