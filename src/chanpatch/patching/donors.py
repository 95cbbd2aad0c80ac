"""Donors: activations from another forward pass of the model, which runs in the middle of the patched forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..engine.calls import Interrupted, Observed
from ..engine.inputs import Inputs, batches, copied_inputs
from ..engine.sessions import Attached, Session, StopForward
from ..engine.state import undisturbed
from ..errors import EditError, UnreachedError, UnsupportedModelError
from ..registry.points import HookPoints, model_of, resolve, root_of
from ..registry.sites import Site, read
from .cache import ActivationCache
from .edit_context import Context, call_key
from .firing import Located
from .patch import Patch


class Donor:
    """Set the activation to the activation in a forward pass of the unpatched model on other inputs.

    The forward pass runs without gradients and has no side effects.

    Args:
        function: Function that maps the context to the inputs of the forward pass.
        sites: Other sites to record in the same forward pass.
        forwards: Counts the forward passes by method and site.
    """

    def __init__(
        self,
        function: Callable[[Context], Inputs],
        sites: Iterable[Site] = (),
        forwards: Counter[tuple[str, Site]] | None = None,
    ) -> None:
        self.function, self._sites = function, tuple(sites)
        self._forwards = Counter[tuple[str, Site]]() if forwards is None else forwards

    def __reduce__(self) -> tuple[Any, ...]:
        return Donor, (self.function,)

    def __call__(self, activation: Tensor, *, context: Context) -> Tensor:
        """Return the donor's activation, which must have the shape of the patched activation."""
        site, batch_axis, *_ = context._region
        recorded = context.moment.masks.setdefault(("donor", id(self)), {})
        if site not in recorded:
            recorded |= self._recorded(site, context)
            self._forwards[context.moment.running or "", site] += 1
        if site not in recorded:
            raise UnreachedError(
                f"The donor's forward pass did not reach {site!r}. Return inputs for {context.moment.method}(), for "
                "which the model runs this module."
            )
        donated: Tensor = recorded[site]
        if donated.shape != activation.shape:
            shapes = f"{tuple(donated.shape)} with the donor's inputs, but {tuple(activation.shape)}"
            rows = batch_axis is not None and donated.shape[batch_axis] != activation.shape[batch_axis]
            advice = "one row for each row of context.inputs" if rows else "inputs with the lengths of context.inputs"
            raise EditError(f"{site!r} has shape {shapes} in the patched forward pass. A donor must return {advice}.")
        return donated

    def _recorded(self, site: Site, context: Context) -> dict[Site, Tensor]:
        """Run the donor's forward pass, and return the activation at each site."""
        moment = context.moment
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise UnsupportedModelError(f"The donor at {site!r} cannot run inside torch.vmap or another transform.")
        if moment.model is None:
            raise EditError(
                f"The donor at {site!r} needs a call to the patched model, but only a submodule was called. Call the "
                "model."
            )
        model = model_of(moment.model)
        with Observed([model], on_inputs=partial(_refuse_call, site)):
            inputs = self.function(context)
        args, kwargs = copied_inputs(*_arguments(inputs, site, context))
        try:
            with Interrupted(model), undisturbed(model):
                return _Run(moment.model, moment.method, dict.fromkeys((site, *self._sites))).recorded(args, kwargs)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11 and later
                error.add_note(f"Raised in the forward pass of the donor at {site!r}.")
            raise


def joined(patches: Iterable[Patch], forwards: Counter[tuple[str, Site]]) -> tuple[Patch, ...]:
    """Let patches with the same donor function share one forward pass; `forwards` counts the forward passes."""
    each = tuple(patches)
    keys = {patch: call_key(patch.edit.function) for patch in each if isinstance(patch.edit, Donor)}
    forwards.update({("", patch.site): 0 for patch in keys})  # so that the ledger shows the count
    shared: dict[Patch, Donor] = {}
    for key in set(keys.values()):
        alike = [patch for patch in keys if keys[patch] == key]
        function: Any = alike[0].edit
        shared |= dict.fromkeys(alike, Donor(function.function, [patch.site for patch in alike], forwards))
    return tuple(Patch(patch.site, shared[patch], patch.where) if patch in shared else patch for patch in each)


def _refuse_call(site: Site, model: object, *_: object) -> NoReturn:
    raise EditError(
        f"The donor at {site!r} calls the patched {type(model).__name__}. A donor must only return inputs; chanpatch "
        "runs the model on them."
    )


def _arguments(inputs: Any, site: Site, context: Context) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the positional and keyword arguments that a donor's inputs stand for."""
    fault = ""
    if isinstance(inputs, ActivationCache):
        fault = "an ActivationCache. To patch in recorded activations, use patch_in(site, cache)"
    elif not isinstance(inputs, (Tensor, tuple, Mapping)):
        fault = type(inputs).__name__
    elif isinstance(inputs, dict) and any(isinstance(each, dict) and {*each} == {*inputs} for each in context.inputs):
        fault = "a dict of observations. Return a tuple that contains the dict"
    if fault:
        raise EditError(
            f"The donor at {site!r} must return the inputs of a forward pass: a tensor, a tuple of positional "
            f"arguments, or a dict of keyword arguments; got {fault}."
        )
    return next(batches([inputs], 1))


class _Run(Session):
    """Session that records sites in the donor's forward pass."""

    confined = True

    def __init__(self, points_or_model: Any, method: str, sites: Iterable[Site]) -> None:
        root, _, calls = root_of(points_or_model)
        super().__init__(root, method, calls)
        self._found: dict[Site, Tensor] = {}
        self._stops = isinstance(points_or_model, HookPoints) and points_or_model.steady
        for site in sites:
            point = resolve(self.modules, site)
            self.listen(point, "before", partial(self._record, Located(site, point, self.modules.get(point.module))))

    def recorded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Site, Tensor]:
        """Run the model, and return the activation at each site that the model reached."""
        with Attached(self):
            try:
                getattr(self.root, self.method)(*args, **kwargs)
            except StopForward as ended:
                if ended.args != (self,):
                    raise
        self.let_go()
        return self._found

    def _record(self, located: Located, leaf: Tensor, session: Session) -> Tensor:
        located.locate(leaf, session)
        self._found[located.site] = read(leaf, located.positions).clone()
        if self._stops and len(self._found) == len(self.listeners):
            self.stop(self)
        return leaf
