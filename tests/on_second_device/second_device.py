"""A second device without its hardware: tensors that say they lie there, and refuse to meet those that do not.

Where no accelerator is at hand, this shows that code puts everything where it belongs: the numbers are the CPU's, so
that what runs here must give the very numbers of a run on the CPU, and an operation on tensors of both devices is an
error, as it is on a GPU. What it cannot show is a GPU's own arithmetic and speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []

    def device_count(self) -> int:
        return 0  # it has no random state of its own


_setup_privateuseone_for_python_backend("simulated", backend_module=_Backend())
DEVICE = torch.device("simulated:0")

_aten = torch.ops.aten
_BETWEEN_DEVICES = (_aten._to_copy.default, _aten.copy_.default)


class There(Tensor):
    """A tensor on the second device; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        self = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        self.here = here
        return self

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class second_device(TorchDispatchMode):
    """A context in which tensors can be made on, and brought to, the second device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the numbers, after a look at where its tensors lie and where its result is to."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, There) for tensor in tensors]
    lonely = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, There)]
    if any(there) and lonely and function not in _BETWEEN_DEVICES:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {DEVICE} and cpu.")
    device = kwargs.get("device")
    if function is _aten._local_scalar_dense.default:
        result_there = False  # .item()
    elif function is _aten.copy_.default:
        result_there = there[0]
    else:
        result_there = any(there) if device is None else torch.device(device).type == DEVICE.type
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    result = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    same = {id(_here(tensor)): tensor for tensor in tensors}  # an operation in place returns the very tensor
    return tree_map(lambda leaf: same.get(id(leaf), _there(leaf)), result) if result_there else result


def _here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, There) else leaf


def _there(leaf: Any) -> Any:
    return There(leaf) if isinstance(leaf, Tensor) else leaf


def _made_there(function: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: _run(function, args, {**kwargs, "device": DEVICE})


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _here(target).copy_(_here(source))
    return target


# What torch itself does below the context, for an index that is a list.
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", _made_there(_aten.empty_strided.default), "PrivateUse1")
_library.impl("empty.memory_format", _made_there(_aten.empty.memory_format), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
