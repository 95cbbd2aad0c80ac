"""chanpatch beside its peers: one module per peer, each with a class of the same few methods.

A peer gets a model of its own, since some leave traces in it, and does each piece of work the way its documentation
does. `make bench` runs `__main__.py`.
"""

import importlib
from types import ModuleType

HANDWRITTEN = ("floor", "loop")
LIBRARIES = ("nnsight", "pyvene", "tdhook", "graphpatch", "captum", "circrl", "transformer_lens")
EXPERT = "nnsight_skip"
PEERS = (*HANDWRITTEN, "chanpatch", *LIBRARIES, EXPERT)


def module_of(peer: str) -> ModuleType:
    """Return the module of a peer, which has its class `Peer` and the name of its distribution.

    Raises:
        ImportError: If the peer is not installed, or does not import beside this torch.
    """
    return importlib.import_module(f"peers.{peer}")
