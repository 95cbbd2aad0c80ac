"""Donors: during a patched forward pass, run the unpatched model on other inputs, and patch in the activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..engine.calls import Interrupted, Observed, left_twice
from ..engine.inputs import Inputs, batches, copied_inputs
from ..engine.moments import Moment
from ..engine.sessions import Attached, Session, StopForward
from ..engine.state import undisturbed
from ..engine.tree import Tree
from ..errors import EditError, UnreachedError, UnsupportedModelError
from ..registry.points import HookPoints, model_of, resolve
from ..registry.sites import Site, read
from .cache import ActivationCache
from .edit_context import Context, call_key
from .firing import Located
from .patch import Patch

InputsOf: TypeAlias = Callable[[Context], Inputs]


@dataclass(frozen=True, eq=False)
class Donor:
    """Edit that replaces an activation with the activation from a forward pass of the unpatched model on other inputs.

    Args:
        function: Function that maps the context to the inputs for that forward pass.
        sites: Sites of all patches that use this donor. All sites are recorded in the same forward pass.
        forwards: Number of forward passes on donor inputs, for each pair (method of the root call, site reached first).
    """

    function: InputsOf
    sites: tuple[Site, ...] = ()
    forwards: Counter[tuple[str, Site]] = field(default_factory=Counter)

    def __call__(self, activation: Tensor, *, context: Context) -> Tensor:
        """Return the activation from the donor's forward pass. This pass runs when the first of `sites` is reached."""
        site, moment = context._region[0], context.moment
        recorded = moment.masks.setdefault(("donor", id(self)), {})
        if site not in recorded:
            recorded |= _recorded(moment, {site, *self.sites}, *self._arguments(site, context))
            self.forwards[moment.running or "", site] += 1
        if site not in recorded:
            raise UnreachedError(
                f"The forward pass on the donor's inputs did not reach {site!r}. The donor must return inputs for "
                f"which the model's {moment.method}() reaches this site."
            )
        donated: Tensor = recorded[site]
        if donated.shape != activation.shape:
            raise EditError(
                f"{site!r} has shape {tuple(donated.shape)} with the donor's inputs, but {tuple(activation.shape)} in "
                "the patched forward pass. The donor must return inputs with the same shapes as context.inputs."
            )
        return donated

    def _arguments(self, site: Site, context: Context) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Call the donor function. Return copies of the model inputs that it returns, as a pair (args, kwargs)."""
        model, got = context.moment.model, ""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise UnsupportedModelError(
                f"The donor at {site!r} cannot run inside torch.vmap or another transform. Call the model outside vmap."
            )
        if model is None:
            raise EditError(f"The donor at {site!r} needs a call to the whole model, but only a submodule was called.")

        def refuse(model: object, *_: object) -> NoReturn:
            raise EditError(
                f"The donor at {site!r} calls the patched {type(model).__name__}. A donor must only return inputs; "
                "chanpatch then runs the model on these inputs."
            )

        with left_twice(Observed([model_of(model)], on_inputs=refuse)):
            inputs: Any = self.function(context)
        if isinstance(inputs, ActivationCache):
            got = "an ActivationCache. To patch in recorded activations, use patch_in(site, cache)"
        elif not isinstance(inputs, (Tensor, tuple, Mapping)):
            got = type(inputs).__name__
        elif isinstance(inputs, dict) and {*inputs} in [{*each} for each in context.inputs if isinstance(each, dict)]:
            got = "a dict of observations. Return a tuple that contains the dict"
        if got:
            raise EditError(
                f"The donor at {site!r} must return the inputs of a forward pass: a tensor, a tuple of positional "
                f"arguments or a dict of keyword arguments; got {got}."
            )
        return copied_inputs(*next(batches([inputs], 1)))


def joined(patches: Iterable[Patch], forwards: Counter[tuple[str, Site]]) -> tuple[Patch, ...]:
    """Return the patches, changed so that patches with the same donor function share one Donor and one forward pass.

    `forwards` is the counter of forward passes that all donors share.
    """
    each = tuple(patches)
    keys = [call_key(patch.edit.function) if isinstance(patch.edit, Donor) else None for patch in each]
    donors: dict[Any, Donor] = {}
    for key, patch in zip(keys, each, strict=True):
        if isinstance(patch.edit, Donor) and key not in donors:
            sites = [other.site for other, same in zip(each, keys, strict=True) if same == key]
            donors[key] = Donor(patch.edit.function, tuple(sites), forwards)
            forwards.update({("", site): 0 for site in sites})  # so the ledger shows counts of 0, too
    return tuple(Patch(p.site, donors[key], p.where) if key else p for key, p in zip(keys, each, strict=True))


def _recorded(moment: Moment, sites: set[Site], args: Any, kwargs: Any) -> dict[Site, Tensor]:
    """Run the unpatched model without side effects. Return a dict of the activations at the sites that were reached."""
    root, calls, stops = model_of(moment.model), None, False
    if isinstance(moment.model, HookPoints):
        calls, stops = moment.model.calls, moment.model.steady
    run, found = Session(Tree(root), moment.method, calls), dict[Site, Tensor]()

    def record(located: Located, leaf: Tensor, run: Session) -> Tensor:
        located.locate(leaf, run)
        seen = leaf if located._lens is None else located._lens.split(leaf)
        found[located.site] = read(seen, located.positions).clone()
        if stops and len(found) == len(sites):
            run.stop(run)
        return leaf

    for site in sites:
        point = resolve(run.modules, site)
        run.listen(point, "before", partial(record, Located(site, point, run.modules.get(point.module))))
    with left_twice(Interrupted(root)), undisturbed(root), left_twice(Attached(run)), suppress(StopForward):
        getattr(root, moment.method)(*args, **kwargs)
    run.let_go()
    return found
