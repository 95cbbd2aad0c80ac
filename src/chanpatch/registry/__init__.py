"""Hook-point registry: all places in a model where activations can be read or written.

points = hook_points(model, observations)
points.site("embedder.relu3", channel=55)
"""

from ..engine.calls import tap
from ..views import View, view
from .bases import PCA, Directions
from .points import HookPoints, hook_points
from .sites import HookPoint, Site

__all__ = ["PCA", "Directions", "HookPoint", "HookPoints", "Site", "View", "hook_points", "tap", "view"]
