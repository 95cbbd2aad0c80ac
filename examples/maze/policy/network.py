"""The maze policy with weights from a file.

Only tensors are read from a file. A pickle that would run code is rejected before it runs.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from maze.command import UserError
from maze.environment.requirements import policy_models
from maze.paths import Direction
from maze.policy.impala import Impala

SHIPPED_WEIGHTS = Path(__file__).parents[1] / "weights" / "policy.safetensors"

ACTIONS = {Direction.LEFT: (0, 1, 2), Direction.DOWN: (3,), Direction.UP: (5,), Direction.RIGHT: (6, 7, 8)}
NO_MOVE = 4  # procgen's action without a key; 9 to 14 do not move the mouse either
ACTION_COUNT = 15

_CLONE = "The source distribution contains no weights, so run the study in a clone of the repository."
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST_WEIGHT = "embedder.block1.conv.weight"  # its first axis has 16 channels at width 1


def new_policy(width: int) -> nn.Module:
    """An untrained policy with random weights; width 1 gives 32 channels at `embedder.relu3`."""
    return Impala(width, ACTION_COUNT)


def original_policy(width: int) -> nn.Module:
    """The same network, built by procgen-tools; requires that package."""
    models = policy_models()
    before = models.scale
    try:
        models.scale = width  # read by the classes when they are instantiated
        return models.CategoricalPolicy(models.InterpretableImpalaModel(3), ACTION_COUNT)
    finally:
        models.scale = before


CLASSES = {"chanpatch": new_policy, "procgen-tools": original_policy}  # by the package that defines the class


def load_policy(
    path: str | Path | None = None, build: Callable[[int], nn.Module] = new_policy
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a policy in eval mode, and facts about its weights.

    Args:
        path: A `.safetensors` file, or a `.pth` file with a state dict of any width, plain or under
            `model_state_dict` or `state_dict`. None loads the shipped weights.
        build: Function that returns the network of a width: `new_policy` or `original_policy`.

    Returns:
        The policy, which maps float32 (batch, channel=3, row=64, col=64) in [0, 1] to a `Categorical` over 15 actions
        and the value (batch,). And the facts: `name` and `sha256` of the file, `width` (1 gives 32 channels at
        `embedder.relu3`, 4 gives 128) and the number of `parameters`.

    Raises:
        UserError: The file is missing or damaged, would run code, or does not contain the weights of a maze policy.
    """
    file = SHIPPED_WEIGHTS if path is None else Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        left_out = file.absolute().parent == SHIPPED_WEIGHTS.parent and not SHIPPED_WEIGHTS.exists()
        advice = f" {_CLONE}" if left_out else ""
        raise UserError(f"The weights '{file}' cannot be read: {error.strerror}.{advice}") from error
    weights = _tensors(file, content)
    # Without the first weight, the comparison with width 1 names all missing weights.
    first = weights.get(_FIRST_WEIGHT, torch.empty(16))
    width = max(first.shape[0] // 16, 1) if first.ndim else 1
    with torch.device("meta"):  # quick, and draws no random numbers
        policy = build(width)
    if faults := _faults(weights, policy.state_dict()):
        raise UserError(f"The weights '{file}' do not fit the maze policy: {faults}.")
    policy.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return policy.eval(), {
        "name": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": width,
        "parameters": sum(weight.numel() for weight in policy.parameters()),
    }


def is_posts(weights: Mapping[str, Any]) -> bool:
    """Whether the facts from `load_policy` are those of the post's network, so that its channel numbers apply."""
    return (weights.get("name"), weights.get("width")) == ("model_rand_region_5.pth", 4)


def _tensors(file: Path, content: bytes) -> dict[str, Tensor]:
    if file.suffix not in (".safetensors", ".pth"):
        raise UserError(f"The weights '{file}' must be a '.safetensors' or '.pth' file.")
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"The weights '{file}' are damaged, or contain code instead of tensors.") from error
    for key in ("model_state_dict", "state_dict"):
        loaded = loaded.get(key, loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(loaded, Mapping) or not all(isinstance(weight, Tensor) for weight in loaded.values()):
        raise UserError(
            f"The weights '{file}' contain no state dict; expected tensors by name, plain or under 'model_state_dict' "
            "or 'state_dict'."
        )
    return {name.removeprefix("module."): weight for name, weight in loaded.items()}  # the prefix is from DataParallel


def _faults(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """All differences in names, kinds, shapes and values from the expected weights; or an empty string."""
    named: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "not dense floats on the CPU": [],
        "with the wrong shape": [],
        "not finite": [],
    }
    for name, weight in weights.items():
        if name not in expected:
            continue
        shape, wanted = tuple(weight.shape), tuple(expected[name].shape)
        if weight.dtype not in _DTYPES or weight.layout != torch.strided or weight.device.type != "cpu":
            named["not dense floats on the CPU"].append(name)
        elif shape != wanted:
            named["with the wrong shape"].append(f"{name} {shape} instead of {wanted}")
        elif not weight.isfinite().all():
            named["not finite"].append(name)
    return "; ".join(
        f"{len(names)} {fault}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"
        for fault, names in named.items()
        if names
    )
