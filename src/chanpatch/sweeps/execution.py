"""Which strategy a group of patches gets: a fast one only where it gives the numbers of the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from ..engine.paths import _children, leaves
from ..engine.state import training_modules
from ..errors import SweepError
from ..registry.names import path_text
from .forward import Forward
from .plan import Entry, Group
from .prefix import Prefix
from .result import Swept
from .strategies import StrategyError, gains_by_vmap, loop, resumed, vmapped

Strategy: TypeAlias = Literal["auto", "vmap", "resume", "loop"]


Measured: TypeAlias = dict[str, Tensor]


_Alone: TypeAlias = tuple[Entry, Forward, Any]  # an output of the loop on one input; None where that failed


_COMPARED = 2  # patches of each group that are run by the plain loop too


class Execution:
    """Runs groups of patches, each by the fastest strategy that is right.

    Args:
        forward: What is run.
        prefix: What the clean run remembered.
        baseline: Its output.
        strategy: What the user asked for.
        max_bytes: For what one forward of many patches takes.
        metrics: Measures an output.
        keep: Called with each entry and its metrics; again where they turned out to be wrong.
    """

    def __init__(
        self,
        forward: Forward,
        prefix: Prefix,
        baseline: Any,
        strategy: Strategy,
        max_bytes: int,
        metrics: Callable[[Any], Measured],
        keep: Callable[[Entry, Measured], None],
    ) -> None:
        self._forward, self._prefix, self._baseline = forward, prefix, baseline
        self._strategy, self._max_bytes, self._metrics, self._keep = strategy, max_bytes, metrics, keep
        self._opaque = _opaque(baseline)
        self._ends = [] if self._opaque else [row for end in (0, -1) if (row := forward.of_row(end)) is not None]
        self._random = training_modules(forward.model)

    def run(self, group: Group) -> Swept:
        """Run the entries of a group and return how."""
        order = [group.entries[0], *group.entries[-1:], *group.entries[1:-1]][: len(group.entries)]
        reasons: list[str] = []
        alone = self._alone(group, order)
        for strategy in self._candidates(group, alone, reasons):
            failed, why = self._try(strategy, group, order, alone)
            reasons.append(why)
            if failed is None:
                return Swept(group.point.name, len(order), strategy, "; ".join(reasons))
            order.sort(key=lambda entry: entry is not failed)  # what fails in the loop too is then raised at once
        if self._strategy not in ("auto", "loop"):
            loop(self._forward, order[0])  # where the loop fails too, that is the error
            raise SweepError(
                f"strategy='{self._strategy}' is not possible at '{group.point.name}': {'; '.join(reasons)}. Leave "
                "strategy='auto' to fall back on the loop."
            )
        for entry in order:
            self._keep(entry, self._metrics(loop(self._forward, entry)))
        return Swept(group.point.name, len(order), "loop", "; ".join(reasons) or "asked for")

    def _is_small(self, group: Group) -> bool:
        return self._strategy == "auto" and len(group.entries) <= _COMPARED

    def _alone(self, group: Group, order: Sequence[Entry]) -> list[_Alone]:
        """Run the entries that are compared by the plain loop on one input each, the first and the last.

        A fast strategy comes after that, so that where it would read what another forward left on the model, its
        numbers differ.
        """
        if self._strategy == "loop" or self._random or (self._is_small(group) and not group.skippable):
            return []
        entries = [order[0], order[min(1, len(order) - 1)]]
        return [(entry, end, _output_or_none(end, entry)) for entry, end in zip(entries, self._ends, strict=False)]

    def _candidates(
        self, group: Group, alone: Sequence[_Alone], reasons: list[str]
    ) -> Iterator[Literal["vmap", "resume"]]:
        """Yield the fast strategies that are worth a try; say why others are not."""
        if self._strategy == "loop":
            return
        if self._random:
            reasons.append(f"{', '.join(self._random)} in training mode (model.eval() ends it)")
            return
        small = self._is_small(group)
        if small and not (alone and all(output is not None for *_, output in alone)):
            reasons.append(f"{len(group.entries)} patches are too few to gain anything")
            return
        if self._strategy in ("auto", "vmap") and not small:
            if self._opaque:
                reasons.append(f"vmap: the output holds a {self._opaque}, in which tensors cannot be found")
            elif not group.alike:
                reasons.append("vmap: what the patches do later differs")
            elif self._strategy == "auto" and not gains_by_vmap(group):
                reasons.append("vmap: activations so large gain nothing by it on a CPU")
            else:
                yield "vmap"
        if self._strategy in ("auto", "resume"):
            yield "resume"

    def _try(
        self, strategy: Literal["vmap", "resume"], group: Group, order: Sequence[Entry], alone: Sequence[_Alone]
    ) -> tuple[Entry | None, str]:
        """Run the entries by a fast strategy; return the entry at which it failed, if any, and why."""
        outputs = (
            vmapped(self._forward, self._prefix, group, order, self._baseline, self._max_bytes)
            if strategy == "vmap"
            else resumed(self._forward, self._prefix, group, order)
        )
        for number, entry in enumerate(order):
            try:
                output = next(outputs)
                if number < _COMPARED:
                    self._compare(entry, output, [each for each in alone if each[0] is entry])
            except StrategyError as fault:
                return entry, f"{strategy}: {fault}"
            self._keep(entry, self._metrics(output))
        return None, f"{min(_COMPARED, len(order))} of {len(order)} patches agree with the loop"

    def _compare(self, entry: Entry, output: Any, alone: Sequence[_Alone]) -> None:
        """Raise unless the plain loop gives the same output, to rounding.

        One input tells, where the loop can be run on one; where that differs, the model may treat the inputs of a batch
        together, or the patch may be made for all of them, so that the whole batch has to be run.
        """
        if alone and not any(_difference(expected, output, end.row) for _, end, expected in alone):
            return
        expected = loop(self._forward, entry)
        untold = self._opaque or next(leaves(self._baseline), None) is None  # then only the metrics tell
        difference = (
            _difference((expected, self._metrics(expected)), (output, self._metrics(output)))
            if untold
            else _difference(expected, output)
        )
        if difference:
            raise StrategyError(f"not the numbers of the loop at {entry.label!r} ({difference})")


def _output_or_none(forward: Forward, entry: Entry) -> Any:
    try:
        return loop(forward, entry)
    except Exception:  # whatever it is: the whole batch tells
        return None


def _difference(expected: Any, output: Any, row: int | None = None) -> str:
    """Return where two outputs differ by more than rounding, or nothing.

    Args:
        expected: Of the plain loop.
        output: Of a fast strategy.
        row: Which row of `output` is expected; all where None.
    """
    one, other = [*leaves(expected)], [*leaves(output)]
    if not one or [path for path, _ in one] != [path for path, _ in other]:
        return "other tensors"
    for (path, wanted), (_, got) in zip(one, other, strict=True):
        part = got if row is None or not got.dim() else got[row : row + 1]
        alike = part.shape == wanted.shape and part.dtype == wanted.dtype
        if not (alike and _close(part, wanted, max(_largest(got), _largest(wanted)))):
            return f"{path_text(path) or 'the output'} differs"
    return ""


def _close(got: Tensor, wanted: Tensor, scale: float) -> bool:
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(got, wanted)
    half = wanted.dtype in (torch.float16, torch.bfloat16)  # where rounding is as large as what a patch may do
    tolerance = 0.0 if half else 100 * torch.finfo(wanted.dtype).eps  # the sums of a long layer lose some digits
    return torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


_MASK = 1e4  # numbers from here on, such as the -1e8 of a forbidden action, say nothing of how exact the others are


def _largest(tensor: Tensor) -> float:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    absolute = tensor.abs()
    usual = absolute[absolute < _MASK]
    return float(usual.max()) if usual.numel() else 0.0


def _opaque(tree: Any) -> str:
    """Return the type of something in an output that may hold tensors where they are not found, or nothing."""
    children = [child for _, child in _children(tree)]
    if isinstance(tree, TransformedDistribution) or not (children or isinstance(tree, _PLAIN)):
        return type(tree).__name__
    return next(filter(None, map(_opaque, children)), "")


_PLAIN = (Tensor, str, bytes, int, float, complex, type(None), tuple, list, Mapping, torch.dtype, torch.device)
