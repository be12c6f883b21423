"""One run of a network on its example, and the shapes that its layers gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from taut.modules import device_of, to_device
from taut.trace import Example

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """The shapes of what each innermost module with tensors gave last, and of the outputs.

    steps: the operations that computed, in order, by name.
    """

    widths: Shapes
    outputs: list[tuple[int, ...]]
    steps: list[str]


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that makes numbers; views come and go with sizes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and str(func).split(".")[1] not in _COPIES:
            self.steps.append(str(func))
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, example: Example) -> Ran:
    """Run a network on its example, in eval mode; it is left as it was."""
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
        listener = _Listener()
        with torch.no_grad(), listener:
            out = model.eval()(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, was in training.items():
            module.training = was
        for hook in hooks:
            hook.remove()
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
    outputs = [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
    return Ran(widths=widths, outputs=outputs, steps=listener.steps)


_COPIES = {"clone", "_unsafe_view", "copy_", "contiguous", "_reshape_alias", "as_strided"}
