"""Hook-point registry: every place in a model where an activation can be read or written.

points = hook_points(model, observations)
points.site("embedder.relu3", channel=55)
"""

from ..engine.calls import tap
from .points import HookPoints, hook_points
from .sites import HookPoint, Site

__all__ = ["HookPoint", "HookPoints", "Site", "hook_points", "tap"]
