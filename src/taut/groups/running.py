"""One run of a network on its example, and the shapes that its layers gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut.modules import device_of, to_device
from taut.trace import Example

Shapes = dict[str, tuple[int, ...]]


def run(model: nn.Module, example: Example) -> tuple[Shapes, list[tuple[int, ...]]]:
    """The shapes of what each innermost module with tensors gives last, and of the outputs."""
    widths: Shapes = {}
    hooks = []
    for path, module in model.named_modules():
        if path and not list(module.children()) and any(True for _ in module.parameters()):

            def seen(_m: nn.Module, _a: Any, out: Any, path: str = path) -> None:
                if isinstance(out, Tensor):
                    widths[path] = tuple(out.shape)

            hooks.append(module.register_forward_hook(seen))
    training = {m: m.training for m in model.modules()}
    device = device_of(model)
    args = tuple(to_device(a, device) for a in example[0])
    kwargs = {k: to_device(v, device) for k, v in example[1].items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it runs by other rules than the layers
        with torch.no_grad():
            out = model.eval()(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, was in training.items():
            module.training = was
        for hook in hooks:
            hook.remove()
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
    return widths, [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
