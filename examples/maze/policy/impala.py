"""The maze policy's network: IMPALA's convolutional network with a head for the actions and one for the value.

Its parameters have the names of the published checkpoints, and its modules those of procgen-tools.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.distributions import Categorical

CHANNELS = (16, 32, 32)  # after each block, at width 1
FEATURES = 256


class Impala(nn.Module):
    """A policy that maps float32 (batch, channel=3, row=64, col=64) to a Categorical and the value (batch,).

    At width 1, `embedder.relu3` has 32 channels, (batch, channel, row=8, col=8). The published network has width 4.

    References:
        Espeholt et al. 2018, "IMPALA: Scalable distributed deep-RL with importance weighted actor-learner
        architectures", figure 3.
    """

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        one, two, three = (width * channels for channels in CHANNELS)
        self.embedder = nn.Sequential(
            OrderedDict(
                block1=_block(3, one),
                block2=_block(one, two),
                block3=_block(two, three),
                relu3=nn.ReLU(),
                flatten=nn.Flatten(),
                fc=nn.Linear(three * 8 * 8, FEATURES),
                reluflatten=nn.ReLU(),
            )
        )
        self.embedder.apply(_initialize)
        self.fc_policy = _head(actions, gain=0.01)
        self.fc_value = _head(1, gain=1.0)

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        """Return the distribution of the action and the value."""
        features = self.embedder(observations)
        return Categorical(logits=self.fc_policy(features).log_softmax(1)), self.fc_value(features).reshape(-1)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.relu1, self.conv1 = nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        self.relu2, self.conv2 = nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        self.resadd = _Sum()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.resadd(self.conv2(self.relu2(self.conv1(self.relu1(inputs)))), inputs)


class _Sum(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(before, after, 3, padding=1),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1),
            res1=_Residual(after),
            res2=_Residual(after),
        )
    )


def _head(outputs: int, gain: float) -> nn.Linear:
    head = nn.Linear(FEATURES, outputs)
    nn.init.orthogonal_(head.weight, gain)
    nn.init.zeros_(head.bias)
    return head


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
