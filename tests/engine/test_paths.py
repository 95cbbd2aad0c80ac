"""Tensors inside nested outputs: the oracle is the same container, built by hand."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

from chanpatch.engine.paths import Attr, Item, get, leaves, replace
from chanpatch.errors import UnsupportedModelError
from chanpatch.registry.names import parsed_path, path_text
from chanpatch.sweeps.prefix import fresh


class Heads(NamedTuple):
    policy: Tensor
    value: Tensor


Old = namedtuple("Old", "hidden rest")


@dataclass(frozen=True)
class Frozen:
    mean: Tensor
    note: str
    derived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.mean + 1)


@dataclass
class ModelOutput(OrderedDict):
    """A dict whose items are its attributes too, in the manner of huggingface's class of that name."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)

    def __setitem__(self, key: str, item: Any) -> None:
        super().__setitem__(key, item)
        super().__setattr__(key, item)

    def __setattr__(self, name: str, item: Any) -> None:
        if name in self and item is not None:
            super().__setitem__(name, item)
        super().__setattr__(name, item)

    def __reduce__(self) -> Any:
        return type(self), (self.logits, self.hidden)


class MaskedCategorical(Categorical):
    """CleanRL's, whose constructor has an argument more than its base's."""

    def __init__(self, probs=None, logits=None, validate_args=None, masks=()):
        self.masks = masks
        if len(masks):
            logits = torch.where(masks, logits, torch.tensor(-1e8))
        super().__init__(probs, logits, validate_args)


def t(*lengths: int) -> Tensor:
    return torch.randn(*lengths)


# What is built, and the paths of its tensors in order.
CONTAINERS = {
    "tensor": (lambda: t(2), [""]),
    "tuple": (lambda: (t(2), None, t(3)), ["[0]", "[2]"]),
    "nested tuple": (lambda: (t(2), (t(3), t(4))), ["[0]", "[1][0]", "[1][1]"]),
    "named tuple": (lambda: Heads(t(2), t(3)), [".policy", ".value"]),
    "old named tuple": (lambda: Old(t(2), [t(3)]), [".hidden", ".rest[0]"]),
    "torch return type": (lambda: t(2, 3).max(1), ["[0]", "[1]"]),
    "list": (lambda: [t(2), "x", t(3)], ["[0]", "[2]"]),
    "dict": (lambda: {"a": t(2), 3: t(3), "n": 1}, ['["a"]', "[3]"]),
    "ordered dict": (lambda: OrderedDict(b=t(2), a=t(3)), ['["b"]', '["a"]']),
    "default dict": (lambda: defaultdict(list, a=t(2)), ['["a"]']),
    "frozen dataclass": (lambda: Frozen(t(2), "x"), [".mean", ".derived"]),
    "dataclass that is a dict": (lambda: ModelOutput(t(2), (t(3),)), ['["logits"]', '["hidden"][0]']),
    "dict in a list in a tuple": (lambda: ([{"a": t(2)}],), ['[0][0]["a"]']),
    "distribution in a tuple": (lambda: (Categorical(logits=t(2, 3)), t(2)), ["[0].logits", "[1]"]),
}


@pytest.fixture(params=list(CONTAINERS))
def container(request):
    build, paths = CONTAINERS[request.param]
    return build(), paths


def test_leaves_are_all_tensors_with_their_paths_in_order(container):
    tree, paths = container
    assert [path_text(path) for path, _ in leaves(tree)] == paths


def test_get_returns_the_very_leaf_at_each_path(container):
    tree, _ = container
    for path, leaf in leaves(tree):
        assert get(tree, path) is leaf


def test_a_replaced_leaf_is_there_and_every_other_keeps_its_identity(container):
    tree, _ = container
    before = list(leaves(tree))
    for path, leaf in before:
        if path and isinstance(path[-1], Attr) and path[-1].name == "logits":
            continue  # a distribution normalises its parameter
        new = leaf + 1
        changed = replace(tree, path, new)
        after = list(leaves(changed))
        assert type(changed) is type(tree)
        assert [p for p, _ in after] == [p for p, _ in before]
        assert all(is_ is (new if p == path else was) for (p, is_), (_, was) in zip(after, before, strict=True))


def test_replacing_writes_nothing_into_the_old_container(container):
    tree, _ = container
    before = list(leaves(tree))
    for path, leaf in before:
        replace(tree, path, leaf * 2)
    assert all(one is other for (_, one), (_, other) in zip(leaves(tree), before, strict=True))


def test_a_path_written_out_and_parsed_is_the_same_path(container):
    tree, _ = container
    for path, _leaf in leaves(tree):
        assert parsed_path(path_text(path)) == path


@pytest.mark.parametrize("text", ["0", "[", "[a]", "[0]x", ".1", '["a]', "..a", "[0] [1]"])
def test_what_is_no_path_parses_to_none(text):
    assert parsed_path(text) is None


def test_parts_that_hold_no_changed_leaf_keep_identity():
    left, right = {"a": t(2)}, [t(3)]
    changed = replace((left, right), (Item(0), Item("a")), t(2))
    assert changed[1] is right


def test_things_that_are_no_tensors_keep_identity():
    note = object()
    changed = replace({"a": t(2), "note": note}, (Item("a"),), t(2))
    assert changed["note"] is note


def test_a_frozen_dataclass_keeps_the_fields_its_constructor_does_not_take():
    tree = Frozen(t(2), "x")
    changed = replace(tree, (Attr("mean"),), torch.zeros(2))
    assert changed.derived is tree.derived
    assert changed.note == "x"


def test_a_dataclass_that_is_a_dict_agrees_with_its_attributes_after_a_replacement():
    new = t(2)
    changed = replace(ModelOutput(t(2), (t(3),)), (Item("logits"),), new)
    assert changed["logits"] is new
    assert changed.logits is new


def test_a_default_dict_keeps_its_default():
    assert replace(defaultdict(list, a=t(2)), (Item("a"),), t(2)).default_factory is list


def test_a_container_without_tensors_has_no_leaves():
    assert list(leaves({"a": "text", "b": {1, 2}, "c": object()})) == []


def test_a_dataclass_type_is_no_container():
    assert list(leaves(Frozen)) == []


LOGITS = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.0, -0.5]])
PROBS = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
MASKS = torch.tensor([[True, False, True], [True, True, False]])
COVARIANCE = torch.tensor([[2.0, 0.5], [0.5, 1.0]])


def read_first(distribution: Distribution, name: str) -> Distribution:
    """Have a derived parameter computed and stored, as any log_prob or sample does."""
    getattr(distribution, name)
    return distribution


# Name: a distribution, the path of one parameter, another parameter, and the distribution built by hand from that.
DISTRIBUTIONS = {
    "categorical logits": (Categorical(logits=LOGITS), "logits", LOGITS * 2, Categorical(logits=LOGITS * 2)),
    "categorical probs": (Categorical(probs=PROBS), "probs", PROBS.flip(1), Categorical(probs=PROBS.flip(1))),
    "categorical logits after probs were read": (
        read_first(Categorical(logits=LOGITS), "probs"), "logits", LOGITS * 2, Categorical(logits=LOGITS * 2),
    ),
    "categorical probs after logits were read": (
        read_first(Categorical(probs=PROBS), "logits"), "probs", PROBS.flip(1), Categorical(probs=PROBS.flip(1)),
    ),
    "one-hot logits": (OneHotCategorical(logits=LOGITS), "logits", LOGITS * 2, OneHotCategorical(logits=LOGITS * 2)),
    "one-hot probs": (OneHotCategorical(probs=PROBS), "probs", PROBS.flip(1), OneHotCategorical(probs=PROBS.flip(1))),
    "one-hot probs after logits were read": (
        read_first(OneHotCategorical(probs=PROBS), "logits"), "probs", PROBS.flip(1),
        OneHotCategorical(probs=PROBS.flip(1)),
    ),
    "bernoulli logits": (Bernoulli(logits=LOGITS), "logits", LOGITS * 2, Bernoulli(logits=LOGITS * 2)),
    "bernoulli probs after logits were read": (
        read_first(Bernoulli(probs=PROBS), "logits"), "probs", PROBS.flip(1), Bernoulli(probs=PROBS.flip(1)),
    ),
    "normal loc": (Normal(LOGITS, PROBS), "loc", LOGITS * 2, Normal(LOGITS * 2, PROBS)),
    "normal scale": (Normal(LOGITS, PROBS), "scale", PROBS * 2, Normal(LOGITS, PROBS * 2)),
    "independent normal": (
        Independent(Normal(LOGITS, PROBS), 1), "base_dist.loc", LOGITS * 2, Independent(Normal(LOGITS * 2, PROBS), 1),
    ),
    "multivariate normal covariance": (
        MultivariateNormal(LOGITS[:, :2], COVARIANCE), "covariance_matrix", COVARIANCE.expand(2, 2, 2) * 2,
        MultivariateNormal(LOGITS[:, :2], COVARIANCE * 2),
    ),
    "multivariate normal precision after covariance was read": (
        read_first(MultivariateNormal(LOGITS[:, :2], precision_matrix=COVARIANCE), "covariance_matrix"),
        "precision_matrix", COVARIANCE.expand(2, 2, 2) * 2,
        MultivariateNormal(LOGITS[:, :2], precision_matrix=COVARIANCE * 2),
    ),
    "multivariate normal scale_tril": (
        MultivariateNormal(LOGITS[:, :2], scale_tril=COVARIANCE.tril()), "loc", LOGITS[:, :2] * 2,
        MultivariateNormal(LOGITS[:, :2] * 2, scale_tril=COVARIANCE.tril()),
    ),
    "transformed": (
        TransformedDistribution(Normal(LOGITS, PROBS), [TanhTransform(cache_size=1)]), "base_dist.loc", LOGITS / 2,
        TransformedDistribution(Normal(LOGITS / 2, PROBS), [TanhTransform(cache_size=1)]),
    ),
    "mixture weights": (
        MixtureSameFamily(Categorical(logits=LOGITS), Normal(LOGITS, PROBS)), "mixture_distribution.logits", LOGITS * 2,
        MixtureSameFamily(Categorical(logits=LOGITS * 2), Normal(LOGITS, PROBS)),
    ),
    "mixture components": (
        MixtureSameFamily(Categorical(logits=LOGITS), Normal(LOGITS, PROBS)), "component_distribution.scale", PROBS * 2,
        MixtureSameFamily(Categorical(logits=LOGITS), Normal(LOGITS, PROBS * 2)),
    ),
    "relaxed one-hot": (
        RelaxedOneHotCategorical(torch.tensor(0.5), logits=LOGITS), "logits", LOGITS * 2,
        RelaxedOneHotCategorical(torch.tensor(0.5), logits=LOGITS * 2),
    ),
    "relaxed bernoulli temperature": (
        RelaxedBernoulli(torch.tensor(0.5), probs=PROBS), "temperature", torch.tensor(2.0),
        RelaxedBernoulli(torch.tensor(2.0), probs=PROBS),
    ),
    "multinomial": (
        Multinomial(5, logits=LOGITS), "logits", LOGITS * 2, Multinomial(5, logits=LOGITS * 2),
    ),
}  # fmt: skip


@pytest.fixture(params=list(DISTRIBUTIONS))
def distribution(request):
    built, name, parameter, expected = DISTRIBUTIONS[request.param]
    return built, tuple(Attr(part) for part in name.split(".")), parameter, expected


def inside(tree: Any) -> set[str]:
    return {path_text(path) for path, _ in leaves(tree)}


def test_a_distribution_has_its_parameter_as_a_leaf(distribution):
    built, path, _, _ = distribution
    assert path_text(path) in inside(built)


def test_a_distribution_has_no_leaf_that_was_derived_from_another(distribution):
    built, *_ = distribution
    for alternatives in ({"probs", "logits"}, {"covariance_matrix", "precision_matrix", "scale_tril"}):
        names = [path[-1].name for path, _ in leaves(built) if path[-1].name in alternatives]
        assert len(names) <= 1


def test_a_replaced_parameter_gives_the_distribution_built_with_it(distribution):
    built, path, parameter, expected = distribution
    changed = replace(built, path, parameter)
    torch.manual_seed(0)
    sample = expected.sample().clone()  # a transform knows the inverse of the very sample it drew
    assert type(changed) is type(expected)
    torch.testing.assert_close(changed.log_prob(sample), expected.log_prob(sample), rtol=0, atol=0)


def test_replacing_a_parameter_leaves_the_old_distribution_as_it_was(distribution):
    built, path, parameter, _ = distribution
    before = {p: leaf.clone() for p, leaf in leaves(built)}
    replace(built, path, parameter)
    assert all(torch.equal(leaf, before[p]) for p, leaf in leaves(built))


def test_a_deep_copy_of_a_distribution_is_built_with_the_same_parameter(distribution):
    built, *_ = distribution
    assert inside(copy.deepcopy(built)) == inside(built)


@pytest.mark.parametrize("validate", [True, False])
def test_a_rebuilt_distribution_validates_as_the_old_one_did(validate):
    built = Categorical(logits=LOGITS, validate_args=validate)
    assert replace(built, (Attr("logits"),), LOGITS)._validate_args is validate


def test_gradients_flow_through_a_rebuilt_distribution_to_the_new_parameter():
    parameter = LOGITS.clone().requires_grad_()
    replace(Categorical(logits=LOGITS), (Attr("logits"),), parameter).log_prob(torch.tensor([0, 1])).sum().backward()
    by_hand = LOGITS.clone().requires_grad_()
    by_hand.log_softmax(-1)[[0, 1], [0, 1]].sum().backward()
    torch.testing.assert_close(parameter.grad, by_hand.grad)


def test_a_rebuilt_distribution_is_one_that_torch_knows():
    rebuilt = replace(Independent(Normal(LOGITS, PROBS), 1), (Attr("base_dist"), Attr("loc")), LOGITS + 1)
    divergence = kl_divergence(rebuilt, Independent(Normal(LOGITS, PROBS), 1))
    torch.testing.assert_close(divergence, (1 / PROBS.square() / 2).sum(-1))


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ((t(2),), (Item(1),)),
        ({"a": t(2)}, (Item("b"),)),
        (Heads(t(2), t(3)), (Attr("logits"),)),
        (t(2), (Attr("no_such"),)),
    ],
    ids=["tuple", "dict", "named tuple", "tensor"],
)
def test_a_place_that_does_not_exist_is_an_error(tree, path):
    with pytest.raises((LookupError, AttributeError, TypeError)):
        get(tree, path)


@dataclass
class Sum:
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        self.total = self.left + self.right


def test_what_a_dataclass_derives_is_derived_anew():
    left, right, new = t(1), t(1), t(1)
    before = Sum(left, right)
    assert torch.equal(replace(before, (Attr("left"),), new).total, new + right)
    assert torch.equal(before.total, left + right)


def test_a_distribution_of_another_class_is_not_rebuilt():
    masked = MaskedCategorical(logits=LOGITS, masks=MASKS)
    with pytest.raises(UnsupportedModelError) as caught:
        replace(masked, (Attr("logits"),), LOGITS)
    assert str(caught.value).startswith("MaskedCategorical is not a torch.distributions class, so chanpatch cannot")


def test_the_probabilities_of_a_distribution_built_from_logits_can_be_replaced():
    new = LOGITS.softmax(-1).flip(-1)
    torch.testing.assert_close(replace(Categorical(logits=LOGITS), (Attr("probs"),), new).probs, new)


def test_a_read_only_mapping_can_be_read_but_not_rebuilt():
    output = MappingProxyType({"a": t(2)})
    assert [path for path, _ in leaves(output)] == [(Item("a"),)]
    with pytest.raises(UnsupportedModelError, match="Use a dict instead"):
        replace(output, (Item("a"),), t(3))


@dataclass
class Holding:
    inner: list[int]


def test_an_output_has_containers_of_its_own_all_the_way_down() -> None:
    tensor = torch.zeros(1)
    before = (tensor, [tensor, {"a": [1]}], OrderedDict(b=[2]), Holding([3]))
    after = fresh(before)
    after[1][1]["a"].append(0)
    after[2]["b"].append(0)
    after[3].inner.append(0)
    assert before[1][1] == {"a": [1]} and before[2] == OrderedDict(b=[2]) and before[3] == Holding([3])
    assert after[0] is tensor and after[1][0] is tensor and type(after[2]) is OrderedDict
    pair = (tensor, tensor)
    assert fresh(pair) is pair
