"""The models, their inputs, and each forward once more, unrolled by hand for the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from maze.policy.network import new_policy
from peers.interface import Work, Write

LAST_CONVOLUTIONAL = "embedder.relu3"

Step = tuple[str, Callable[[dict[str, Any]], Any]]


class MLPPolicy(nn.Module):
    """A policy so small that what a library adds to its forward shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 32)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(32, 32)
        self.relu2 = nn.ReLU()
        self.head = nn.Linear(32, 4)
        self.unused = nn.Linear(32, 32)  # is never called

    def forward(self, observation: Tensor) -> Tensor:
        return self.head(self.relu2(self.fc2(self.relu1(self.fc1(observation)))))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.mixed = nn.Identity()  # (batch, head, position, feature): a hook point before the heads are joined
        self.join = nn.Linear(width, width)

    def mix(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ value

    def joined(self, mixed: Tensor) -> Tensor:
        return self.join(mixed.transpose(1, 2).flatten(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.joined(self.mixed(self.mix(hidden)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class Transformer(nn.Module):
    """A decoder like GPT-2, with two layers. Takes tokens `(batch, position)`, returns logits of the next one."""

    def __init__(self, vocabulary: int = 100, positions: int = 32, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def impala(*, width: int, observations: int, channels: int | None = None) -> Work:
    """Return zero ablations of single channels at the last convolutional hook point of a maze policy.

    Args:
        width: 1 gives 32 channels there, 4 gives 128.
        observations: How many, `(observation, 3, 64, 64)`.
        channels: How many of them are ablated; all if None.
    """
    torch.manual_seed(0)
    policy = new_policy(width).eval()
    nn.init.orthogonal_(policy.fc_policy.weight)  # it starts so small that no patch would change an action
    writes = [Write(LAST_CONVOLUTIONAL, {1: channel}) for channel in range(channels or 32 * width)]
    return Work(policy, (torch.rand(observations, 3, 64, 64),), _log_probability, writes, impala_steps)


def impala_everywhere(*, observations: int, convolutional: bool, every: int = 1) -> Work:
    """Return zero ablations of single channels at every module's output of a maze policy of width 1.

    Args:
        observations: How many, `(observation, 3, 64, 64)`.
        convolutional: Only outputs with rows and columns; otherwise those with features too.
        every: Take each so many-th of them.
    """
    work = impala(width=1, observations=observations)
    activations = run({"in": work.inputs[0][:1]}, impala_steps(work.model))
    shapes = {point: activation.shape for point, activation in activations.items() if isinstance(activation, Tensor)}
    del shapes["in"]
    writes = [
        Write(point, {1: channel})
        for point, shape in shapes.items()
        if len(shape) == 4 or not convolutional
        for channel in range(shape[1])
    ]
    work.writes = writes[::every]
    return work


def transformer(*, texts: int = 8, positions: int = 32) -> Work:
    """Return the activation of each head at each position patched from clean texts into corrupted ones."""
    torch.manual_seed(0)
    model = Transformer(positions=positions).eval()
    clean = torch.randint(100, (texts, positions))
    corrupted = clean.clone()
    corrupted[:, 1] = (clean[:, 1] + 1) % 100
    point = "blocks.0.attention.mixed"
    source = run({"in": clean}, transformer_steps(model))[point]
    writes = [Write(point, {1: head, 2: position}, source) for head in range(4) for position in range(1, positions)]
    return Work(model, (corrupted,), _last_logit_difference, writes, transformer_steps)


def mlp() -> Work:
    """Return a policy of three layers at batch 1, and one ablation."""
    torch.manual_seed(0)
    return Work(MLPPolicy().eval(), (torch.randn(1, 8),), _first_logit, [Write("relu1", {1: 3})], mlp_steps)


def observation_batches(count: int, batch: int) -> Iterator[Tensor]:
    """Yield so many observations in batches, each drawn when it is asked for."""
    generator = torch.Generator().manual_seed(1)
    for start in range(0, count, batch):
        yield torch.rand(min(batch, count - start), 3, 64, 64, generator=generator)


def run(activations: dict[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """Return the activations with those of the steps added."""
    for name, step in steps:
        activations[name] = step(activations)
    return activations


def impala_steps(policy: nn.Module) -> list[Step]:
    """Return the forward of the maze policy, every module a step."""
    steps: list[Step] = []

    def add(name: str, *sources: str) -> str:
        module = policy.get_submodule(name)
        if len(sources) == 1:  # the common case, spared the list
            steps.append((name, lambda found, source=sources[0]: module(found[source])))
        else:
            steps.append((name, lambda found: module(*[found[source] for source in sources])))
        return name

    last = "in"
    for block in ("embedder.block1", "embedder.block2", "embedder.block3"):
        last = add(f"{block}.maxpool", add(f"{block}.conv", last))
        for residual in (f"{block}.res1", f"{block}.res2"):
            inner = last
            for layer in ("relu1", "conv1", "relu2", "conv2"):
                inner = add(f"{residual}.{layer}", inner)
            last = add(f"{residual}.resadd", inner, last)
    for layer in ("relu3", "flatten", "fc", "reluflatten"):
        last = add(f"embedder.{layer}", last)
    logits, value = add("fc_policy", last), add("fc_value", last)
    steps.append(
        ("out", lambda found: (Categorical(logits=found[logits].log_softmax(dim=1)), found[value].reshape(-1)))
    )
    return steps


def transformer_steps(model: Transformer) -> list[Step]:
    """Return the forward of the transformer, stopping where the heads are mixed."""
    steps: list[Step] = [("hidden0", lambda found: model.embed(found["in"]))]
    for layer, block in enumerate(model.blocks):
        hidden, mixed = f"hidden{layer}", f"blocks.{layer}.attention.mixed"

        def mix(found: dict[str, Any], block: Any = block, hidden: str = hidden) -> Tensor:
            return block.attention.mix(block.norm1(found[hidden]))

        def rest(found: dict[str, Any], block: Any = block, hidden: str = hidden, mixed: str = mixed) -> Tensor:
            after = found[hidden] + block.attention.joined(found[mixed])
            return after + block.mlp(block.norm2(after))

        steps += [(mixed, mix), (f"hidden{layer + 1}", rest)]
    last = f"hidden{len(model.blocks)}"
    return [*steps, ("out", lambda found: model.head(model.norm(found[last])))]


def mlp_steps(model: MLPPolicy) -> list[Step]:
    """Return the forward of the small policy."""
    layers = [(name, model.get_submodule(name)) for name in ("fc1", "relu1", "fc2", "relu2", "head")]
    sources = ["in", *[name for name, _ in layers]]
    return [
        (name, lambda found, source=source, module=module: module(found[source]))
        for source, (name, module) in zip(sources, layers, strict=False)
    ]


def _log_probability(output: tuple[Categorical, Tensor]) -> Tensor:
    return output[0].logits[:, 0]


def _last_logit_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 0] - logits[:, -1, 1]


def _first_logit(logits: Tensor) -> Tensor:
    return logits[:, 0]
