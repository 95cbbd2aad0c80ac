"""What modules keep as attributes, where one forward may leave something that the next one reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OF_TORCH = frozenset(vars(nn.Module()))  # parameters, hooks and the like


class Attributes:
    """The attributes of all modules of a model at one moment, and what the lists and dicts among them hold.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = [(vars(module), _kept(vars(module))) for module in model.modules()]
        self._held: dict[int, tuple[Any, Any]] = {}
        for _, kept in self._own:
            self._note([*kept.values()])

    def put_back(self) -> None:
        """Leave everything as it was at that moment."""
        for own, kept in self._own:
            for name in _kept(own).keys() - kept.keys():
                del own[name]
            own.update(kept)
        for container, content in self._held.values():
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)

    def _note(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, (list, dict)) and id(value) not in self._held:
                self._held[id(value)] = value, value.copy()
                self._note([*value.values()] if isinstance(value, dict) else value)


def _kept(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module that are the user's own, but functions: those that run may be wrapped."""
    return {name: value for name, value in own.items() if name not in _OF_TORCH and not callable(value)}
