"""Patches as data: saved in a file, loaded without running any code, and replayed bit for bit.

    save("channel_55.safetensors", patches, points, inputs=observations)   # with a receipt of what they gave
    patches = load("channel_55.safetensors", points)                       # checked against the hook points
    verify("channel_55.safetensors", points, observations)                 # same weights, inputs and output

A file is one in the format of safetensors: the operands and masks as tensors, and all else as JSON in its metadata.
"""

from ._files import Contents, contents, load, save, verify
from ._format import TracedPoint
from ._receipts import Receipt

__all__ = ["Contents", "Receipt", "TracedPoint", "contents", "load", "save", "verify"]
