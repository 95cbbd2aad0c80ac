"""Places in a `forward` that are no module's input or output: the user marks them with `tap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ._typing import STAGES

if TYPE_CHECKING:
    from ._sessions import Listener, Session

listeners: dict[str, list[Listener]] = {}
observers: list[Callable[[str, Tensor], None]] = []


def tap(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, and make this place in a `forward` a hook point; free when nobody looks.

    Args:
        name: The hook point's name. Where the same tap runs more than once in a forward, each time is one call of
            it (`name#0`, `name#1`); a name made of the module's own, such as `f"block{i}.pattern"`, reads better.
        tensor: Any tensor of the forward.

    Returns:
        The same tensor, or what the open patches made of it.

    Example:
        >>> import torch
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, query, key):
        ...         return tap("pattern", (query @ key.mT).softmax(-1))
    """
    for observer in observers:
        observer(name, tensor)
    here = listeners.get(name)
    if not here:
        return tensor
    inside = [listener for listener in here if listener.session.running and listener.session.enabled]
    for session in dict.fromkeys(listener.session for listener in inside):
        session.count(name)
    for listener in sorted(inside, key=lambda item: STAGES.index(item.stage)):
        tensor = listener(tensor)
    return tensor


def forget(session: Session) -> None:
    """Take a session's listeners off every tap."""
    for name in list(listeners):
        listeners[name] = [listener for listener in listeners[name] if listener.session is not session]
        if not listeners[name]:
            del listeners[name]
