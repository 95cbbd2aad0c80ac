"""Split a call into parts, and compute the parts in the workers of a `concurrent.futures.Executor`.

A task contains the data for one part. The model and the data that all parts need are identified by digests. A worker
that does not have the bytes for a digest asks for the bytes, so the model is sent about once per worker. Later calls
with the same model do not send the model again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import operator
import os
import pickle
import sys
import traceback
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ChanpatchError, ExecutorError
from .state import random_states, set_random_states, undisturbed

_Item = TypeVar("_Item")
# In a worker: the most recently used models and pickled calls, by digest.
_kept: OrderedDict[str, Any] = OrderedDict()
# In the caller's process: finished results of calls that lost workers, by digest of the call and number of the part.
_unfinished: OrderedDict[str, dict[int, Any]] = OrderedDict()
_MOST_KEPT, _MOST_UNFINISHED = 4, 2
_attempts = itertools.count()


def cut(items: Sequence[_Item], executor: Executor) -> list[Sequence[_Item]]:
    """Split a sequence into contiguous parts of about equal length, with at most two parts per worker."""
    count = min(len(items), 2 * _worker_count(executor))
    ends = [len(items) * number // count for number in range(count + 1)] if count else []
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def _worker_count(executor: Executor) -> int:
    """Return the number of workers in an executor, or the number of CPUs if the number of workers is unknown."""
    if client := getattr(executor, "_client", None):  # dask's executor; each worker runs one task at a time
        return max(1, len(client.nthreads()))
    return getattr(executor, "_max_workers", None) or os.cpu_count() or 1


def spread(
    executor: Executor,
    function: Callable[[Any, Any], Any],
    call: Any,
    parts: Sequence[Any],
    labels: Sequence[Sequence[Any]],
    done: Callable[[int, Any], object],
    *,
    model: nn.Module | None = None,
) -> None:
    """Compute `function(call, part)` in a worker for each part, and pass the results to `done` in this process.

    Args:
        executor: Executor whose workers compute the parts.
        function: Function from chanpatch that computes the result for one part.
        call: Data that all parts need. Each call to `function` receives a new copy.
        parts: Data for each part.
        labels: For each part, the labels of the part's results. An ExecutorError lists the labels of lost results.
        done: Function that receives the number of a part and the part's result. Parts may finish in any order.
        model: Module inside `call`, which is sent separately, so that later calls do not send the module again.

    Raises:
        ExecutorError: If the data cannot be sent, or if workers are lost. After a loss of workers, repeat the call with
            a new executor to compute only the lost parts.
    """
    _check(executor)
    known: dict[int, tuple[str, str]] = {}
    blobs = {}
    if model is not None:
        weights = _packed(model)
        blobs[digest := _digest(weights)] = weights
        named = itertools.chain(model.named_modules(), model.named_parameters(), model.named_buffers())
        known = {id(part): (digest, name) for name, part in named}
    states = random_states(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())  # type: ignore[no-untyped-call]
    pickled = _packed((function, call, _settings(), states), known)
    blobs[_digest(pickled)] = pickled
    tasks = [_packed(part, known) for part in parts]
    key = _digest(*blobs, *tasks)
    finished = {**_unfinished.get(key, {})}
    for number, result in finished.items():
        done(number, result)
    run = _Run(executor, blobs, tasks)
    try:
        for number in range(len(parts)):
            if number not in finished:
                run.submit(number)
        for number, result in run.results():
            finished[number] = result
            done(number, result)
    except BaseException:
        for future in run.waiting:
            future.cancel()
        raise
    if run.lost:
        _unfinished[key] = finished
        while len(_unfinished) > _MOST_UNFINISHED:
            _unfinished.popitem(last=False)
        raise _lost(run.lost, labels)
    _unfinished.pop(key, None)


class _Run:
    """Tasks that compute the parts of one call.

    `waiting` maps each unfinished future to the number of a part. `lost` maps the number of each lost part to an error.
    """

    def __init__(self, executor: Executor, blobs: Mapping[str, bytes], tasks: Sequence[bytes]) -> None:
        self._executor, self._blobs, self._tasks = executor, blobs, tasks
        self.waiting: dict[Future[Any], int] = {}
        self.lost: dict[int, BaseException] = {}
        self._failed: set[int] = set()  # numbers of the parts that were submitted again after a failure
        self._held: list[tuple[int, Sequence[str]]] = []  # (number, digests) of parts whose workers asked for bytes
        self._asked: set[int] = set()  # numbers of the parts whose workers have asked for bytes
        self._unsent = _worker_count(executor)  # number of workers that may not have the bytes yet

    def submit(self, number: int, digests: Sequence[str] = ()) -> None:
        """Submit a task for the part with the given number. Send the bytes for the given digests with the task."""
        sent = {digest: self._blobs.get(digest) if digest in digests else None for digest in self._blobs}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sending large graph")  # from dask, if a model is large
                future = self._executor.submit(_task, sent, self._tasks[number], next(_attempts))
        except Exception as fault:  # the executor is broken or was shut down
            self.lost[number] = fault
        else:
            self.waiting[future] = number

    def results(self) -> Any:
        """Yield pairs (number of the part, result) as the parts finish."""
        while self.waiting:
            for future in wait(self.waiting, return_when=FIRST_COMPLETED).done:
                number = self.waiting.pop(future)
                try:
                    kind, value = future.result()
                except Exception as fault:  # from the executor; the task itself returns its errors
                    if number in self._failed:
                        self.lost[number] = fault
                    else:
                        self._failed.add(number)
                        self.submit(number, [*self._blobs])
                    continue
                if kind == "missing":
                    self._held.append((number, value))
                elif kind == "raised":
                    error, text = _loaded(value)
                    raise error from RuntimeError(f"Traceback in the worker:\n{text}")
                else:
                    yield number, _loaded(value)
            while self._held and (self._unsent or len(self.waiting) < _worker_count(self._executor)):
                self._answer(*self._held.pop(0))

    def _answer(self, number: int, digests: Sequence[str]) -> None:
        """Submit a part again after a worker asked for bytes. Send them unless all workers should already have them."""
        is_sent = self._unsent > 0 or number in self._asked
        self._unsent -= is_sent and self._unsent > 0
        self._asked.add(number)
        self.submit(number, digests if is_sent else ())


def _task(sent: Mapping[str, bytes | None], task: bytes, attempt: int) -> tuple[str, Any]:
    """In a worker, compute one part. Return ("done", result), ("raised", error) or ("missing", digests).

    The result and the error are pickled. The digests identify data that the worker does not have. `attempt` makes the
    arguments unique, because dask does not run a task again with equal arguments.
    """
    with undisturbed(nn.Module()):  # restores random number generators; threads take turns
        torch.set_grad_enabled(True)
        try:
            try:
                if missing := _receive(sent):
                    return "missing", missing
                (function, call, settings, states), part = _loaded(_kept[[*sent][-1]]), _loaded(task)
            except Exception as fault:
                raise ExecutorError(
                    f"A worker could not load the data that it received ({type(fault).__name__}: {fault}). Workers "
                    "must have the same devices as your process, and must be able to import every module that defines "
                    "a function or class that you pass."
                ) from fault
            _compare(settings)
            set_random_states(states, range(len(states) - 3))  # three on the CPU, and one per GPU
            return "done", _packed(function(call, part))
        except Exception as fault:
            return "raised", _packed_error(fault)


def _receive(sent: Mapping[str, bytes | None]) -> list[str]:
    """In a worker, store the model and the call that a task contains. Return the digests that have no stored data."""
    for digest, data in sent.items():
        if data is not None and digest not in _kept:
            is_call = digest == [*sent][-1]
            _kept[digest] = data if is_call else _loaded(data)
    missing = [digest for digest in sent if digest not in _kept]
    for digest in sent.keys() - {*missing}:
        _kept.move_to_end(digest)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return missing


def _packed(tree: Any, known: Mapping[int, tuple[str, str]] | None = None) -> bytes:
    """Pickle nested data. Replace each object whose id is in `known` with (digest of the model, name in the model).

    We use torch.save, because it preserves the sharing of memory, and writes equal bytes for equal tensors.
    """
    base, by_value = _pickler()

    class Pickler(base):  # type: ignore[misc,valid-type]
        def reducer_override(self, item: Any) -> Any:
            if known and id(item) in known:
                return _part_of_model, known[id(item)]
            if isinstance(item, (types.FunctionType, type)) and not (by_value or _is_importable(item)):
                raise _not_importable(item)
            return super().reducer_override(item) if by_value else NotImplemented

    data = io.BytesIO()
    try:
        torch.save(tree, data, types.SimpleNamespace(Pickler=Pickler, __name__="pickle"))
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as fault:
        if isinstance(fault, ChanpatchError):
            raise
        raise ExecutorError(
            "The arguments cannot be sent to workers, because one of them cannot be pickled "
            f"({type(fault).__name__}: {fault}). Remove files, locks and environments from the model, the patches and "
            "the variables that your functions use."
        ) from fault
    return data.getvalue()


def _pickler() -> tuple[Any, bool]:
    """Return a pickler class, and whether this class can pickle functions and classes by value."""
    try:
        import cloudpickle
    except ImportError:
        return pickle.Pickler, False
    return cloudpickle.Pickler, True


def _is_importable(item: Any) -> bool:
    """Return whether a worker can import a function or a class. Workers cannot import from the user's `__main__`."""
    module = sys.modules.get(item.__module__)
    try:
        return item.__module__ != "__main__" and operator.attrgetter(item.__qualname__)(module) is item
    except AttributeError:
        return False


def _not_importable(item: Any) -> ExecutorError:
    kind = "class" if isinstance(item, type) else "function"
    return ExecutorError(
        f"The {kind} {item.__qualname__} in {item.__module__} cannot be sent to workers, because workers cannot import "
        f"it. Define the {kind} at the top level of a file that workers can import, or install cloudpickle: "
        "pip install chanpatch[parallel]"
    )


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _part_of_model(digest: str, name: str) -> Any:
    """In a worker, return the module, parameter or buffer called `name` in the stored model with the given digest."""
    return operator.attrgetter(name)(_kept[digest]) if name else _kept[digest]


def _packed_error(fault: Exception) -> bytes:
    """Pickle an exception and its traceback. If that is impossible, pickle an ExecutorError with the same message."""
    text = "".join(traceback.format_exception(fault))
    try:
        _loaded(data := _packed((fault, text)))
    except Exception:
        data = _packed((ExecutorError(f"{type(fault).__name__}: {fault}"), text))
    return data


def _digest(*data: str | bytes) -> str:
    found = hashlib.sha256()
    for each in data:
        found.update(each.encode() if isinstance(each, str) else each)
    return found.hexdigest()


def _settings() -> dict[str, Any]:
    """Return a dict of the global torch settings that can change results."""
    return {
        "torch.__version__": str(torch.__version__),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.is_autocast_enabled('cuda')": torch.is_autocast_enabled("cuda"),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
    }


def _compare(settings: Mapping[str, Any]) -> None:
    """In a worker, raise ExecutorError if the caller's torch settings differ from the worker's settings."""
    for name, own in _settings().items():
        if settings[name] != own:
            raise ExecutorError(
                f"{name} is {settings[name]} in your process, but {own} in a worker, so results could differ. Use the "
                "same setting in both, for example by passing initializer= to ProcessPoolExecutor."
            )


def _check(executor: Executor) -> None:
    """Raise TypeError if the argument is not an executor. Raise ExecutorError if the executor forks its workers."""
    if not isinstance(executor, Executor):
        raise TypeError(
            "executor= must be a concurrent.futures.Executor, such as a ProcessPoolExecutor or the result of "
            f"get_executor() from a dask Client; got {type(executor).__name__}."
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ExecutorError(
            "The executor forks its worker processes, and torch can hang in a forked process. Spawn the processes: "
            'ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")).'
        )


def _lost(faults: Mapping[int, BaseException], labels: Sequence[Sequence[Any]]) -> ExecutorError:
    """Return the error for lost parts. `faults` maps part numbers to exceptions, and `labels` is as in `spread`."""
    lost = tuple(label for number in sorted(faults) for label in labels[number])
    fault = next(iter(faults.values()))
    named = ", ".join(map(repr, lost[:_SHOWN])) + f" and {len(lost) - _SHOWN} more" * (len(lost) > _SHOWN)
    error = ExecutorError(
        f"The executor lost {len(faults)} of {len(labels)} tasks ({type(fault).__name__}: {fault}), so these results "
        f"were not computed: {named}. Repeat the call with a new executor to compute only the missing results. If the "
        "workers ran out of memory, use fewer workers."
    )
    error.lost = lost
    return error


_SHOWN = 6  # maximum number of labels in an error message
