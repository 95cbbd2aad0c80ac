"""Predict labels from channel sums, in distribution and under distribution shift.

    sums = channel_sums(points, observations, "embedder.relu3")      # (input, channel)
    label_channels(sums, directions, names=("UP", "DOWN", "LEFT", "RIGHT"), seed=0)
    probe = ThresholdProbe.fit(sums[:, 121], directions == 0)
    probe.transfer(shifted_sums[:, 121], shifted_directions == 0)

A threshold or a label is chosen on one half of the inputs and scored on the other half. Inputs are treated as
independent, so use only one input per level; with several inputs per level, the intervals are too narrow.
"""

from .labels import ChannelLabel, ChannelLabels, label_channels
from .linear import LinearProbe, linear_probe
from .logistic import LogisticProbe, ProbeScores
from .sums import channel_sums
from .threshold import ThresholdProbe, ThresholdScores, Transfer

__all__ = [
    "ChannelLabel", "ChannelLabels", "LinearProbe", "LogisticProbe", "ProbeScores", "ThresholdProbe",
    "ThresholdScores", "Transfer", "channel_sums", "label_channels", "linear_probe",
]  # fmt: skip
