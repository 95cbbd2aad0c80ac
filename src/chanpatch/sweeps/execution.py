"""Choice of a strategy for each group of patches: a fast one must give the numbers of the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from ..engine.paths import _children, leaves
from ..engine.state import training_modules
from ..errors import SweepError
from ..metrics.measured import Metrics
from ..registry.names import path_text
from .forward import Forward
from .plan import Entry, Group
from .prefix import StrategyError
from .result import Swept
from .strategies import gains_by_vmap, loop, resumed, vmapped

Strategy: TypeAlias = Literal["auto", "vmap", "resume", "loop"]
_Fast: TypeAlias = Literal["vmap", "resume"]
_Alone: TypeAlias = tuple[Entry, Forward, Any]  # the output of the loop on one input; None if that failed
_COMPARED = 2  # patches of each group that the plain loop runs too
_MASK = 1e4  # larger numbers, such as the -1e8 of a forbidden action, do not set the scale of rounding


@dataclass
class Execution:
    """Run groups of patches, each by the fastest strategy that gives the numbers of the loop."""

    forward: Forward
    baseline: Any  # the output of the clean run
    strategy: Strategy  # that the user asked for
    max_bytes: int  # for one forward of many patches
    metrics: Metrics
    advance: Callable[[int], object]  # moves the progress bar
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # the metrics of finished entries, by number
    done: list[Swept] = field(default_factory=list)  # how the finished groups were run

    def __post_init__(self) -> None:
        self._opaque = _opaque(self.baseline)
        self._ends = [] if self._opaque else self.forward.ends()
        self._random = training_modules(self.forward.points.model)

    def run(self, group: Group) -> None:
        """Run the entries of a group."""
        name = group.point.name
        order = [group.entries[0], *group.entries[-1:], *group.entries[1:-1]][: len(group.entries)]
        alone = self._alone(group, order)
        strategies, reasons = self._candidates(group, alone)
        for strategy in strategies:
            failed, why = self._try(strategy, group, order, alone)
            reasons.append(why)
            if failed is None:
                self.done.append(Swept(name, len(order), strategy, "; ".join(reasons)))
                return
            order.sort(key=lambda entry: entry is not failed)  # if the loop fails there too, it raises at once
        if self.strategy not in ("auto", "loop"):
            loop(self.forward, order[0])  # if the loop fails too, that is the error
            raise SweepError(
                f"strategy='{self.strategy}' is not possible at '{name}': {'; '.join(reasons)}. Leave "
                "strategy='auto' to fall back on the loop."
            )
        for entry in order:
            self._measure(entry, loop(self.forward, entry))
        self.done.append(Swept(name, len(order), "loop", "; ".join(reasons) or "asked for"))

    def _measure(self, entry: Entry, output: Any) -> None:
        """Keep the metrics of an entry, in place of those of a strategy that failed."""
        measured = self.metrics(output)
        self.advance(entry.number not in self.rows)
        self.rows[entry.number] = measured

    def _is_small(self, group: Group) -> bool:
        return self.strategy == "auto" and len(group.entries) <= _COMPARED

    def _alone(self, group: Group, order: Sequence[Entry]) -> list[_Alone]:
        """Run two entries by the plain loop, one on the first input and one on the last.

        This comes before the fast strategy, whose numbers then differ if it reads anything that a forward left behind.
        """
        if self.strategy == "loop" or self._random or (self._is_small(group) and not group.skippable):
            return []
        entries = [order[0], order[min(1, len(order) - 1)]]
        return [(entry, end, _output_or_none(end, entry)) for entry, end in zip(entries, self._ends, strict=False)]

    def _candidates(self, group: Group, alone: Sequence[_Alone]) -> tuple[list[_Fast], list[str]]:
        """Return the fast strategies to try, and the reasons against the others."""
        if self.strategy == "loop":
            return [], []
        if self._random:
            return [], [f"{', '.join(self._random)} in training mode (model.eval() ends it)"]
        if self._is_small(group):
            if alone and all(output is not None for *_, output in alone):
                return ["resume"], []
            return [], [f"{len(group.entries)} patches are too few to gain anything"]
        if self.strategy == "resume":
            return ["resume"], []
        resume: list[_Fast] = ["resume"] if self.strategy == "auto" else []
        if self._opaque:
            return resume, [f"vmap: the output holds a {self._opaque}, in which tensors cannot be found"]
        if group.later is None:
            return resume, ["vmap: the patches at later hook points differ"]
        if self.strategy == "auto" and not gains_by_vmap(group):
            return resume, ["vmap: activations so large gain nothing by it on a CPU"]
        return ["vmap", *resume], []

    def _try(
        self, strategy: _Fast, group: Group, order: Sequence[Entry], alone: Sequence[_Alone]
    ) -> tuple[Entry | None, str]:
        """Run the entries by a fast strategy; return the entry at which it failed, if any, and why."""
        if strategy == "vmap":
            outputs = vmapped(self.forward, group, order, self.baseline, self.max_bytes)
        else:
            outputs = resumed(self.forward, group, order)
        for number, entry in enumerate(order):
            try:
                output = next(outputs)
                if number < _COMPARED:
                    self._compare(entry, output, [each for each in alone if each[0] is entry])
            except StrategyError as fault:
                return entry, f"{strategy}: {fault}"
            self._measure(entry, output)
        return None, f"{min(_COMPARED, len(order))} of {len(order)} patches agree with the loop"

    def _compare(self, entry: Entry, output: Any, alone: Sequence[_Alone]) -> None:
        """Raise unless the plain loop gives the same output, up to rounding.

        If the outputs of one input differ, the loop runs the whole batch: the model or the patch may depend on it.
        """
        if alone and not any(_difference(expected, output, end.row) for _, end, expected in alone):
            return
        expected = loop(self.forward, entry)
        if self._opaque or next(leaves(self.baseline), None) is None:  # then the metrics have to agree too
            expected, output = (expected, self.metrics(expected)), (output, self.metrics(output))
        difference = _difference(expected, output)
        if difference:
            raise StrategyError(f"not the numbers of the loop at {entry.label!r} ({difference})")


def _output_or_none(forward: Forward, entry: Entry) -> Any:
    with suppress(Exception):  # then the whole batch is compared
        return loop(forward, entry)


def _difference(expected: Any, output: Any, row: int | None = None) -> str:
    """Return where an output, or a row of it, differs beyond rounding; an empty text if it does not."""
    one, other = [*leaves(expected)], [*leaves(output)]
    if not one or [path for path, _ in one] != [path for path, _ in other]:
        return "other tensors"
    for (path, wanted), (_, got) in zip(one, other, strict=True):
        part = got if row is None or not got.dim() else got[row : row + 1]
        alike = part.shape == wanted.shape and part.dtype == wanted.dtype
        if not (alike and _close(part, wanted, got)):
            return f"{path_text(path) or 'the output'} differs"
    return ""


def _close(part: Tensor, wanted: Tensor, whole: Tensor) -> bool:
    """Return whether a part of a whole output is as wanted, up to rounding; the whole sets the scale."""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(part, wanted)
    half = wanted.dtype in (torch.float16, torch.bfloat16)  # whose rounding may be as large as the effect of a patch
    tolerance = 0.0 if half else 100 * torch.finfo(wanted.dtype).eps  # the sums of a long layer lose some digits
    usual = [each[each < _MASK] for each in (whole.abs(), wanted.abs())]
    scale = max((float(each.max()) for each in usual if each.numel()), default=0.0)
    return torch.allclose(part, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _opaque(tree: Any) -> str:
    """Return the type of an object in an output that may hide tensors; "" without one."""
    children = [child for _, child in _children(tree)]
    if isinstance(tree, TransformedDistribution) or not (children or isinstance(tree, _PLAIN)):
        return type(tree).__name__
    return next(filter(None, map(_opaque, children)), "")


_PLAIN = (Tensor, str, bytes, int, float, complex, type(None), tuple, list, Mapping, torch.dtype, torch.device)
