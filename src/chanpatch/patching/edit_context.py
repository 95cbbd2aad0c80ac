"""Information about the current forward pass, for edits and `where` functions."""

from __future__ import annotations

import functools
import hashlib
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.moments import Moment
from ..engine.sessions import Session
from ..errors import BatchAxisError, RolloutError, TraceMismatchError
from ..registry.sites import Positions, Site, no_batch


class Context:
    """Information about the current forward pass, for an edit or a `where` function.

    The values in `rows`, `environments`, `seeds` and `infos` are in the order of the region's rows. Outside a rollout,
    `seeds` and `infos` raise RolloutError.

    Attributes:
        inputs: Tuple of the arguments of the current call to the model; for a policy, the observations come first.
        step: Index of the current step of the rollout; None outside a rollout.
        call: Index of the current call to the module within the current call to the model.
        forward: In a rollout, index of the current call to the model within the step. In a method of a patched policy
            that runs several forward passes, such as `generate`, index of the forward pass. In all other cases, 0.
        label: Name of the policy in paired_rollouts, or label of the patch in rollout_sweep; otherwise None.
    """

    def __init__(self, moment: Moment | Session, site: Site, axis: int | None, leaf: Tensor, kept: Positions) -> None:
        self.moment = moment = moment.moment() if isinstance(moment, Session) else moment
        self.inputs, self.call, self.forward = moment.inputs, moment.call, moment.forward
        self.step, self.label = moment.published.step, moment.published.label
        self._region = site, axis, leaf, kept

    @property
    def rows(self) -> Tensor:
        """Index of each row's episode or, outside a rollout, index of each row: int64 with shape `(row,)`."""
        return self._of_rows(self.moment.published.rows)

    @property
    def environments(self) -> Tensor:
        """Index of each row's sub-environment: int64 with shape `(row,)`. Outside a rollout, equal to `rows`."""
        own = self.moment.published.environments
        return self.rows if own is None else self._of_rows(own)

    @property
    def seeds(self) -> Tensor:
        """Seed of each row's episode: int64 with shape `(row,)`."""
        return torch.tensor(self._in_rollout("seeds")[self.rows.numpy()].astype(np.int64))

    @property
    def infos(self) -> Any:
        """Infos that the environments returned in the last step or reset, restricted to the region's rows."""
        return self._in_rollout("infos")(self.environments.numpy())

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draw random numbers in [0, 1) with shape `(row, *shape)` and the region's dtype and device.

        Outside a rollout, a row's numbers depend only on the site, the call index and the row's index. In a rollout,
        the row's index is replaced by the sampling seed, the step, the episode's seed and the number of earlier
        episodes with the same seed. Repeated calls return the same numbers.
        """
        keys = self.draw_keys(each_step=True) or [(self.call, row) for row in self.rows.tolist()]
        drawn = uniform([(repr(self._region[0]), *key) for key in keys], shape)
        dtype = leaf.dtype if (leaf := self._region[2]).is_floating_point() else torch.get_default_dtype()
        below_one = 1 - torch.finfo(dtype).eps / 2  # half precision would round some draws up to 1
        return torch.from_numpy(drawn).to(leaf.device, dtype).clamp_(max=below_one)

    def draw_keys(self, *, each_step: bool) -> list[tuple[int | None, ...]]:
        """Return one key per row, for the row's random numbers in a rollout. Outside a rollout, return an empty list.

        If `each_step` is True, the keys contain the step, so each step of a rollout has different random numbers.
        """
        if (published := self.moment.published).seeds is None:
            return []
        own = published.sampling_seed, self.step if each_step else None, self.call
        return [(*own, published.seeds[row], published.repetitions[row]) for row in self.rows.tolist()]

    def mask_of(self, where: Callable[[Context], Any]) -> Any:
        """Return the mask that a `where` function returns for this context.

        A function that may have state runs only once for each root call and call index. If several patches use such a
        function, the patches share the mask.
        """
        if state_of(where) is None:
            return where(self)
        masks, key = self.moment.masks, (*call_key(where), self.call)
        if key not in masks:
            masks[key] = where(self)
        return masks[key]

    def _in_rollout(self, name: str) -> Any:
        found = getattr(self.moment.published, name)
        if found is None:
            raise RolloutError(
                f"context.{name} at {self._region[0]!r} is available only in a rollout, as in rollout() or "
                "rollout_sweep()."
            )
        return found

    def _of_rows(self, numbers: NDArray[np.int64] | None) -> Tensor:
        """Return the entries of `numbers` for the region's rows.

        `numbers` contains one number per row of the batch. None stands for 0, 1, 2, ...
        """
        site, axis, leaf, positions = self._region
        if axis is None:
            raise BatchAxisError(f"context.rows at {site!r} needs a known batch axis. {no_batch(site)}")
        batch = leaf.shape[axis]
        each = torch.arange(batch) if numbers is None else torch.tensor(numbers)
        if len(each) != batch:
            raise TraceMismatchError(
                f"{site!r} has {batch} rows along its batch axis, but the model was called with {len(each)} rows. "
                "context.rows needs a site with one row per input."
            )
        chosen = positions.get(axis, slice(None))
        return each[chosen.cpu() if isinstance(chosen, Tensor) else chosen]


def state_of(function: Any) -> Any:
    """Return the object whose state a callable may use: a user's callable object, or the object of a bound method.

    For plain functions, modules, and objects from torch or chanpatch, return None.
    """
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", function)
    if type(owner).__module__.partition(".")[0] in ("chanpatch", "torch") or isinstance(owner, nn.Module):
        return None
    own_call = any(isinstance(vars(kind).get("__call__"), types.FunctionType) for kind in type(owner).__mro__)
    is_method = isinstance(function, types.MethodType) and not isinstance(owner, type)
    return owner if own_call or is_method else None


def call_key(function: Any) -> tuple[object, ...]:
    """Return a key for a callable.

    Two callables have equal keys if they run the same function, or the same method of the same object, with the same
    bound arguments.
    """
    if isinstance(function, functools.partial):
        given = [*function.args, *itertools.chain(*sorted(function.keywords.items()))]
        arguments = (each if isinstance(each, (int, float, str)) else id(each) for each in given)
        return (*call_key(function.func), *arguments)
    method = function if isinstance(function, types.MethodType) else getattr(function, "__call__", function)  # noqa: B004
    return id(getattr(method, "__self__", method)), id(getattr(method, "__func__", method))


def uniform(keys: Sequence[tuple[Any, ...]], shape: Sequence[int] = ()) -> NDArray[np.float64]:
    """Draw random numbers in [0, 1) with shape `(key, *shape)`. The numbers for a key depend only on that key."""
    drawn = np.empty((len(keys), *shape))
    for row, key in enumerate(keys):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        drawn[row] = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(shape)
    return drawn
