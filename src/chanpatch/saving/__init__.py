"""Save patches as data, load patches without running code, and verify that a patched run is reproduced bit for bit.

save("channel_55.safetensors", patches, points, inputs=observations)   # with a receipt of the patched run
patches = load("channel_55.safetensors", points)                       # checked against the hook points
verify("channel_55.safetensors", points, observations)                 # same weights, inputs and output
"""

from .files import Contents, contents, load, save, verify
from .receipts import Receipt

__all__ = ["Contents", "Receipt", "contents", "load", "save", "verify"]
