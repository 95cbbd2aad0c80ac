"""A policy and its twin share weights, but not the flags that say how the weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import PatchedPolicy, Site, edit
from chanpatch.errors import UnsupportedModelError


class Lora(nn.Linear):
    """Merges adapters into its weight in place, as peft's layers do."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.adapters = nn.ParameterDict({name: nn.Parameter(torch.randn(3, 4)) for name in ("one", "two")})
        self._active = ["one"]
        self._disabled = False
        self.merged_adapters: list[str] = []
        self.scaling = {"one": 1, "two": 2}
        self.mode: str | None = None
        self.temperature = 1.0

    def delta(self) -> Tensor:
        return sum((self.scaling[name] * self.adapters[name] for name in self._active), torch.zeros(3, 4))

    def merge(self) -> None:
        self.weight.data += self.delta().data
        self.merged_adapters += self._active

    def unmerge(self) -> None:
        self.weight.data -= self.delta().data
        self.merged_adapters.clear()

    def set_adapter(self, name: str) -> None:
        self._active = [name]

    def forward(self, x: Tensor) -> Tensor:
        if self._disabled or self.merged_adapters:
            return super().forward(x)
        return super().forward(x) + x @ self.delta().T


class Bare(nn.Linear):
    """Has its flag on the class until it is merged, and is a submodule's part."""

    merged = False

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.adapter = nn.Parameter(torch.randn(3, 4))

    def merge(self) -> None:
        self.weight.data += self.adapter.data
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 if self.merged else x @ self.adapter.T)


def same(activation: Tensor) -> Tensor:
    return activation


def pair(layer: Callable[[], nn.Module] = Lora) -> tuple[nn.Sequential, Any]:
    policy = nn.Sequential(nn.Sequential(layer()), nn.ReLU())
    return policy, PatchedPolicy(policy, edit(Site("1"), same))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


CHANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "merge": ("merged_adapters", Lora.merge),
    "set_adapter": ("_active", lambda layer: layer.set_adapter("two")),
    "disable": ("_disabled", lambda layer: setattr(layer, "_disabled", True)),
    "scale": ("scaling", lambda layer: layer.scaling.update(one=3)),
    "a temperature": ("temperature", lambda layer: setattr(layer, "temperature", 0.5)),
    "a method of its own": ("forward", lambda layer: setattr(layer, "forward", lambda x: x @ layer.weight.T)),
    "a text": ("mode", lambda layer: setattr(layer, "mode", "fast")),
    "a new flag": ("fused", lambda layer: setattr(layer, "fused", True)),
    "a flag that is gone": ("mode", lambda layer: delattr(layer, "mode")),
    "another type": ("mode", lambda layer: setattr(layer, "mode", torch.ones(2))),
}


@pytest.mark.parametrize("called", [False, True], ids=["before its first call", "later"])
@pytest.mark.parametrize("side", ["policy", "twin"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changed_on_one_side_is_an_error_that_names_it(name, side, called, x):
    policy, twin = pair()
    if called:
        twin(x)
    attribute, change = CHANGES[name]
    change((policy if side == "policy" else twin)[0][0])
    for _ in range(2 if called or side == "policy" else 1):
        with pytest.raises(
            UnsupportedModelError, match=f"'0.0.{attribute}' is .* in the policy but .* in its PatchedPolicy"
        ):
            twin(x)


@pytest.mark.parametrize("side", ["policy", "twin"])
def test_a_flag_of_the_class_that_an_instance_sets_is_compared(side, x):
    policy, twin = pair(Bare)
    twin(x)
    (policy if side == "policy" else twin)[0][0].merge()
    with pytest.raises(UnsupportedModelError) as caught:
        twin(x)
    on_policy = side == "policy"
    assert str(caught.value) == (
        f"'0.0.merged' is {on_policy} in the policy but {not on_policy} in its PatchedPolicy. The two share weights "
        "but not other attributes, so set the attribute to the same value in both. If the weights changed too, for "
        "example because an adapter was merged, create a new PatchedPolicy(policy, patches) instead."
    )


def test_a_method_of_the_twin_itself_that_merges_is_not_taken_for_a_forward(x):
    policy = Lora()
    twin = PatchedPolicy(policy, edit(Site(".out"), same))
    twin.merge()
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"'merged_adapters' is \[\] in the policy but \['one'\]"):
            twin(x)
    twin.unmerge()
    assert torch.equal(twin(x), policy(x))


def test_a_disabled_twin_is_compared_when_it_is_disabled(x):
    policy, twin = pair()
    twin(x)
    policy[0][0].merge()
    with pytest.raises(UnsupportedModelError, match="merged_adapters"), twin.disable():
        pass


@pytest.mark.parametrize("called", [False, True])
def test_a_setting_that_is_changed_on_both_sides_is_right(called, x):
    policy, twin = pair()
    if called:
        twin(x)
    for each in (policy, twin):
        each[0][0].set_adapter("two")
        each[0][0].new = {"a": [1, None]}
    for _ in range(2):
        assert torch.equal(twin(x), policy(x))
    twin[0][0].new["a"].append(2)
    with pytest.raises(UnsupportedModelError, match="'0.0.new'"):
        twin(x)


def test_a_twin_made_after_a_merge_is_the_policy(x):
    policy, twin = pair()
    before = twin(x)
    policy[0][0].merge()
    twin = PatchedPolicy(policy, edit(Site("1"), same))
    assert torch.equal(twin(x), policy(x))
    assert torch.allclose(twin(x), before, atol=1e-5)


def test_a_setting_that_is_set_back_is_right_again(x):
    policy, twin = pair()
    twin(x)
    policy[0][0]._disabled = True
    with pytest.raises(UnsupportedModelError, match="_disabled"):
        twin(x)
    policy[0][0]._disabled = False
    assert torch.equal(twin(x), policy(x))


def test_weights_and_dtype_stay_shared_and_training_and_gradient_flags_are_not_compared(x):
    policy, twin = pair()
    twin(x)
    policy.eval()
    policy[0][0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(x).sum().backward()
    optimizer.step()
    policy.load_state_dict({name: item * 2 for name, item in policy.state_dict().items()})
    assert torch.equal(twin(x), policy(x))
    policy.double()
    assert torch.equal(twin(x.double()), policy(x.double()))


class Counting(nn.Linear):
    """Its calls change settings, one of them in one method only."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.calls, self.seen, self.last, self.acted = 0, [], None, 0
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = f"call {self.calls}"
        self.hidden = super().forward(x)
        return self.hidden

    def act(self, x: Tensor) -> Tensor:
        self.acted += 1
        return self(x)

    def shape(self) -> int:
        return self.out_features


def test_what_the_twins_own_calls_change_is_not_compared(x):
    policy = Counting()
    for _ in range(3):
        policy(x)
    twin = PatchedPolicy(policy, edit(Site(".out"), same))
    policy(x)
    policy.act(x)
    for run in (twin.act, twin, twin.act, twin):
        assert torch.equal(run(x), policy(x))
        assert twin.shape() == 3
    policy.out_features = 5
    with pytest.raises(UnsupportedModelError, match="'out_features' is 5 in the policy but 3 in its PatchedPolicy"):
        twin(x)


def test_marks_that_torch_sets_are_not_compared(x):
    policy, twin = pair()
    twin(x)
    twin.compile(backend="eager")
    policy[0][0]._is_torch_compile = True
    twin[0][0].dump_patches = True
    twin[0][0].register_forward_hook(lambda *_: None)
    assert torch.equal(twin[0](x), policy[0](x))


def test_a_module_without_parameters_is_not_compared(x):
    policy, twin = pair()
    twin(x)
    policy[1].inplace = True
    assert torch.equal(twin(x), policy(x))


class LoraLib(nn.Linear):
    """Merges in `train()`, as loralib's layers do; at first the adapter is zero."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
        self.merged = False

    def train(self, mode: bool = True) -> LoraLib:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b @ self.a).data * (-1 if mode else 1)
            self.merged = not mode
        return self


class Evaluated(Lora):
    def eval(self) -> Evaluated:
        self.merge()
        return super().eval()


class Scaled(nn.Linear):
    """Multiplies its weight in `eval`, under a name of its base class."""

    def train(self, mode: bool = True) -> Scaled:
        with torch.no_grad():
            self.weight.mul_(0.5 if mode else 2.0)
        return super().train(mode)


class Reset(nn.Linear):
    """Writes a parameter that is not its own, but of a module inside."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.inner = nn.ModuleDict({"scale": nn.Linear(1, 1)})

    def train(self, mode: bool = True) -> Reset:
        nn.init.zeros_(self.inner["scale"].weight)
        return super().train(mode)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("layer", [LoraLib, Evaluated, lambda: Scaled(4, 3), Reset])
def test_a_module_whose_train_or_eval_writes_weights_has_no_twin(layer, evaluated):
    policy = nn.Sequential(nn.Sequential(layer()), nn.ReLU())
    if evaluated:
        policy.eval()
    before = {name: item.clone() for name, item in policy.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"'0.0' \(\w+\) changes its parameters in (train|eval)\(\)"):
        PatchedPolicy(policy, edit(Site("1"), same))
    assert all(torch.equal(item, before[name]) for name, item in policy.state_dict().items())


class Frozen(nn.Module):
    """Keeps its batch norm in eval mode, and its first stage without gradients, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        for parameter in self.linear.parameters():
            parameter.requires_grad = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Forgetting(nn.Linear):
    """Forgets its state, and notes the mode, in `train()` and `eval()`."""

    state: Any = None
    modes: tuple[bool, ...] = ()

    def train(self, mode: bool = True) -> Forgetting:
        self.state, self.modes = None, (*self.modes, mode)
        return super().train(mode)

    def eval(self) -> Forgetting:
        return self.train(False)


class Refusing(nn.Linear):
    def train(self, mode: bool = True) -> Refusing:
        raise RuntimeError("This model is for inference only.")


class Empty(nn.Sequential):
    """Only calls its base class, around modules that are shared, half precision and without values."""

    def train(self, mode: bool = True) -> Empty:
        super().train(mode)
        return self


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "frozen": Frozen,
    "forgetting": lambda: Forgetting(4, 3),
    "refusing": lambda: Refusing(4, 3),
    "empty": lambda: Empty(nn.Linear(4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
    "tied": lambda: Empty(*[nn.Linear(4, 4)] * 2, nn.GRU(4, 3)),
    "meta": lambda: Empty(nn.Linear(4, 3, device="meta")),
    "half": lambda: Empty(nn.Linear(4, 3, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("layer", HARMLESS.values(), ids=HARMLESS)
def test_a_module_whose_train_only_sets_flags_has_a_twin(layer):
    policy = nn.Sequential(layer(), nn.Identity())
    before = {name: item.clone() for name, item in policy.state_dict().items()}
    modes = [(module.training, getattr(module, "modes", ())) for module in policy.modules()]
    twin: Any = PatchedPolicy(policy, edit(Site("1"), same))
    assert all(item is own for item, own in zip(twin.parameters(), policy.parameters(), strict=True))
    if not next(policy.parameters()).is_meta:
        assert all(torch.equal(item, before[name]) for name, item in policy.state_dict().items())
    assert modes == [(module.training, getattr(module, "modes", ())) for module in policy.modules()]
