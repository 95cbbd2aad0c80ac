"""Check that a policy and its twin have equal settings: flags, numbers, strings, and containers of these."""

from __future__ import annotations

import copy
import operator
import reprlib
from collections import deque
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError


class Settings:
    """Module attributes that must be equal in a twin and in its original policy.

    A setting is an attribute whose value is a bool, int, float, str or None, or a container of at most 64 such values.
    For any other attribute, we check only that the value is a function in both modules or in neither. We skip modules
    without parameters, attributes that torch sets, and attributes that change during the first call to any method or
    submodule.
    """

    def __init__(self, twin: nn.Module, original: nn.Module) -> None:
        self._modules = [
            (name, vars(module), vars(other), type(other))
            for (name, module), other in zip(twin.named_modules(), original.modules(), strict=True)
            if next(other.parameters(), None) is not None
        ]
        self._changing: set[tuple[str, str]] = set()  # (module name, attribute name) for attributes that calls change
        self._known_calls: dict[object, bool] = {}  # whether each kind of call runs modules
        self._before: dict[tuple[str, str], Any] | None = None  # the twin's settings, saved before a first call
        self._plan()

    def begin(self, kind: object) -> None:
        """Before a call, raise an error if a setting differs between the twin and the policy.

        `kind` identifies the called method or submodule. Before the first call to that method or submodule, only save
        the twin's settings; in this case, `end` does the check after the call.
        """
        self._before = None if kind in self._known_calls else self._of_twin()
        if self._known_calls.get(kind) and not self._is_equal():
            self._compare()

    def end(self, kind: object, *, runs_modules: bool) -> None:
        """After the first call to a method or submodule, record which settings the call changed, and check the others.

        Settings that the call did not change must be equal in the twin and the policy. If the call cannot run modules
        (`runs_modules` is False), check nothing.
        """
        if self._before is None and runs_modules and not self._known_calls[kind]:
            del self._known_calls[kind]  # treat the next call as the first of its kind
        elif self._before is not None:
            self._known_calls[kind] = runs_modules
            if runs_modules:
                before, after = self._before, self._of_twin()
                names = before.keys() | after.keys()
                self._changing |= {name for name in names if before.get(name, _OTHER) != after.get(name, _OTHER)}
                self._compare()

    def check(self) -> None:
        """Raise an error if a setting differs between the twin and the policy.

        Do nothing before the first call that runs modules.
        """
        if any(self._known_calls.values()) and not self._is_equal():
            self._compare()

    def _is_equal(self) -> bool:
        """Return whether the settings listed by `_plan` are equal in the twin and the policy.

        Return False if the number of attributes in the twin or in the policy has changed since `_plan` was called.
        """
        try:
            for own, other, count, others, values in self._planned:
                if len(own) != count or len(other) != others or values(own) != values(other):
                    return False
        except (KeyError, RuntimeError, ValueError):  # a setting was deleted, or became a tensor or an array
            return False
        return True

    def _compare(self) -> None:
        for name, module, other, kind in self._modules:
            for attribute in sorted((module.keys() | other.keys()) - _TORCHS_OWN):
                default = getattr(kind, attribute, _OTHER)
                if isinstance(default, FunctionType):  # a method, which an instance may override
                    default = _OTHER
                own, given = (held.get(attribute, default) for held in (module, other))
                if (name, attribute) not in self._changing and _plain(own) != _plain(given):
                    raise UnsupportedModelError(
                        f"'{'.'.join(filter(None, (name, attribute)))}' is {_shown(given)} in the policy but "
                        f"{_shown(own)} in its PatchedPolicy. The two share weights but not other attributes, so set "
                        "the attribute to the same value in both. If the weights changed too, for example because an "
                        "adapter was merged, create a new PatchedPolicy(policy, patches) instead."
                    )
        self._plan()

    def _plan(self) -> None:
        """List the settings that `_is_equal` compares, in a form that makes the comparison fast."""
        planned: list[tuple[Any, Any, int, int, Callable[[Any], Any]]] = []
        for name, module, other, _ in self._modules:
            names = [each for each in module.keys() & other.keys() - _TORCHS_OWN if (name, each) not in self._changing]
            settings = [each for each in names if _plain(module[each]) not in (FunctionType, _OTHER)]
            values = operator.itemgetter(*settings) if settings else type
            planned.append((module, other, len(module), len(other), values))
        self._planned = planned  # assigned last, so an interrupt cannot leave an incomplete plan

    def _of_twin(self) -> dict[tuple[str, str], Any]:
        return {
            (name, attribute): copy.deepcopy(_plain(value))
            for name, module, _, _ in self._modules
            for attribute, value in module.items()
            if attribute not in _TORCHS_OWN
        }


_TORCHS_OWN = {*vars(nn.Module), *vars(nn.Module()), "_is_torch_compile", "_ddp_params_and_buffers_to_ignore"}
_TORCHS_OWN.remove("forward")  # an instance may override `forward`
_OTHER = type  # stands for a value that is not a setting; deepcopy(type) returns the same object
_MOST = 64


def _plain(value: Any, depth: int = 0) -> Any:
    """Return `value` if `value` is a setting, `FunctionType` if `value` is a function, and `_OTHER` otherwise."""
    if not depth and isinstance(value, (FunctionType, MethodType)):
        return FunctionType
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if not isinstance(value, (list, tuple, set, frozenset, deque, dict)) or len(value) > _MOST or depth > 4:
        return _OTHER
    inside = [*value, *value.values()] if isinstance(value, Mapping) else value
    return _OTHER if any(_plain(each, depth + 1) is _OTHER for each in inside) else value


def _shown(value: Any) -> str:
    if value is _OTHER:
        return "missing"
    return f"a {type(value).__name__}" if _plain(value) in (FunctionType, _OTHER) else reprlib.repr(value)
