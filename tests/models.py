"""Models, tiny and named for their trouble, each with a function that draws inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical


class Model(NamedTuple):
    """A model under test.

    Attributes:
        module: In eval mode.
        inputs: Draws inputs with so many rows.
        site: A hook point with a channel or feature axis, in the middle of the model.
    """

    module: nn.Module
    inputs: Callable[[int], tuple[Any, ...]]
    site: str


def images(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 3, 8, 8),)


def vectors(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 6),)


def sequences(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 5, 6),)


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(8 * 8 * 8, 4)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.relu2(self.conv2(self.relu1(self.conv1(image))))
        return self.fc(hidden.flatten(1))


class InplaceReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 4, 3)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.relu2(self.conv2(self.relu1(self.conv1(image)))).mean((2, 3))


class SharedModule(nn.Module):
    """One ReLU that is called twice, and one Linear that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 6)
        self.tied = self.fc2
        self.relu = nn.ReLU()

    def forward(self, vector: Tensor) -> Tensor:
        return self.relu(self.fc2(self.relu(self.fc1(vector))))


class TupleOutput(nn.Module):
    """A policy: returns a distribution, built from logits that are not normalised, and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.relu = nn.ReLU()
        self.policy_head = nn.Linear(8, 4)
        self.value_head = nn.Linear(8, 1)

    def forward(self, vector: Tensor) -> tuple[Categorical, Tensor]:
        hidden = self.relu(self.body(vector))
        return Categorical(logits=self.policy_head(hidden)), self.value_head(hidden).squeeze(-1)


@dataclass
class Memory:
    mean: Tensor
    spread: Tensor


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, vector: Tensor) -> dict[str, Any]:
        hidden = self.fc(vector).relu()
        return {"hidden": hidden, "memory": Memory(hidden.mean(-1), hidden.std(-1)), "layers": [hidden * 2, hidden * 3]}


class DictOutput(nn.Module):
    """A dict with a dataclass and a list inside, used by what comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(8, 4)

    def forward(self, vector: Tensor) -> dict[str, Tensor]:
        found = self.encoder(vector)
        return {"logits": self.head(found["hidden"] + found["layers"][1]) + found["memory"].mean[:, None]}


class LSTMPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, sequence: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(sequence).tanh())
        return self.head(hidden[:, -1])


class ResidualAdd(nn.Module):
    """The sum of a block and its input, taken by a functional result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        stem = self.conv1(image)
        return self.fc(self.relu(stem + self.block(stem)).amax((2, 3)))


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(image)).relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, sequence: Tensor) -> Tensor:
        hidden = self.embed(sequence)
        mixed, _ = self.attention(hidden, hidden, hidden)
        return self.head(self.norm(hidden + mixed))[:, -1]


MODELS: dict[str, tuple[type[nn.Module], Callable[[int], tuple[Any, ...]], str]] = {
    "plain_cnn": (PlainCNN, images, "relu1"),
    "inplace_relu": (InplaceReLU, images, "conv1"),
    "shared_module": (SharedModule, vectors, "relu#0"),
    "tuple_output": (TupleOutput, vectors, "relu"),
    "dict_output": (DictOutput, vectors, 'encoder.out["hidden"]'),
    "lstm_policy": (LSTMPolicy, sequences, "lstm.out[0]"),
    "residual_add": (ResidualAdd, images, "relu"),
    "batch_norm": (BatchNorm, images, "norm"),
    "attention": (Attention, sequences, "attention.out[0]"),
}


def build(name: str) -> Model:
    kind, inputs, site = MODELS[name]
    torch.manual_seed(0)
    return Model(kind().eval(), inputs, site)
