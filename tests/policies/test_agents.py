"""Policies that are plain objects, or functions that use them: their state is restored, their modules are checked."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from policies import Drifting, same
from torch import nn

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts, rollout
from chanpatch.errors import EditError, RolloutError

NETWORK = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
SETTINGS = {"max_steps": 30, "outputs": "logits"}


def walks(num_envs):
    return SyncVectorEnv([functools.partial(Drifting, (4,), 2)] * num_envs)


class Agent:
    """An agent that is not a module; its logits depend on all of its calls so far."""

    def __init__(self):
        self.net, self.inner = NETWORK, SimpleNamespace(calls=0)
        self.hidden = self.generator = None

    def act(self, observations):
        self.inner.calls += 1
        hidden = torch.zeros(1, 4) if self.hidden is None else self.hidden
        self.hidden = 0.8 * hidden + observations.mean(0, keepdim=True)
        noise = 0 if self.generator is None else torch.randn(1, 4, generator=self.generator)
        return 5 * self.net(observations + self.hidden + noise + self.inner.calls % 3)

    def __call__(self, observations):
        return self.act(observations)


class Memory(nn.Module):
    """A module that keeps its state in a plain object."""

    def __init__(self):
        super().__init__()
        self.agent = Agent()

    def forward(self, observations):
        return self.agent.act(observations)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, activation):
        self.calls += 1
        return activation * (self.calls % 3)


def drawing_agent():
    agent = Agent()
    agent.generator = torch.Generator().manual_seed(0)
    return agent


def generator_in_a_closure():
    generator = np.random.default_rng(0)
    return lambda observations: NETWORK(observations) + torch.from_numpy(generator.normal(size=2)).float() * 5


def nonlocal_variable():
    calls = 0

    def act(observations):
        nonlocal calls
        calls += 1
        return NETWORK(observations) * (calls % 3 - 1)

    return act


def attribute_of_a_function():
    def act(observations):
        act.calls += 1
        return NETWORK(observations) * (act.calls % 3 - 1)

    act.calls = 0
    return act


def algorithm():
    agent = Agent()
    holder = SimpleNamespace(agent=[agent])
    return lambda observations: holder.agent[0].act(observations)


def edited(function):
    points = hook_points(NETWORK, torch.zeros(2, 4))
    return PatchedPolicy(points, edit(points.site("1"), function))


def edit_with_state():
    agent = SimpleNamespace(calls=0)

    def every_third(activation):
        agent.calls += 1
        return activation * (agent.calls % 3)

    return edited(every_third)


STATEFUL = {
    "object": Agent,
    "method": lambda: Agent().act,
    "partial": lambda: functools.partial(Agent().act),
    "generator in an attribute": drawing_agent,
    "generator in a closure": generator_in_a_closure,
    "nonlocal variable": nonlocal_variable,
    "attribute of a function": attribute_of_a_function,
    "agent inside an algorithm": algorithm,
    "object on a module": Memory,
    "edit that uses an object": edit_with_state,
    "module as edit": lambda: edited(Counting()),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_policy_with_state_outside_modules_twice_has_equal_episodes(name):
    policy = STATEFUL[name]()
    pairs = paired_rollouts({"one": policy, "same": policy}, walks(1), range(6), **SETTINGS)
    assert same(pairs["one"], pairs["same"])
    assert same(pairs["one"], rollout(policy, walks(1), range(6), **SETTINGS))
    each = [rollout(policy, walks(1), [seed], **SETTINGS).returns[0] for seed in range(6)]
    if "generator" not in name:  # draws go on from one episode to the next
        assert each == pairs["one"].returns.tolist()


def test_the_state_of_an_agent_is_put_back_and_its_environments_are_not():
    agent, envs = Agent(), walks(2)
    agent.hidden = start = torch.ones(1, 4)
    agent.envs, agent.game = envs, envs.envs[0].unwrapped
    agent.level = agent.game.level = SimpleNamespace(steps=0)
    stepped, step = [], agent.game.step

    def counted(action):
        agent.level.steps += 1
        stepped.append(action)
        return step(action)

    agent.game.step = counted
    rollout(agent, envs, range(3), **SETTINGS)
    assert agent.hidden is start
    assert agent.inner.calls == 0
    assert torch.equal(start, torch.ones(1, 4))
    assert agent.level.steps == len(stepped) > 0
    assert agent.game.left < 12


def test_a_list_in_a_closure_is_a_log():
    seen = []
    rollout(
        lambda observations: NETWORK(observations + 0 * len(seen) * (seen.append(1) is None)), walks(2), [1], **SETTINGS
    )
    assert seen


def test_modes_of_networks_inside_plain_objects_are_compared():
    agents = {name: SimpleNamespace(net=nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))) for name in ("one", "other")}
    agents["other"].net.eval()
    acting = {name: lambda observations, agent=agent: agent.net(observations) for name, agent in agents.items()}
    with pytest.raises(RolloutError, match=r"In 'one', '0' \(Dropout\) is in training mode, but in"):
        paired_rollouts(acting, walks(2), range(4), **SETTINGS)


class Edit:
    def __call__(self, activation):
        return activation


def test_twins_inside_plain_objects_do_not_share_a_callable_object():
    shared = Edit()
    agents = {name: Agent() for name in "ab"}
    for agent in agents.values():
        agent.net = edited(shared)
    with pytest.raises(EditError, match="Edit is used under two labels, 'a' and 'b'"):
        paired_rollouts(agents, walks(2), range(4), **SETTINGS)


def test_a_twin_inside_a_plain_object_does_not_read_the_environments_by_episode():
    agent, envs = Agent(), walks(2)
    agent.net = PatchedPolicy(
        NETWORK,
        edit(
            hook_points(NETWORK, torch.zeros(2, 4)).site("1"),
            torch.clone,
            where=lambda context: len(envs.envs) > context.rows.view(-1, 1),
        ),
    )
    with pytest.raises(RolloutError, match="uses the environments and context.rows"):
        rollout(agent, envs, range(4), **SETTINGS)


model = nn.Sequential(nn.Dropout(0.5))  # in training mode; only attributes have its name


def test_a_global_that_is_named_like_an_attribute_is_not_part_of_a_function():
    holder = SimpleNamespace(model=nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).eval())
    acting = {"one": lambda x: holder.model(x), "copy": copy.deepcopy(holder.model)}
    pairs = paired_rollouts(acting, walks(2), range(4), **SETTINGS)
    assert same(pairs["one"], pairs["copy"])


def test_a_global_in_a_comprehension_is_part_of_a_function():
    with pytest.raises(RolloutError, match=r"In 'one', '0' \(Dropout\) is in eval mode, but in 'in training'"):
        paired_rollouts(
            {"one": copy.deepcopy(model).eval(), "in training": lambda x: [model(each) for each in [x]][0]},
            walks(2),
            range(4),
            **SETTINGS,
        )
