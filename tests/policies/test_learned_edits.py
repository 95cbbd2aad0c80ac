"""Edits with parameters of their own."""

import copy

import torch
from torch import nn

from chanpatch import Patch, PatchedPolicy, hook_points


class Mask(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, activation):
        return activation * torch.sigmoid(self.weight)


def parts():
    torch.manual_seed(0)
    policy, mask = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), Mask()
    points = hook_points(policy, torch.zeros(2, 4))
    return policy, mask, PatchedPolicy(points, Patch(points.site("1"), mask))


def test_the_parameters_of_a_twin_include_those_of_its_edits():
    policy, mask, twin = parts()
    named = dict(twin.named_parameters())
    assert [*named] == ["0.weight", "0.bias", "2.weight", "2.bias", "patches.0.weight"]
    assert named["patches.0.weight"] is mask.weight is [*twin.parameters()][-1]
    assert dict(twin.named_parameters("agent")).keys() == {f"agent.{name}" for name in named}
    assert [*twin.named_parameters(recurse=False)] == []
    assert twin.state_dict().keys() == policy.state_dict().keys()


def test_a_twin_of_a_twin_and_a_copy_have_the_parameters_of_all_edits():
    _, mask, twin = parts()
    outer = PatchedPolicy(twin, Patch(hook_points(twin, torch.zeros(2, 4)).site("1"), other := Mask()))
    assert [*outer.parameters()][-2:] == [mask.weight, other.weight]
    copied = copy.deepcopy(twin)
    assert len([*copied.parameters()]) == 5
    assert copied.patches[0].edit.weight is [*copied.parameters()][-1] is not mask.weight


def test_a_mask_is_learned_from_the_parameters_of_the_twin():
    policy, mask, twin = parts()
    policy.requires_grad_(False)
    policy[2].weight[:, 3] = 0  # the output does not depend on channel 3
    optimizer = torch.optim.Adam([weight for weight in twin.parameters() if weight.requires_grad], lr=0.3)
    seen = torch.randn(256, 4)
    for _ in range(100):
        loss = (twin(seen) - policy(seen)).square().mean() + 1e-3 * torch.sigmoid(mask.weight).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.sigmoid(mask.weight).argmin() == 3


def test_a_module_whose_forward_has_a_context_gets_the_context():
    class Rows(nn.Module):
        def forward(self, activation, *, context):
            return activation * (context.rows > 0)[:, None]

    policy, seen = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), torch.randn(3, 4)
    twin = PatchedPolicy(points := hook_points(policy, seen), Patch(points.site("1"), Rows()))
    wanted = policy(seen)
    wanted[0] = 0
    assert torch.equal(twin(seen), wanted)
