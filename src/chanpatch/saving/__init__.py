"""Patches as data: saved in a file, loaded without running any code, and replayed bit for bit.

    save("channel_55.safetensors", patches, points, inputs=observations)   # with a receipt of the patched run
    patches = load("channel_55.safetensors", points)                       # checked against the hook points
    verify("channel_55.safetensors", points, observations)                 # same weights, inputs and output

The file format is safetensors: operands and masks are tensors, and the rest is JSON in the metadata.
"""

from .files import Contents, contents, load, save, verify
from .format import TracedPoint
from .receipts import Receipt

__all__ = ["Contents", "Receipt", "TracedPoint", "contents", "load", "save", "verify"]
