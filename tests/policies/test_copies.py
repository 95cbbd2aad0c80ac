"""Twins of policies that reach themselves by functions and hooks, or that keep state: the original stays out of it."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import PatchedPolicy, Site, patched, zero_ablate
from chanpatch.errors import UnreachedError, UnsupportedModelError

ON_A = zero_ablate(Site("a"))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.feats: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def keep(self, module: nn.Module, args: Any, output: Any = None) -> None:
        self.feats["a"] = output


class Reading(Plain):
    """Reads what a hook has kept."""

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(self.feats["a"])


@pytest.fixture
def x():
    return torch.randn(3, 4)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args) * 2


class Keeper:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


HELD = {
    "nested": lambda run: {"run": [(1, run)]},
    "wrapped": lambda run: doubled(run),
    "partial": lambda run: functools.partial(run),
    "cached": lambda run: functools.lru_cache(run),
    "object": lambda run: Keeper(run),
}


@pytest.mark.parametrize("holding", HELD.values(), ids=HELD)
def test_a_function_that_refers_to_the_policy_is_refused_wherever_it_is_kept(holding):
    policy = Plain()
    policy.b.ops = holding(lambda x: policy.b(policy.a(x).relu()))
    with pytest.raises(UnsupportedModelError, match="Plain stores the function .* refers to the policy itself"):
        PatchedPolicy(policy, ON_A)


class Again(Plain):
    """In a twin, forward would run partly unpatched, and act wholly, without an unreached patch."""

    def __init__(self) -> None:
        super().__init__()
        self.again = lambda x: self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.again(x)

    def act(self, x: Tensor) -> Tensor:
        return self.again(x)


def test_a_function_whose_calls_would_go_unpatched_without_an_unreached_patch_is_refused():
    with pytest.raises(UnsupportedModelError) as caught:
        PatchedPolicy(Again(), ON_A)
    assert str(caught.value) == (
        "Again stores the function Again.__init__.<locals>.<lambda> (in an attribute or as a hook), which refers to "
        "the policy itself or to a container in the policy. In a PatchedPolicy, that reference would still point to "
        "the unpatched original. Remove the reference (for example, turn the function into a method of the policy), "
        "or use patched()."
    )


GLOBAL = Reading()


def test_a_forward_that_reaches_the_original_by_a_global_name_leaves_its_patch_unreached(x, monkeypatch):
    class ByName(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return GLOBAL.b(GLOBAL.a(x))

    monkeypatch.setitem(globals(), "GLOBAL", policy := ByName())
    with pytest.raises(UnreachedError, match=r"The patch at 'a' never ran in __call__\(\)"):
        PatchedPolicy(policy, ON_A)(x)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_a_hook_that_refers_to_the_policy_is_refused(register):
    policy = Plain()
    getattr(policy.a, register)(lambda *args: policy.keep(*args))
    with pytest.raises(UnsupportedModelError, match="stores the function .* as a hook"):
        PatchedPolicy(policy, ON_A)


def test_a_hook_that_fills_a_dict_of_the_policy_is_refused():
    policy = Reading()
    feats = policy.feats
    policy.a.register_forward_hook(lambda module, args, output: feats.__setitem__("a", output))
    with pytest.raises(UnsupportedModelError, match="refers to the policy itself or to a container in the policy"):
        PatchedPolicy(policy, ON_A)


def test_a_hook_that_reaches_the_policy_by_a_global_name_is_refused(monkeypatch):
    monkeypatch.setitem(globals(), "GLOBAL", policy := Reading())
    policy.a.register_forward_hook(lambda module, args, output: GLOBAL.feats.__setitem__("a", output))
    with pytest.raises(UnsupportedModelError, match="Reading stores the function"):
        PatchedPolicy(policy, ON_A)


@pytest.mark.parametrize("hook", ["method", "partial of a method"])
def test_a_hook_that_is_a_bound_method_fills_the_twin(hook, x):
    policy = Reading()
    policy.a.register_forward_hook(policy.keep if hook == "method" else functools.partial(policy.keep))
    policy(x)
    kept = policy.feats["a"]
    twin = PatchedPolicy(policy, zero_ablate(Site("a", feature=0)))
    expected = policy.a(x).detach()
    expected[:, 0] = 0  # the patch comes before the user's own hook
    policy.feats["a"] = kept
    twin(x)
    assert policy.feats["a"] is kept
    torch.testing.assert_close(twin.feats["a"].detach(), expected)
    assert twin.a._forward_hooks


def test_functions_and_hooks_that_do_not_hold_the_policy_run_on_the_twin(x):
    policy, scale, seen = Plain(), 2.0, []
    policy.ops = [lambda x: x * scale, torch.relu, policy.keep, functools.partial(policy.keep, None)]
    policy.a.register_forward_hook(lambda module, args, output: seen.append(output))
    policy.b.register_forward_hook(lambda module, args, output: output * scale)
    twin = PatchedPolicy(policy, ON_A)
    twin(x)
    assert len(seen) == 1
    assert twin.ops[2].__self__ is twin


def test_a_policy_that_is_patched_and_whose_twin_is_patched_too_has_twins(x):
    policy = Plain()
    twin = PatchedPolicy(policy, ON_A)
    with patched(policy, ON_A, allow_unreached="a"), patched(twin, ON_A, allow_unreached="a"):
        again = PatchedPolicy(twin, zero_ablate(Site("b")))
        other = PatchedPolicy(policy, ON_A)
    assert not again(x).any()
    torch.testing.assert_close(other(x), policy.b(torch.zeros(3, 8)))


def test_a_hook_on_a_twin_that_holds_the_twin_is_refused_in_a_twin_of_it():
    twin = PatchedPolicy(Plain(), ON_A)
    twin.a.register_forward_hook(lambda module, args, output: twin.feats.__setitem__("a", output))
    with pytest.raises(UnsupportedModelError, match="PatchedPlain stores the function"):
        PatchedPolicy(twin, zero_ablate(Site("b")))


def test_a_handle_of_a_hook_that_a_policy_stores_removes_the_twins_own_hook(x: Tensor) -> None:
    class Storing(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.handle = self.a.register_forward_hook(self.keep)

    policy = Storing()
    twin = PatchedPolicy(policy, ON_A)
    twin(x)
    assert twin.feats
    assert not policy.feats
    twin.handle.remove()
    twin.feats.clear()
    twin(x)
    policy(x)
    assert not twin.feats
    assert policy.feats


class Cloning(Plain):
    def clone(self) -> Plain:
        return type(self)()

    @classmethod
    def build(cls) -> Plain:
        return cls()


class Forking(Plain):
    def fork(self, function: Callable[[Any], Any]) -> Any:
        self(torch.zeros(1, 4))
        return function(self)


@pytest.mark.parametrize("function", [copy.copy, copy.deepcopy, lambda twin: PatchedPolicy(twin, ON_A)])
def test_a_method_of_a_twin_may_copy_the_twin(function: Callable[[Any], Any], x: Tensor) -> None:
    twin = PatchedPolicy(Forking(), zero_ablate(Site("b")))
    hooks = [len(module._forward_hooks) for module in function(twin).modules()]
    for _ in range(2):
        made = twin.fork(function)
        assert not made(x).any()
        assert [len(module._forward_hooks) for module in made.modules()] == hooks


@pytest.mark.parametrize("name", ["clone", "build"])
def test_a_policy_that_a_twins_method_creates_is_an_ordinary_policy(name: str) -> None:
    created = getattr(PatchedPolicy(Cloning(), ON_A), name)()
    assert type(created) is Cloning
    assert not isinstance(created, PatchedPolicy)
    assert len([*created.parameters()]) == 4


# --- state ---


class Recurrent(nn.Module):
    """Resets its state in place, and then replaces it by one with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.head = nn.Linear(4, 8), nn.GRUCell(8, 8), nn.Linear(8, 3)
        self.h = torch.zeros(3, 8)

    def forward(self, x: Tensor, done: Tensor) -> Tensor:
        with torch.no_grad():
            self.h.mul_(1 - done[:, None])
        self.h = self.cell(self.a(x).relu(), self.h)
        return self.head(self.h)


@pytest.mark.parametrize("kept", ["attribute", "list"])
def test_a_reset_of_the_twins_state_leaves_the_original_its_own(kept, x):
    policy = Recurrent()
    policy(x, torch.zeros(3))
    if kept == "list":
        policy.states = [policy.h]
    before = policy.h.detach().clone()
    twin = PatchedPolicy(policy, ON_A)
    torch.testing.assert_close(twin.h, policy.h, check_stride=True)
    assert kept == "attribute" or twin.states[0] is twin.h
    twin(x, torch.ones(3))
    torch.testing.assert_close(policy.h.detach(), before, rtol=0, atol=0)


class Buffered(nn.Module):
    """Replaces a buffer in its forward, or in another method."""

    def __init__(self, start: Tensor | None) -> None:
        super().__init__()
        self.a, self.cell, self.head = nn.Linear(4, 8), nn.GRUCell(8, 8), nn.Linear(8, 3)
        self.register_buffer("h", start)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(len(x), 8) if self.h is None else self.h
        self.h = self.cell(self.a(x).relu(), hidden)
        return self.head(self.h)

    def reset(self) -> None:
        self.h = torch.zeros(3, 8)


@pytest.mark.parametrize("start", [torch.zeros(3, 8), None], ids=["tensor", "none"])
@pytest.mark.parametrize("method", ["__call__", "reset"])
def test_a_buffer_that_the_policy_itself_replaces_is_a_clear_error_of_the_next_call(start, method, x):
    policy = Buffered(start)
    twin = PatchedPolicy(policy, ON_A)
    twin(x) if method == "__call__" else twin.reset()
    for _ in range(2):
        with pytest.raises(
            UnsupportedModelError, match="'h' was replaced in the policy or its PatchedPolicy"
        ) as caught:
            twin(x) if method == "__call__" else twin.reset()
    assert "If the policy's own code replaces the tensor, change that code to update" in str(caught.value)


def test_a_buffer_that_the_forward_writes_into_is_shared(x):
    class Written(Buffered):
        def forward(self, x: Tensor) -> Tensor:
            self.h.copy_(self.cell(self.a(x).relu(), self.h).detach())
            return self.head(self.h)

    policy = Written(torch.zeros(3, 8))
    twin = PatchedPolicy(policy, ON_A)
    twin(x), twin(x)
    assert twin.h is policy.h
    assert policy.h.any()


def test_other_weights_by_functional_call_are_refused_by_name(x):
    policy = Plain()
    other = {"a.weight": torch.ones(8, 4)}
    with pytest.raises(UnsupportedModelError) as caught:
        torch.func.functional_call(PatchedPolicy(policy, ON_A), other, (x,))
    assert str(caught.value) == (
        "'a.weight' was replaced in the policy or its PatchedPolicy, so the two no longer share all weights. Create a "
        "new PatchedPolicy(policy, patches) or, for torch.func.functional_call, use the policy inside patched(). If "
        "the policy's own code replaces the tensor, change that code to update the tensor with copy_(), or to store "
        "the tensor in a plain attribute."
    )


def test_a_module_that_is_called_by_its_forward_is_told_to_run_no_hooks(x):
    class Direct(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a.forward(x))

    twin = PatchedPolicy(Direct(), ON_A)
    with pytest.raises(UnreachedError, match=r"its .forward\(\) was called directly"):
        twin(x)


def test_a_deep_copy_of_a_twin_has_state_of_its_own(x):
    policy = Recurrent()
    policy(x, torch.zeros(3))
    twin = PatchedPolicy(policy, ON_A)
    twin(x, torch.zeros(3))
    copied = copy.copy(twin)
    before = twin.h.detach().clone()
    copied(x, torch.ones(3))
    torch.testing.assert_close(twin.h.detach(), before, rtol=0, atol=0)


def test_a_module_that_copies_its_own_parameters_can_have_no_twin(x):
    class Copying(nn.Linear):
        def __deepcopy__(self, memo):
            return Copying(self.in_features, self.out_features)

    with pytest.raises(UnsupportedModelError, match="copies its own parameters .* Use patched"):
        PatchedPolicy(nn.Sequential(Copying(4, 4)), zero_ablate(Site("0")))


class Weakly(nn.Module):
    """Reaches a layer through a weak reference as well, so that no patch is unreached."""

    def __init__(self, refer: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.weak = refer(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.weak()(x)


WEAK: dict[str, Callable[[nn.Module], Any]] = {
    "reference": weakref.ref,
    "proxy": weakref.proxy,
    "method": lambda module: weakref.WeakMethod(module.forward),
    "set": lambda module: weakref.WeakSet([module]),
    "values": lambda module: weakref.WeakValueDictionary({"a": module}),
    "keys": lambda module: weakref.WeakKeyDictionary({module: "a"}),
}


@pytest.mark.parametrize("refer", WEAK.values(), ids=WEAK)
def test_a_weak_reference_to_a_module_of_the_policy_is_refused(refer):
    with pytest.raises(UnsupportedModelError) as caught:
        PatchedPolicy(Weakly(refer), ON_A)
    assert str(caught.value) == (
        "Weakly stores a weak reference (in an attribute or as a hook), which refers to the policy itself or to a "
        "container in the policy. In a PatchedPolicy, that reference would still point to the unpatched original. "
        "Remove the reference (for example, turn the function into a method of the policy), or use patched()."
    )


def test_a_function_that_refers_to_the_policy_weakly_is_refused():
    policy = Plain()
    reference = weakref.ref(policy.a)
    policy.again = lambda x: reference()(x)  # type: ignore[misc]
    with pytest.raises(UnsupportedModelError, match="Plain stores the function .* refers to the policy itself"):
        PatchedPolicy(policy, ON_A)


def test_a_weak_reference_to_something_else_does_not_hinder_a_twin(x):
    policy, other = Plain(), nn.Linear(2, 2)
    policy.other = weakref.ref(other)
    twin: Any = PatchedPolicy(policy, ON_A)
    assert twin.other() is other
    assert not torch.equal(twin(x), policy(x))


def dispatched(policy: nn.Module) -> None:
    """Replace the forward of every module as accelerate's dispatch does."""
    for module in policy.modules():
        before = module._old_forward = module.forward

        def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            return module._old_forward(*args, **kwargs)

        module.forward = functools.update_wrapper(functools.partial(new_forward, module), before)


def test_a_policy_whose_forwards_accelerate_has_replaced_has_a_twin(x):
    policy, plain = Plain(), None
    plain = copy.deepcopy(policy)
    dispatched(policy)
    twin: Any = PatchedPolicy(policy, ON_A)
    assert torch.equal(policy(x), plain(x))
    with patched(plain, ON_A):
        assert torch.equal(twin(x), plain(x))
    assert torch.equal(policy(x), plain(x))


def test_a_forward_that_was_replaced_by_a_function_that_holds_the_policy_is_refused():
    policy = Plain()
    before = policy.a._old_forward = policy.a.forward

    def new_forward(*args: Any, **kwargs: Any) -> Any:
        return policy.a._old_forward(*args, **kwargs)  # type: ignore[operator]

    policy.a.forward = functools.update_wrapper(new_forward, before)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="Plain stores the function .*forward .*Remove the reference"):
        PatchedPolicy(policy, ON_A)
