"""Hook-point registry: all places in a model where activations can be read or written.

points = hook_points(model, observations)
points.site("embedder.relu3", channel=55)
"""

from ..engine.calls import tap
from .points import HookPoints, hook_points
from .sites import HookPoint, Site

__all__ = ["HookPoint", "HookPoints", "Site", "hook_points", "tap"]
