"""Three ways to run the same patches: the plain loop, a loop that skips the prefix, and `torch.vmap` over many patches.

A fast strategy is used for a group of patches only if it gives the same numbers as the plain loop. The generator for a
fast strategy does not keep a context open between two outputs, because the plain loop may run in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.paths import Path, _children, leaves, replace
from ..engine.sessions import Attached, Session
from ..engine.state import training_modules
from ..errors import EditError, NaNError, SweepError
from ..labels import labelled
from ..metrics.measured import Metrics
from ..patching.contexts import Patching, nan_error, patched
from ..patching.patch import Patch
from ..registry.names import path_text
from ..registry.sites import Site
from .plan import Entry, Forward, Group
from .prefix import StrategyError
from .result import Swept

Strategy: TypeAlias = Literal["auto", "vmap", "resume", "loop"]
_Fast: TypeAlias = Literal["vmap", "resume"]
_Alone: TypeAlias = tuple[Entry, Forward, Any]  # the last item is the loop's output, or None if the loop failed
_COMPARED = 2  # number of patches in each group that the plain loop also runs
_MASK = 1e4  # larger values, such as -1e8 for a forbidden action, do not count in the scale of the rounding error
_CPU_BYTES = 3 * 2**24  # on a CPU, chunks that use more memory do not fit into the caches and are slower
_FEWEST = 8  # minimum number of patches per chunk for a speed-up on a CPU, where vmap disables fused attention


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
    done: list[Swept] = field(default_factory=list)  # the strategies used for the finished groups

    def __post_init__(self) -> None:
        self._opaque = _opaque(self.baseline)
        self._ends = [] if self._opaque else self.forward.ends()
        self._random = training_modules(self.forward.points.model)

    def run(self, group: Group) -> None:
        """Run all entries in a group and store their metrics."""
        name = group.point.name
        order = [group.entries[0], *group.entries[-1:], *group.entries[1:-1]][: len(group.entries)]
        is_small = self.strategy == "auto" and len(order) <= _COMPARED
        strategies, reasons = self._candidates(group, is_small=is_small)
        # The plain loop runs two entries, one on the first input and one on the last. The loop runs first, so that the
        # comparison fails if the fast strategy reads state that a forward pass leaves behind.
        pairs = zip((order * 2)[:2], self._ends if strategies else (), strict=False)
        alone = [(entry, end, _output_or_none(end, entry)) for entry, end in pairs]
        if is_small and not reasons and not (alone and all(output is not None for *_, output in alone)):
            strategies, reasons = [], [f"too few patches ({len(order)}) for a speed-up"]
        for strategy in strategies:
            failed, why = self._try(strategy, group, order, alone)
            reasons.append(why)
            if failed is None:
                self.done.append(Swept(name, len(order), strategy, "; ".join(reasons)))
                return
            order.sort(key=lambda entry: entry is not failed)  # the failing entry first: it may fail in the loop too
        if self.strategy not in ("auto", "loop"):
            loop(self.forward, order[0])  # if the loop fails too, its error is raised instead
            raise SweepError(
                f"strategy='{self.strategy}' does not work at '{name}': {'; '.join(reasons)}. Use strategy='auto', "
                "which falls back to the loop."
            )
        for entry in order:
            self._measure(entry, loop(self.forward, entry))
        self.done.append(Swept(name, len(order), "loop", "; ".join(reasons) or "requested"))

    def _measure(self, entry: Entry, output: Any) -> None:
        """Compute and store the metrics for an entry, replacing any values stored by a strategy that later failed."""
        measured = self.metrics(output)
        self.advance(entry.number not in self.rows)
        self.rows[entry.number] = measured

    def _candidates(self, group: Group, *, is_small: bool) -> tuple[list[_Fast], list[str]]:
        """Return the fast strategies to try, and the reasons why the other fast strategies were ruled out."""
        if self.strategy == "loop":
            return [], []
        if self._random:
            return [], [f"{', '.join(self._random)} in training mode (call model.eval())"]
        if is_small:
            return (["resume"] if group.skippable else []), []
        if self.strategy == "resume":
            return ["resume"], []
        resume: list[_Fast] = ["resume"] if self.strategy == "auto" else []
        if self._opaque:
            return resume, [f"vmap: the output contains a {self._opaque}, whose tensors cannot be found"]
        if group.later is None:
            return resume, ["vmap: the entries have different patches at later hook points"]
        if resume and group.on_cpu and _FEWEST * group.bytes_each > _CPU_BYTES:
            return resume, ["vmap: no speed-up on a CPU for activations this large"]
        return ["vmap", *resume], []

    def _try(
        self, strategy: _Fast, group: Group, order: Sequence[Entry], alone: Sequence[_Alone]
    ) -> tuple[Entry | None, str]:
        """Run the entries with a fast strategy, and return (failed entry or None, reason for rejecting or using it)."""
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
        """Raise StrategyError unless the plain loop gives the same output, up to rounding.

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
            raise StrategyError(f"the results differ from the loop's at {entry.label!r} ({difference})")


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
        if not (alike and _close(part, wanted, got)):
            return f"{path_text(path) or 'the output'} differs"
    return ""


def _close(part: Tensor, wanted: Tensor, whole: Tensor) -> bool:
    """Return whether `part` equals `wanted` up to rounding error, given the `whole` output that contains `part`."""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(part, wanted)
    half = wanted.dtype in (torch.float16, torch.bfloat16)  # here, rounding may be as large as a patch's effect
    tolerance = 0.0 if half else 100 * torch.finfo(wanted.dtype).eps  # long sums lose a few digits
    usual = [each[each < _MASK] for each in (whole.abs(), wanted.abs())]
    scale = max((float(each.max()) for each in usual if each.numel()), default=0.0)
    return torch.allclose(part, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _opaque(tree: Any) -> str:
    """Return the type name of the first object in an output that may contain hidden tensors, or ""."""
    children = [child for _, child in _children(tree)]
    if isinstance(tree, TransformedDistribution) or not (children or isinstance(tree, _PLAIN)):
        return type(tree).__name__
    return next(filter(None, map(_opaque, children)), "")


_PLAIN = (Tensor, str, bytes, int, float, complex, type(None), tuple, list, Mapping, torch.dtype, torch.device)


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
        with _refused(but=EditError):
            output = loop(forward, entry, skip=group.skippable)
        yield output


def vmapped(forward: Forward, group: Group, entries: Sequence[Entry], baseline: Any, max_bytes: int) -> Iterator[Any]:
    """Yield the output for each entry, running the suffix for as many entries at once as fit in `max_bytes`."""
    paths = [path for path, _ in leaves(baseline)]
    with _refused():
        site = Site(group.point.name)
        clean = forward.until(site, skip=group.skippable)[site]
        if group.point.lens is not None:
            clean = group.point.lens.merge(clean, clean)
    room = min(max_bytes, _CPU_BYTES) if group.on_cpu else max_bytes
    size = max(1, room // max(1, group.bytes_each))  # bytes_each is 0 for activations with zero rows
    for start in range(0, len(entries), size):
        chosen = entries[start : start + size]
        stack = _edited(forward, group, clean, chosen)
        with _refused(but=NaNError):
            tensors = _suffixes(forward, group, chosen, stack, paths)
            outputs = [baseline] * len(stack)
            for path, tensor in zip(paths, tensors, strict=True):
                outputs = [replace(output, path, row) for output, row in zip(outputs, tensor, strict=True)]
        yield from outputs


@contextmanager
def _refused(*, but: type[Exception] = StrategyError) -> Iterator[None]:
    """Convert all errors raised inside this context to StrategyError, except errors of type `but`."""
    try:
        yield
    except (but, StrategyError):
        raise
    except Exception as fault:
        raise StrategyError(str(fault).partition("\n")[0] or type(fault).__name__) from fault


def _edited(forward: Forward, group: Group, clean: Tensor, entries: Sequence[Entry]) -> Tensor:
    """Apply each entry's patches at the group's hook point, and stack the results with shape `(entry, *activation)`."""
    stack = clean.new_empty((len(entries), *clean.shape))
    flags: list[_Flag] = []
    with forward.undisturbed as run:
        for entry, row in zip(entries, stack, strict=True):
            patches = group.first(entry)
            with labelled(entry.label):
                activation, found = forward.fire(patches, clean)
            flags += [(flag, entry, patch) for patch, flag in found]
            if activation is clean:
                raise StrategyError(f"{entry.label!r} returns its input tensor, which may later be modified in place")
            row.copy_(activation)
            if not all(patch.runs_only_ours for patch in patches):
                if run.snapshot.changed():
                    raise StrategyError(f"{entry.label!r} changes the model's state during the forward pass")
                run.put_back()
    _raise_nan(flags)
    return stack


_Flag: TypeAlias = tuple[Tensor, Entry, Patch]  # the tensor is True if the patch introduced NaN for the entry


def _raise_nan(flags: Sequence[_Flag]) -> None:
    """Raise NaNError for the first patch that introduced NaN. If no patch did, the device is read only once."""
    if flags and torch.stack([flag for flag, *_ in flags]).any():
        entry, patch = next((entry, patch) for flag, entry, patch in flags if flag)
        with labelled(entry.label):
            raise nan_error(patch)


def _suffixes(
    forward: Forward, group: Group, entries: Sequence[Entry], stack: Tensor, paths: Sequence[Path]
) -> list[Tensor]:
    """Run the suffix on stacked activations; for each path, return the output tensor with shape `(entry, ...)`."""
    session = Patching(forward.points, group.later or (), check_nan=forward.check_nan)
    waiting: list[Tensor] = []

    def put(leaf: Tensor, session: Session) -> Tensor:
        if not waiting:
            raise StrategyError("the hook point ran twice")
        return waiting.pop()

    def one(activation: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        waiting.append(activation)
        output = [*leaves(forward.output())]
        if [path for path, _ in output] != paths:
            raise StrategyError("the patched output has tensors in different places than the unpatched output")
        flags = [firing.nan for firing in session.firings if firing.nan is not None]
        return [leaf for _, leaf in output], flags

    session.listen(group.point, "patch", put)
    try:
        with forward.running(group.skippable), Attached(session), _vmap_compatible(stack.device):
            tensors, nan = torch.vmap(one)(stack)
        if waiting or session.unreached():
            raise StrategyError("a patch was not reached")
        flagged = [firing.patch for firing in session.firings if firing.nan is not None]
        for patch, flags in zip(flagged, nan, strict=True):
            _raise_nan([(flag, entry, patch) for flag, entry in zip(flags, entries, strict=True)])
        return [*tensors]
    finally:
        session.let_go()


@contextmanager
def _vmap_compatible(device: torch.device) -> Iterator[None]:
    """Disable fused attention and the argument checks of distributions, because vmap supports neither.

    Inside this context, an error is also raised if vmap would fall back to a slow loop.
    """
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    on_cpu = device.type == "cpu"  # on other devices, vmap supports fused attention
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            warnings.filterwarnings("error", message="There is a performance drop")
            yield
    finally:
        Distribution.set_default_validate_args(validates)
