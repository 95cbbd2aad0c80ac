"""Ctrl-C at any bytecode of chanpatch's own code: nothing is left, or the next call repairs it before it computes."""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch._dynamo  # without it no stance is set
from torch import Tensor, nn

import chanpatch
from chanpatch import PatchedPolicy, Site, hook_points, patched, recording, run_with_cache, steer, tap, zero_ablate
from chanpatch.engine import calls, hooks, sessions, state
from chanpatch.engine.hooks import RunEagerly
from chanpatch.engine.sessions import StopForward

FOLDER = str(Path(chanpatch.__file__).parent)
_TRACE = ("registry/trace.py", "registry/runs.py", "registry/points.py")
_FILES = ("engine/", "patching/contexts.py", "policies/twin.py", *_TRACE)
OURS = tuple(f"{FOLDER}/{each}" for each in _FILES)
HAS_STANCES = hasattr(torch.compiler, "set_stance")  # torch 2.6 and later


class Policy(nn.Module):
    """A policy with a module that is called by a method, a tap and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.relu, self.head, self.drop = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(tap("hidden", self.relu(self.body(x)))))

    def act(self, x: Tensor) -> Tensor:
        return self(x) * 2


class Case:
    """A policy, its hook points if a method is named, and a twin, all made before the interrupt."""

    def __init__(self, method: str | None) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(2, 3)
        self.policy = Policy().eval()
        self.patches = [zero_ablate(Site("relu", feature=1)), steer(Site("head.in[0]"), torch.ones(1, 4))]
        self.twin = PatchedPolicy(self.policy, self.patches)
        with torch.no_grad():
            hidden = self.policy.body(self.x).relu()
            self.plain = self.policy.head(hidden)
            self.patched = self.policy.head(hidden * torch.tensor([1.0, 0, 1, 1]) + 1)
        if method is not None:
            self.points = hook_points(self.policy, self.x, method=method)


# What is interrupted, and the method that is traced before


def enters_patched(case: Case) -> None:
    with patched(case.points, [*case.patches, zero_ablate(case.points.site("hidden", feature=0))]):
        case.policy(case.x)


def enters_recording(case: Case) -> None:
    with recording(case.points, ["relu", "hidden", "head.in[0]"]):
        case.policy(case.x)


def patches_a_method(case: Case) -> None:
    with patched(case.points, case.patches):
        case.policy.act(case.x)


def calls_a_twin(case: Case) -> None:
    case.twin.act(case.x)
    case.twin.head(torch.ones(1, 4))


def disables_a_twin(case: Case) -> None:
    with case.twin.disable():
        case.twin(case.x)


def traces(case: Case) -> None:
    hook_points(case.policy, case.x, axes={"body.in[0]": ("batch", "feature")})


def traces_without_names(case: Case) -> None:
    with patched(case.policy, zero_ablate(Site("relu", batch=0))):
        case.policy(case.x)


def stops_early(case: Case) -> None:
    run_with_cache(case.points, case.x, sites="relu", stop=True)


def runs_eagerly(case: Case) -> None:
    with RunEagerly(), RunEagerly():
        pass


SCENARIOS: dict[Callable[[Case], None], str | None] = {
    enters_patched: "__call__", enters_recording: "__call__", patches_a_method: "act", calls_a_twin: None,
    disables_a_twin: None, traces: None, traces_without_names: None, stops_early: "__call__", runs_eagerly: None,
}  # fmt: skip

# Interrupts


@cache
def takes_signals(code: CodeType) -> frozenset[int]:
    """The bytecodes before which Python looks for Ctrl-C: first ones of functions, and those after calls and loops."""
    found, looks = set(), True
    for each in dis.get_instructions(code):
        if looks and each.opname not in ("CACHE", "PRECALL"):
            found.add(each.offset)
        if each.opname not in ("CACHE", "PRECALL", "KW_NAMES"):
            looks = each.opname.startswith(("RESUME", "CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE"))
    found |= {each.argval for each in dis.get_instructions(code) if each.opname.startswith(("JUMP_B", "JUMP_A"))}
    return frozenset(found)


@contextmanager
def watched(at: Callable[[CodeType, int], None]) -> Iterator[None]:
    """Call back before each such bytecode of chanpatch's own frames; what that raises is raised there."""

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    def step(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode" and frame.f_lasti in takes_signals(frame.f_code):
            at(frame.f_code, frame.f_lasti)
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def bytecodes(scenario: Callable[[Case], None]) -> list[tuple[CodeType, int]]:
    """Every bytecode that runs, in the order of its first run."""
    found: dict[tuple[CodeType, int], None] = {}
    scenario(Case(SCENARIOS[scenario]))
    case = Case(SCENARIOS[scenario])
    with watched(lambda code, offset: found.setdefault((code, offset))):
        scenario(case)
    return [*found]


def interrupt(scenario: Callable[[Case], None], case: Case, where: tuple[CodeType, int]) -> None:
    waiting = [where]

    def at(code: CodeType, offset: int) -> None:
        if waiting and (code, offset) == where:
            waiting.clear()
            raise KeyboardInterrupt

    try:
        with watched(at):
            scenario(case)
    except KeyboardInterrupt:
        pass
    assert not waiting


# Afterwards


def faults(case: Case) -> list[str]:
    """What is wrong: numbers first, as the next call or entry may repair what is left."""
    found = []
    with torch.no_grad():
        for name, call, expected in (
            ("plain", lambda: case.policy(case.x), case.plain),
            ("plain method", lambda: case.policy.act(case.x), case.plain * 2),
            ("twin", lambda: case.twin(case.x), case.patched),
            ("method of the twin", lambda: case.twin.act(case.x), case.patched * 2),
        ):
            found += wrong(name, call, expected)
        with patched(case.policy, case.patches):
            found += wrong("patched again", lambda: case.policy(case.x), case.patched)
        found += wrong("plain at the end", lambda: case.policy(case.x), case.plain)
    return found + left(case)


def wrong(name: str, call: Callable[[], Tensor], expected: Tensor) -> list[str]:
    try:
        output = call()
    except (Exception, StopForward) as error:
        return [f"{name}: {type(error).__name__}: {error}"]
    return [] if torch.allclose(output, expected) else [name]


def left(case: Case) -> list[str]:
    modules = [*case.policy.modules()]
    registered = [key for module in modules for key in vars(module) if key.startswith("_forward") and vars(module)[key]]
    found = {
        "hooks": registered,
        "a method wrapper": {"act", "forward"} & {*vars(case.policy)},
        "gradients are off": not torch.is_grad_enabled(),
        "compiled code stays eager": [*hooks._eager, *hooks._stance],
        "the stance": HAS_STANCES and torch._dynamo.eval_frame._stance.stance != "default",
        "a lock": any(lock._is_owned() for lock in (state._ONE_AT_A_TIME, sessions._CHANGES)),
        "taps": [*calls._tap_observers, *(name for name, heard in calls._tap_sessions.items() if heard)],
        "a torch function mode": torch._C._len_torch_function_stack(),
        "training": any(module.training for module in modules),
    }
    return [f"{what} is left" for what, there in found.items() if there]


def heal() -> None:
    """Put globals back after a fault, so that it is counted once."""
    torch.set_grad_enabled(True)
    if HAS_STANCES:
        torch.compiler.set_stance("default")
    for each in (hooks._eager, hooks._stance, calls._tap_observers, calls._tap_sessions):
        each.clear()
    for lock in (state._ONE_AT_A_TIME, sessions._CHANGES):
        while lock._is_owned():
            lock.release()
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()


def interrupted(scenario: Callable[[Case], None], step: int, record: Callable[[str, object], None]) -> list[str]:
    """Interrupt at every so manieth bytecode, and return all faults by the place of the interrupt."""
    gc.collect()  # contexts of other tests that were freed while open close with their models
    places, found = bytecodes(scenario)[::step], []
    for code, offset in places:
        case = Case(SCENARIOS[scenario])
        before = torch.get_rng_state()
        interrupt(scenario, case, (code, offset))
        same = torch.equal(before, torch.get_rng_state())
        if faulty := [*faults(case), *([] if same else ["other random numbers"])]:
            line = max((line for start, _, line in code.co_lines() if start <= offset and line), default=0)
            found.append(f"{Path(code.co_filename).name}:{line} {code.co_qualname} {offset}: {'; '.join(faulty)}")
            heal()
    record("interrupts", len(places))
    return found


STEP = 40  # of the bytecodes that `make test` interrupts


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt inside a __del__
@pytest.mark.parametrize("step", [STEP, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_at_any_bytecode_leaves_nothing_that_changes_a_number(
    scenario: Callable[[Case], None], step: int, record_property: Any
) -> None:
    assert not interrupted(scenario, step, record_property)
