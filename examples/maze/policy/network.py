"""The maze policy: the IMPALA network of procgen-tools with weights from a file.

Only tensors are read from a file. A pickle that would run code is refused before it runs.
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
from maze.environment.paths import Direction
from maze.environment.requirements import policy_models

SHIPPED_WEIGHTS = Path(__file__).parents[1] / "weights" / "policy.safetensors"

ACTIONS = {
    Direction.LEFT: (0, 1, 2),
    Direction.DOWN: (3,),
    Direction.UP: (5,),
    Direction.RIGHT: (6, 7, 8),
}
NO_MOVE = 4  # procgen's action without a key; 9 to 14 do not move the mouse either
ACTION_COUNT = 15

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST_WEIGHT = "embedder.block1.conv.weight"
_FIRST_CHANNELS = 16  # of `_FIRST_WEIGHT` at width 1


POSTS_NAME, POSTS_WIDTH = "model_rand_region_5.pth", 4  # the network that the post is about


class WeightsError(UserError):
    """A file that is not the weights of a maze policy."""


def load_policy(path: str | Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The policy in eval mode, and what is known of its weights.

    Args:
        path: a `.safetensors` file, or a `.pth` file with a state dict, plain or under `model_state_dict`.
            The width is read from it. None loads the weights shipped in `weights/`.

    Returns:
        The policy: maps float32 (batch, channel=3, row=64, col=64) in [0, 1] to a `Categorical` over 15
        actions and the value (batch,). And the facts: `name` and `sha256` of the file, `width` (1 gives 32
        channels at `embedder.relu3`, 4 gives 128) and `parameters`, their number.

    Raises:
        WeightsError: the file is missing, damaged, would run code, or holds something else; nothing of it was
            run.
        MissingRequirement: procgen-tools cannot be imported.
    """
    file = SHIPPED_WEIGHTS if path is None else Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise WeightsError(f"The weights '{file}' cannot be read: {error.strerror}.") from error
    weights = _tensors(file, content)
    _check_kinds(file, weights)
    width = _width(file, weights)
    policy = _unfilled_policy(width)
    _check_fit(file, weights, policy)
    policy.load_state_dict({name: weights[name].float() for name in policy.state_dict()}, assign=True)
    facts = {
        "name": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": width,
        "parameters": sum(weight.numel() for weight in policy.parameters()),
    }
    return policy.eval(), facts


def is_posts(weights: Mapping[str, Any]) -> bool:
    """Whether these are, by name and width, the weights that the post is about, so that its channel numbers hold.

    Args:
        weights: what `load_policy` knows of them.
    """
    return (weights.get("name"), weights.get("width")) == (POSTS_NAME, POSTS_WIDTH)


def new_policy(width: int) -> nn.Module:
    """An untrained policy, its weights drawn from torch's generator.

    Args:
        width: 1 gives 32 channels at `embedder.relu3`, 4 gives 128.

    Raises:
        MissingRequirement: procgen-tools cannot be imported.
    """
    models = policy_models()
    before = models.scale
    try:
        models.scale = width  # the classes read it when they are instantiated
        policy: nn.Module = models.CategoricalPolicy(models.InterpretableImpalaModel(3), ACTION_COUNT)
        return policy
    finally:
        models.scale = before


def _tensors(file: Path, content: bytes) -> dict[str, torch.Tensor]:
    """Everything in the file, which must be tensors by name."""
    if file.suffix == ".safetensors":
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise WeightsError(f"The weights '{file}' are damaged or not safetensors: {error}.") from error
    if file.suffix != ".pth":
        raise WeightsError(f"The weights '{file}' have an unknown kind; expected a '.safetensors' or '.pth' file.")
    try:
        with warnings.catch_warnings():
            # About pickle protocols; what is loaded is checked below.
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"The weights '{file}' are damaged, or hold more than tensors. Nothing of them was loaded: "
            "it could run code."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"The weights '{file}' are damaged.") from error
    if isinstance(loaded, Mapping) and "model_state_dict" in loaded:
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(weight, torch.Tensor) for weight in loaded.values()):
        raise WeightsError(
            f"The weights '{file}' hold no state dict; expected tensors by name, plain or under 'model_state_dict'."
        )
    return dict(loaded)


def _check_kinds(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Check that every tensor is dense and floating point, and that its values are in the file."""
    faults = [
        f"{name} ({str(weight.dtype).removeprefix('torch.')}, {str(weight.layout).removeprefix('torch.')}, on "
        f"{weight.device})"
        for name, weight in weights.items()
        if weight.dtype not in _DTYPES or weight.layout != torch.strided or weight.device.type != "cpu"
    ]
    if faults:
        raise WeightsError(
            f"The weights '{file}' hold {len(faults)} tensors of a kind that no maze policy has: {_first_few(faults)}. "
            "Expected float16, bfloat16, float32 or float64, strided, on cpu. Save policy.state_dict() of a policy "
            "whose weights are in memory."
        )


def _width(file: Path, weights: Mapping[str, torch.Tensor]) -> int:
    """The width that the first convolution has; 1 where the file has none, so that its keys are compared."""
    if _FIRST_WEIGHT not in weights:
        return 1
    shape = tuple(weights[_FIRST_WEIGHT].shape)
    if shape[1:] != (3, 3, 3) or shape[0] == 0 or shape[0] % _FIRST_CHANNELS:
        raise WeightsError(
            f"The weights '{file}' are not of a maze policy: '{_FIRST_WEIGHT}' has shape {shape}, "
            f"expected ({_FIRST_CHANNELS} * width, 3, 3, 3)."
        )
    return shape[0] // _FIRST_CHANNELS


def _unfilled_policy(width: int) -> nn.Module:
    """The policy without memory for its parameters: quick, and no random numbers are drawn to fill them."""
    with torch.device("meta"):
        return new_policy(width)


def _check_fit(file: Path, weights: Mapping[str, torch.Tensor], policy: nn.Module) -> None:
    expected = policy.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    infinite = [name for name, weight in weights.items() if name in expected and not weight.isfinite().all()]
    named = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen, "not finite": infinite}
    faults = "; ".join(f"{len(names)} {fault}: {_first_few(names)}" for fault, names in named.items() if names)
    if faults:
        raise WeightsError(f"The weights '{file}' are not of a maze policy: {faults}.")


def _first_few(names: list[str]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
