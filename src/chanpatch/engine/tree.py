"""A model's tree of modules: names, paths from the root, and fast checks that hooks on the modules will run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedModelError


class Step(NamedTuple):
    """One step on the path from the root of a model to one of the model's modules.

    `children` is the parent's dict of child modules, and `key` is the key of `module` in this dict.
    """

    name: str
    children: dict[str, nn.Module | None]
    key: str
    module: nn.Module


class Tree:
    """A model's modules as they were when the tree was built.

    Attributes:
        modules: Dict that maps full names to modules. A module with several names is in the dict once per name.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self._own = [vars(module) for module in self.modules.values()]
        self._children = [module._modules for module in self.modules.values()]
        self._expected = [dict(children.items()) for children in self._children]
        self._paths: dict[str, list[Step]] = {}

    def has_changed(self) -> bool:
        """Return whether a module has been added, removed or replaced since the tree was built."""
        return self._children != self._expected

    def path(self, name: str) -> list[Step]:
        """Return one Step per module on the path from the root (excluded) to the module called `name` (included)."""
        if name and name not in self._paths:
            parent, _, key = name.rpartition(".")
            step = Step(name, self.modules[parent]._modules, key, self.modules[name])
            self._paths[name] = [*self.path(parent), step]
        return self._paths[name] if name else []

    def refuse_unhookable(self) -> None:
        """Raise UnsupportedModelError if a module would ignore hooks."""
        for name, module in self.modules.items():
            if why := _unhookable(module):
                raise UnsupportedModelError(f"{repr(name) if name else 'The model'} {why}")

    def refuse_compiled(self) -> None:
        """Raise UnsupportedModelError if a module has been compiled in place since the tree was built."""
        if any(["_compiled_call_impl" in own or "forward" in own for own in self._own]):
            self.refuse_unhookable()


def _unhookable(module: nn.Module) -> str:
    """Return the reason why a module would ignore hooks, or an empty string if the module would run hooks."""
    if "_orig_mod" in module._modules:
        why = "is compiled with torch.compile, so hooks added after the first call are ignored. Pass the original "
        return why + "module (compiled._orig_mod), or compile a PatchedPolicy created from the original module."
    if module._compiled_call_impl or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        why = "was compiled in place, so hooks added now are ignored. Use an uncompiled copy, or compile a "
        return why + "PatchedPolicy created from an uncompiled copy."
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module, which runs submodules without hooks. Pass the original Python module."
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        why = f"is a DataParallel over {len(module.device_ids)} devices, which runs copies of the wrapped module. "
        return why + "Pass the wrapped module (.module), and use one device."
    return ""
