"""Receipts: digests of a run with patches, used to check whether another run is identical bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engine.inputs import Inputs, batches
from ..engine.paths import leaves
from ..engine.state import undisturbed
from ..errors import InterventionError
from ..patching.contexts import patched
from ..patching.patch import Patch
from ..registry.names import path_text
from ..registry.points import HookPoints


@dataclass(frozen=True)
class Receipt:
    """Digests of a run with patches. Two receipts are equal if the two runs were identical bit for bit.

    Attributes:
        weights, inputs, output: SHA-256 of the name, dtype, shape and bytes of every tensor in the model's
            `state_dict`, in the inputs, and in the patched output, respectively.
        environment: Version of torch, devices, number of threads and training mode. Different environments can
            explain differences in the last bits of the output, but are ignored when two receipts are compared.
    """

    weights: str
    inputs: str
    output: str
    environment: str = field(compare=False)


def receipt_of(points: HookPoints, patches: Sequence[Patch], inputs: Inputs) -> Receipt:
    """Run the patched model with random seed 0, and return a receipt; raise an error if the output has no tensor."""
    model = points.model
    ((args, keywords),) = batches([inputs], batch_size=1)
    with undisturbed(model) as run, patched(points, patches, check_nan=False):
        _seed(model)
        output = run.kept(points.run(args, keywords))
        if next(leaves(output), None) is None:
            raise InterventionError(
                f"The model's output ({type(output).__name__}) contains no tensors, so there is nothing to compare. "
                "Save without inputs, or trace a method that returns a tensor: hook_points(..., method=...)."
            )
    return Receipt(digest(model.state_dict()), digest((args, keywords)), digest(output), _environment(points))


def _seed(model: nn.Module) -> None:
    """Set the seed to 0 in every random number generator that `undisturbed` restores."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    for device in {each.device for each in itertools.chain(model.parameters(), model.buffers()) if each.is_cuda}:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def digest(tree: Any) -> str:
    """Return one SHA-256 of the names, dtypes, shapes and bytes of all tensors in nested containers, sorted by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(((path_text(path), leaf) for path, leaf in leaves(tree)), key=lambda pair: pair[0]):
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        found.update(f"{name} {dense.dtype} {tuple(dense.shape)}\n".encode())
        if not dense.is_meta:  # offloaded weights are on the meta device, which stores no values
            flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _environment(points: HookPoints) -> str:
    devices = {point.device for point in points.values()}
    named = {torch.cuda.get_device_name(each) if each.type == "cuda" else each.type for each in devices}
    mode = "train" if points.model.training else "eval"
    return f"torch {torch.__version__}, {', '.join(sorted(named))}, {torch.get_num_threads()} threads, {mode} mode"
