"""Check that state shared by several policies, or by several labels, does not change their episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..engine.state import Snapshot
from ..errors import RolloutError
from .copies import containers_in, parts_of_environments
from .results import Rollout


class SharedState:
    """Lists, dicts, sets, arrays, tensors and iterators that functions of several users reach.

    A rollout does not restore them, so that functions can keep a log. `users` maps the name of each policy or label to
    its functions.
    """

    def __init__(self, users: Mapping[Any, Iterable[Any]], envs: Any) -> None:
        self._reached = {name: {id(each): each for each in containers_in(roots)} for name, roots in users.items()}
        times = Counter(key for reached in self._reached.values() for key in reached)
        found = {key: each for reached in self._reached.values() for key, each in reached.items() if times[key] > 1}
        if found:
            found = {key: found[key] for key in found.keys() - {id(each) for each in parts_of_environments(envs)}}
        self._shared = found
        self._snapshot = Snapshot((), [dict(enumerate(found.values()))])

    def checked(
        self, run_of: str, run: Callable[[], list[Rollout]], again: Callable[[], list[Rollout]]
    ) -> list[Rollout]:
        """Return the rollouts from `run`. If it changed the shared state, check that `again` returns the same ones.

        The second run starts with the state that the first one left, and that state is restored afterwards.

        Raises:
            RolloutError: If the two runs differ.
        """
        self._snapshot.note()
        rollouts = run()
        iterators = [each for each in self._shared.values() if isinstance(each, Iterator)]
        changed = [*self._snapshot.rewritten(), *iterators]
        if not changed:
            return rollouts
        self._snapshot.note()
        repeated = again()
        self._snapshot.put_back()
        if not all(map(_equal, rollouts, repeated)):
            kind, key = type(changed[0]).__name__, id(changed[0])
            users = [repr(user) for user, reached in self._reached.items() if key in reached]
            raise RolloutError(
                f"The episodes {run_of} differ when they are repeated, because they change a {kind} that "
                f"{', '.join(users[:4])} share. Give each its own function with its own {kind}, or keep the state in "
                "attributes of an object, which a rollout restores."
            )
        return rollouts


def _equal(one: Rollout, other: Rollout) -> bool:
    pairs = zip((*one.actions, *one.seen), (*other.actions, *other.seen), strict=True)
    return all(np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f") for pair in pairs)
