"""Infer axis names from a module's type, never from the number of axes alone.

Convolution, pooling, linear, recurrent, attention and embedding modules have known axis names. Elementwise modules and
functions propagate the axis names of their inputs. All other axes are named `axis0`, `axis1`, ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..engine.paths import Item, Path

Names = tuple["str | None", ...]

_SPACE = {1: ("position",), 2: ("row", "col"), 3: ("depth", "row", "col")}

_SPATIAL = re.compile(r"\w*(?:Conv|Transpose|[Pp]ool|Norm|Pad)([123])d|Pixel(?:Uns|S)huffle")

_ELEMENTWISE = tuple(
    kind
    for name in (*nn.modules.activation.__all__, *nn.modules.dropout.__all__,
                 "LayerNorm", "RMSNorm", "GroupNorm", "LocalResponseNorm", "Identity")
    if (kind := getattr(nn, name, None)) not in (None, nn.MultiheadAttention, nn.GLU)
)  # fmt: skip

_ATTENTION = (nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def axis_names(module: nn.Module, side: str, path: Path, ndim: int, inputs: Names | None) -> Names:
    """Return the axis names for one input or output tensor of a module, with None for each unnamed axis.

    `side` ("in" or "out") and `path` identify the tensor, which has `ndim` axes. `inputs` contains the axis names of
    the module's first input tensor, or is None if the module has no input tensor.
    """
    space, is_elementwise = _traits(cast("Any", type(module)))
    names: Names | None = None
    if space:
        names = _spatial_names(module, space, ndim, inputs)
    elif isinstance(module, nn.Linear) and ndim:
        same = side == "out" and inputs and len(inputs) == ndim
        names = (*(inputs[:-1] if same and inputs else (None,) * (ndim - 1)), "feature")
    elif isinstance(module, nn.RNNBase):
        names = _recurrent_names(module, path, ndim)
    elif isinstance(module, nn.RNNCellBase):
        names = ("batch", "feature")[-ndim:]
    elif isinstance(module, (nn.MultiheadAttention, *_ATTENTION)):
        names = _attention_names(module, side, path, ndim)
    elif side == "out" and inputs is not None:
        names = inputs if is_elementwise else _passed_on(module, inputs)
    return names if names and len(names) == ndim else (None,) * ndim


@functools.lru_cache
def _traits(kind: type) -> tuple[Names, bool]:
    """Return the names of a module type's spatial axes, and whether modules of this type are elementwise."""
    torch_names = (each.__name__ for each in kind.__mro__ if each.__module__.startswith("torch.nn."))
    spatial = next(filter(None, map(_SPATIAL.fullmatch, torch_names)), None)
    return _SPACE[int(spatial[1] or 2)] if spatial else (), issubclass(kind, _ELEMENTWISE)


def _spatial_names(module: nn.Module, space: Names, ndim: int, inputs: Names | None) -> Names | None:
    if isinstance(module, nn.BatchNorm1d) and ndim == 2:
        return inputs if inputs and len(inputs) == 2 and None not in inputs else ("batch", "channel")
    return ("batch", "channel", *space)[-ndim:] if ndim > len(space) else None


def _recurrent_names(module: nn.RNNBase, path: Path, ndim: int) -> Names | None:
    if not all(isinstance(step, Item) for step in path):  # a PackedSequence has no separate batch axis
        return None
    first = "position" if path in ((Item(0),), (Item("input"),)) else "layer"
    if ndim == 2:
        return (first, "feature")
    return ("batch", first, "feature") if module.batch_first and first == "position" else (first, "batch", "feature")


def _attention_names(module: nn.Module, side: str, path: Path, ndim: int) -> Names | None:
    if isinstance(module, nn.MultiheadAttention) and side == "out" and path == (Item(1),):
        return {4: ("batch", "head", "query", "key"), 3: ("batch", "query", "key"), 2: ("query", "key")}.get(ndim)
    if side == "in" and path != (Item(0),):
        return None  # attention masks
    attention = next(child for child in module.modules() if isinstance(child, nn.MultiheadAttention))
    batched = ("batch", "position") if attention.batch_first else ("position", "batch")
    return {3: (*batched, "feature"), 2: ("position", "feature")}.get(ndim)


def _passed_on(module: nn.Module, inputs: Names) -> Names | None:
    if isinstance(module, nn.Embedding):
        return (*inputs, "feature")
    if isinstance(module, nn.Flatten) and inputs:
        start, end = module.start_dim % len(inputs), module.end_dim % len(inputs)
        return (*inputs[:start], "feature", *inputs[end + 1 :])
    return None


_ARITHMETIC = """add sub rsub radd mul rmul div truediv rtruediv true_divide iadd isub imul itruediv neg pos pow abs
    sqrt rsqrt square exp log sign erf sin cos clamp clip minimum maximum lerp"""
_ACTIVATIONS = """relu relu6 gelu silu mish elu selu celu leaky_relu rrelu softplus softsign sigmoid logsigmoid tanh
    hardtanh hardswish hardsigmoid softmax log_softmax"""
_LAYERS = """dropout alpha_dropout feature_dropout layer_norm rms_norm group_norm batch_norm instance_norm normalize"""
_COPIES = """where masked_fill clone contiguous detach to type float half double bfloat16 cuda cpu requires_grad"""

_ELEMENTWISE_FUNCTIONS = frozenset(f"{_ARITHMETIC} {_ACTIVATIONS} {_LAYERS} {_COPIES}".split())


class NamePropagation(TorchFunctionMode):
    """Torch function mode in which elementwise functions propagate axis names from operands to results."""

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[int, tuple[Names, Tensor]] = {}  # by id; storing the tensors keeps the ids valid

    def names(self, tensor: Tensor) -> Names:
        """Return the axis names of a tensor, with None for each unknown name."""
        known, _ = self._named.get(id(tensor), ((), None))
        return known if len(known) == tensor.dim() else (None,) * tensor.dim()

    def learn(self, tensor: Tensor, names: Sequence[str | None]) -> None:
        """Set those axis names of a tensor that are still unknown, and keep the known names."""
        if any(names):
            known = self.names(tensor)
            self.rename(tensor, [a or b for a, b in zip(known, names, strict=True)] if any(known) else names)

    def rename(self, tensor: Tensor, names: Sequence[str | None]) -> None:
        """Set all axis names of a tensor, and override any known names."""
        self._named[id(tensor)] = tuple(names), tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`. If `func` is elementwise, copy axis names to the result from operands with the result's shape."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and getattr(func, "__name__", "").strip("_") in _ELEMENTWISE_FUNCTIONS:
            for operand in (*args, *(kwargs or {}).values()):
                if isinstance(operand, Tensor) and operand.shape == result.shape:
                    self.learn(result, self.names(operand))
        return result
