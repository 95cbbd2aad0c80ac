"""Play the episodes of a rollout in this process or in the workers of an executor.

Each worker plays whole waves (batches of episodes). The waves are the same as without an executor, so the results are
equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from ..engine.workers import cut, spread
from ..errors import ExecutorError, RolloutError
from ..registry.points import HookPoints
from ..results import progress_bar
from .checks import checked_envs

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


@contextmanager
def opened(envs: Any) -> Iterator[VectorEnv[Any, Any, Any]]:
    """Check the environments, and yield them as a vector environment.

    If `envs` is a function that creates environments, call the function, and close the new environments on exit.
    """
    made = envs() if _is_factory(envs) else envs
    with closing(made) if made is not envs and hasattr(made, "close") else nullcontext():
        yield checked_envs(made)


def _is_factory(envs: Any) -> bool:
    return callable(envs) and (isinstance(envs, type) or not hasattr(envs, "reset"))


def played_in_parts(
    executor: Executor | None, function: Callable[..., Any], policy: Any, *call: Any, labels: Sequence[Any] = ()
) -> tuple[dict[range, Any], ExecutorError | None]:
    """Divide the plays of a rollout into ranges, and run `function(call, plays)` for each range in a worker.

    Without an executor, run one range with all plays in this process. `call` contains the environments, the options
    and further data. `policy` is a policy in `call`. There is one play per seed or, if there are labels, one play per
    label and seed. Return two values: a dict that maps each finished range to its result, in increasing order; and the
    error to raise if workers were lost, or None if all ranges finished. If no range finished, raise the error instead.
    """
    envs, options, *more = call
    seeds = options.seeds
    count = max(1, len(labels)) * len(seeds)
    if executor is None:
        return {range(count): function(call, range(count))}, None
    if not _is_factory(envs):
        raise RolloutError(
            "With executor=, envs must be a function that creates environments, because each worker needs its own "
            f"environments; got {type(envs).__name__}. Pass, for example, envs=lambda: gymnasium.make_vec(...)."
        )
    with opened(envs) as each:
        width = each.num_envs
    waves = cut(range(0, count, width), executor)
    parts = [range(each[0], min(each[-1] + width, count)) for each in waves]
    episodes = len(seeds)
    named = [[*dict.fromkeys(labels[play // episodes] if labels else seeds[play] for play in part)] for part in parts]
    found: dict[range, Any] = {}
    lost = None
    model = policy.model if isinstance(policy, HookPoints) else policy if isinstance(policy, nn.Module) else None
    with progress_bar(options.progress, count, "episode") as advance:

        def add(number: int, result: Any) -> None:
            found[parts[number]] = result
            advance(len(parts[number]))

        try:
            call = envs, options._replace(progress=False), *more
            spread(executor, function, call, parts, named, add, model=model)
        except ExecutorError as fault:
            if not found:
                raise
            lost = fault
    return {part: found[part] for part in parts if part in found}, lost
