"""Choose and run a strategy: `fold`, `torch.vmap` over many patches, a loop that skips the prefix, or the plain loop.

A fast strategy is used only if it gives the same numbers as the plain loop. `fold` can run the whole sweep. If `fold`
is not possible, the other strategies run one group of patches at a time. The generator for a fast strategy does not
keep a context open between two outputs, because the plain loop may run in between.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.paths import Path, leaves, replace
from ..engine.sessions import Attached, Session
from ..engine.training import training_modules
from ..errors import EditError, SweepError
from ..labels import labelled
from ..metrics.measured import Metrics
from ..patching.contexts import ContextSession, patched
from ..patching.patch import Patch
from ..registry.names import path_text
from ..registry.sites import Site
from .fold import Fold, close, opaque, raise_nan, unvalidated
from .plan import Entry, Forward, Group, Seen
from .prefix import StrategyError, refused
from .result import Swept

Strategy: TypeAlias = Literal["auto", "fold", "vmap", "resume", "loop"]
_Fast: TypeAlias = Literal["vmap", "resume"]
_Alone: TypeAlias = tuple[Entry, Forward, Any]  # the last item is the loop's output, or None if the loop failed
_COMPARED = 2  # number of patches in each group that the plain loop also runs
_CPU_BYTES = 3 * 2**24  # on a CPU, chunks under vmap that use more memory do not fit into the caches and are slower


@dataclass
class Execution:
    """Run groups of patches, each with the fastest strategy that gives the same numbers as the loop."""

    forward: Forward
    baseline: Any  # the output of the clean run
    strategy: Strategy  # the strategy that the user requested
    max_bytes: int  # memory limit for one batched forward pass
    metrics: Metrics
    advance: Callable[[int], object]  # moves the progress bar
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # metrics of the finished entries, by entry number
    done: dict[int, Swept] = field(default_factory=dict)  # the strategies used for the finished groups, by position

    def __post_init__(self) -> None:
        self._opaque = next((kind for _, kind in opaque(self.baseline)), "")
        self._ends = self.forward.ends()
        self._random = training_modules(self.forward.points.model)

    def run(self, groups: Sequence[Group], seen: Mapping[str, Seen]) -> None:
        """Run all entries and store their metrics."""
        reasons = self._fold(groups, seen) if self.strategy in ("auto", "fold") and not self._random else {}
        for number, group in enumerate(groups):
            if number not in self.done:
                self._run(number, group, reasons.get(number, ""))

    def _fold(self, groups: Sequence[Group], seen: Mapping[str, Seen]) -> dict[int, str]:
        """Fold as many groups as possible. Return the reasons why other groups cannot be folded, by position."""
        fold = Fold(self.forward, self.baseline, seen, self.max_bytes)
        reasons = {number: why for number, group in enumerate(groups) if (why := fold.obstacle(group))}
        folded = {number: group for number, group in enumerate(groups) if number not in reasons}
        count = sum(len(group.entries) for group in folded.values())
        if not folded or (self.strategy == "auto" and count <= _COMPARED):
            return reasons
        chunks, gains = fold.chunks([*folded.values()])
        if self.strategy == "auto" and not gains:
            for number, group in folded.items():
                self._loop(number, group, group.entries, "fold: no speed-up expected for this model")
            return reasons
        try:
            try:
                self._run_fold(fold, chunks, folded)
            except StrategyError:
                if not fold.has_left_out:
                    raise
                fold.repeats_all = True  # the model may have read the number of rows before the patches
                self._run_fold(fold, chunks, folded)
        except StrategyError as fault:
            for place in folded:
                self.done.pop(place, None)
            reasons |= dict.fromkeys(folded, str(fault))
        return reasons

    def _run_fold(self, fold: Fold, chunks: Sequence[Sequence[tuple[Entry, Group]]], folded: dict[int, Group]) -> None:
        """Run all chunks. Compare some entries with the plain loop, and one of them also with a fold of its own."""
        ends = self._drawn(chunks)
        compared = {entry.number for entry, _ in ends}
        count = sum(len(group.entries) for group in folded.values())
        why = f"the {len(compared)} patches checked (of {count}) agree with the loop"
        with self.forward.undisturbed.shared():
            alone = [
                (entry, end, _output_or_none(end, entry))
                for (entry, _), end in zip(ends, itertools.cycle(self._ends), strict=False)
            ]
            apart = self._apart(fold, ends[0], [*folded.values()], alone[:1])
        with self.forward.prefix.wrapped(max(chunk[0][1].skippable for chunk in chunks)):
            for chunk in [chunks[0], *chunks[:0:-1]]:
                for (entry, _), output in zip(chunk, fold.outputs(chunk), strict=True):
                    self._measure(entry, output)
                    if fold.reads:
                        raise StrategyError(f"a metric reads the {fold.reads[0]} in the output")
                    if entry is ends[0][0] and all(_difference(other, output, row) for row, other in apart):
                        raise StrategyError(f"the results for the patch {entry.label!r} depend on other patches")
                    if entry.number in compared:
                        self._compare(entry, output, [each for each in alone if each[0] is entry])
                begun = {id(group) for _, group in chunk}
                for place, group in folded.items():
                    if id(group) in begun:
                        self.done[place] = Swept(group.point.name, len(group.entries), "fold", why)

    def _apart(
        self, fold: Fold, drawn: tuple[Entry, Group], groups: Sequence[Group], alone: Sequence[_Alone]
    ) -> Iterator[tuple[int | None, Any]]:
        """Yield the output for an entry that runs between other values: for one row, then for the whole batch.

        Each item is a pair (row, output). The row is None for the whole batch. A single row is used only if the patch
        changes the row's output, because other rows may not affect a row whose activations are all zero.
        """
        for _, end, output in alone:
            with suppress(Exception):
                if _difference(output, self.baseline, end.row):
                    yield end.row, next(fold.on_row(end, output).outputs([drawn], groups))
        yield None, next(fold.outputs([drawn], groups))

    def _drawn(self, chunks: Sequence[Sequence[tuple[Entry, Group]]]) -> list[tuple[Entry, Group]]:
        """Draw the entries to compare with the plain loop: from the first group, from the last group, and from others.

        The others are one entry for each further number of skipped module calls, because a skipped call may leave data
        for a later module in an object that is not restored.
        """
        random = Random(0)
        first = random.choice([each for each in chunks[0] if each[1] is chunks[0][0][1]])
        last = random.choice([each for each in chunks[-1] if each[1] is chunks[-1][-1][1]])
        if first[0] is last[0] and len(chunks[0]) > 1:
            first, last = random.sample(chunks[0], 2)
        skips = {chunk[0][1].skippable: chunk for chunk in [*chunks, chunks[0]]}
        others = [chunk for chunk in skips.values() if chunk is not chunks[0] and chunk is not chunks[-1]]
        return [first, last, *map(random.choice, others)]

    def _run(self, number: int, group: Group, unfolded: str) -> None:
        """Run all entries in the group at position `number`. `unfolded` is the reason why the group was not folded."""
        name = group.point.name
        order = [group.entries[0], *group.entries[-1:], *group.entries[1:-1]][: len(group.entries)]
        strategies, reasons = self._candidates(group)
        reasons = [f"fold: {unfolded}", *reasons] if unfolded else reasons
        # The plain loop runs two entries, one on the first input and one on the last. The loop runs first, so that the
        # comparison fails if the fast strategy reads state that a forward pass leaves behind.
        pairs = zip((order * 2)[:2], self._ends if strategies and not self._opaque else (), strict=False)
        alone = [(entry, end, _output_or_none(end, entry)) for entry, end in pairs]
        for strategy in strategies:
            failed, why = self._try(strategy, group, order, alone)
            reasons.append(why)
            if failed is None:
                self.done[number] = Swept(name, len(order), strategy, "; ".join(reasons))
                return
            order.sort(key=lambda entry: entry is not failed)  # the failing entry first: it may fail in the loop too
        if self.strategy not in ("auto", "loop"):
            loop(self.forward, order[0])  # if the loop fails too, its error is raised instead
            raise SweepError(
                f"strategy='{self.strategy}' does not work at '{name}': {'; '.join(reasons)}. Use strategy='auto', "
                "which falls back to the loop."
            )
        self._loop(number, group, order, "; ".join(reasons) or "requested")

    def _loop(self, number: int, group: Group, order: Sequence[Entry], why: str) -> None:
        for entry in order:
            self._measure(entry, loop(self.forward, entry))
        self.done[number] = Swept(group.point.name, len(order), "loop", why)

    def _measure(self, entry: Entry, output: Any) -> None:
        """Compute and store the metrics for an entry, replacing any values stored by a strategy that later failed."""
        measured = self.metrics(output)
        self.advance(entry.number not in self.rows)
        self.rows[entry.number] = measured

    def _candidates(self, group: Group) -> tuple[list[_Fast], list[str]]:
        """Return the fast strategies to try, and the reasons why the other fast strategies were ruled out."""
        if self.strategy == "loop" or (self.strategy == "fold" and not self._random):
            return [], []
        if self._random:
            return [], [f"{', '.join(self._random)} in training mode (call model.eval())"]
        if self.strategy == "auto" and len(group.entries) <= _COMPARED:
            return [], [f"too few patches ({len(group.entries)}) for a speed-up"]
        if self.strategy == "resume":
            return ["resume"], []
        resume: list[_Fast] = ["resume"] if self.strategy == "auto" else []
        if self._opaque:
            return resume, [f"vmap: the output contains a {self._opaque}, whose tensors cannot be found"]
        if not group.is_single:
            return resume, ["vmap: patches are at several hook points"]
        return ["vmap", *resume], []

    def _try(
        self, strategy: _Fast, group: Group, order: Sequence[Entry], alone: Sequence[_Alone]
    ) -> tuple[Entry | None, str]:
        """Run the entries with a fast strategy. Return a pair (failed entry or None, reason).

        The reason explains why the strategy was used or, if an entry failed, why the strategy was rejected.
        """
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
        return None, f"the {min(_COMPARED, len(order))} patches checked (of {len(order)}) agree with the loop"

    def _compare(self, entry: Entry, output: Any, alone: Sequence[_Alone]) -> None:
        """Raise StrategyError unless `output` equals the plain loop's output for the entry, up to rounding.

        First, compare the outputs for single inputs. If these differ, compare the outputs for the whole batch, because
        the model or the patch may mix inputs.
        """
        if alone and not any(_difference(expected, output, end.row) for _, end, expected in alone):
            return
        expected = loop(self.forward, entry)
        if self._opaque or next(leaves(self.baseline), None) is None:  # some tensors in the output cannot be compared
            expected, output = (expected, self.metrics(expected)), (output, self.metrics(output))
        difference = _difference(expected, output)
        if difference:
            raise StrategyError(f"the results for the patch {entry.label!r} differ from the loop's ({difference})")


def _output_or_none(forward: Forward, entry: Entry) -> Any:
    with suppress(Exception):  # the whole batch is compared instead
        return loop(forward, entry)


def _difference(expected: Any, output: Any, row: int | None = None) -> str:
    """Describe the first difference between two outputs that is not due to rounding; return "" if the outputs agree.

    If `row` is given, `expected` is the output for that row alone, and only that row of `output` is compared.
    """
    one, other = [*leaves(expected)], [*leaves(output)]
    if not one or [path for path, _ in one] != [path for path, _ in other]:
        return "different tensors"
    for (path, wanted), (_, got) in zip(one, other, strict=True):
        part = got if row is None or not got.dim() else got[row : row + 1]
        alike = part.shape == wanted.shape and part.dtype == wanted.dtype
        if not (alike and close(part, wanted, got)):
            return f"{path_text(path) or 'the output'} differs"
    return ""


def loop(forward: Forward, entry: Entry, *, skip: int = 0) -> Any:
    """Run the model with an entry's patches, skipping the first `skip` module calls, and return the output."""
    with (
        labelled(entry.label),
        forward.running(skip) as run,  # open this first: if hooks are added earlier, each pass needs a new snapshot
        patched(forward.points, entry.patches, check_nan=forward.check_nan),
    ):
        return run.kept(forward.output())


def resumed(forward: Forward, group: Group, entries: Sequence[Entry]) -> Iterator[Any]:
    """Yield the output for each entry, running one entry at a time and skipping the prefix."""
    for entry in entries:
        with refused(but=(EditError,)):
            output = loop(forward, entry, skip=group.skippable)
        yield output


def vmapped(forward: Forward, group: Group, entries: Sequence[Entry], baseline: Any, max_bytes: int) -> Iterator[Any]:
    """Yield the output for each entry, running the suffix for as many entries at once as fit in `max_bytes`."""
    paths = [path for path, _ in leaves(baseline)]
    with refused():
        site = Site(group.point.name)
        clean = forward.until(site, skip=group.skippable)[site]
        if group.point.lens is not None:
            clean = group.point.lens.merge(clean, clean)
    room = min(max_bytes, _CPU_BYTES) if group.on_cpu else max_bytes
    size = max(1, room // max(1, group.bytes_each))  # bytes_each is 0 for activations with zero rows
    for start in range(0, len(entries), size):
        chosen = entries[start : start + size]
        stack = _edited(forward, clean, chosen)
        with refused():
            tensors = _suffixes(forward, group, stack, paths)
            outputs = [baseline] * len(stack)
            for path, tensor in zip(paths, tensors, strict=True):
                outputs = [replace(output, path, row) for output, row in zip(outputs, tensor, strict=True)]
        yield from outputs


def _edited(forward: Forward, clean: Tensor, entries: Sequence[Entry]) -> Tensor:
    """Apply each entry's patches to the clean activation, and stack the results with shape `(entry, *activation)`."""
    stack = clean.new_empty((len(entries), *clean.shape))
    flags: list[tuple[Tensor, Entry, Patch]] = []
    with forward.undisturbed as run:
        for entry, row in zip(entries, stack, strict=True):
            with labelled(entry.label):
                activation, found = forward.fire(entry.patches, clean)
            flags += [(flag, entry, patch) for patch, flag in found]
            if activation is clean:
                raise StrategyError(f"the patch {entry.label!r} returns its input, which might be modified in place")
            row.copy_(activation)
            if not all(patch.runs_only_ours for patch in entry.patches):
                if run.snapshot.changed():
                    raise StrategyError(f"the patch {entry.label!r} changes the model's state during the forward pass")
                run.put_back()
    raise_nan(flags)
    return stack


def _suffixes(forward: Forward, group: Group, stack: Tensor, paths: Sequence[Path]) -> list[Tensor]:
    """Run the suffix on stacked activations; for each path, return the output tensor with shape `(entry, ...)`."""
    session = ContextSession(forward.points)
    waiting: list[Tensor] = []

    def put(leaf: Tensor, session: Session) -> Tensor:
        if not waiting:
            raise StrategyError("the hook point was reached twice")
        return waiting.pop()

    def one(activation: Tensor) -> list[Tensor]:
        waiting.append(activation)
        output = [*leaves(forward.output())]
        if [path for path, _ in output] != paths:
            raise StrategyError("the patched output has tensors in different places than the unpatched output")
        return [leaf for _, leaf in output]

    session.listen(group.point, "patch", put)
    try:
        with forward.running(group.skippable), Attached(session), _vmap_compatible(stack.device):
            tensors = torch.vmap(one)(stack)
        if waiting:
            raise StrategyError("the patch was not reached")
        return [*tensors]
    finally:
        session.let_go()


@contextmanager
def _vmap_compatible(device: torch.device) -> Iterator[None]:
    """Disable fused attention and the argument checks of distributions, because vmap supports neither.

    Inside this context, an error is also raised if vmap would fall back to a slow loop.
    """
    on_cpu = device.type == "cpu"  # on other devices, vmap supports fused attention
    with unvalidated(), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield
