"""What a recovery minimises: the loss of a batch, as a module, so that processes can share it.

loss = (1 - d) · task loss + d · distance to the teachers + their features + penalties
       + price · bytes of the file
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from taut.aim import Price
from taut.distillation import Distillation, Teachers
from taut.errors import RecipeError
from taut.modules import device_of
from taut.regularise import Regularise
from taut.rounded_gradients import QuantizeGradients
from taut.task import Batch, Task
from taut.technique import Setting
from taut.training import Training

S = TypeVar("S", bound=Setting)


def setting(settings: Sequence[Setting], kind: type[S]) -> S:
    """The one of this kind that is in force, or else its defaults."""
    return next((s for s in settings if isinstance(s, kind)), kind())


class Objective(nn.Module):
    """The network, what it learns from, and the loss of a batch, a scalar.

    Its parameters are the network's and those of the teachers' projections. dtype: of products.
    """

    def __init__(
        self, model: nn.Module, task: Task, settings: Sequence[Setting],
        teachers: Sequence[nn.Module], *, share: float, temperature: float, bytes_weight: float,
        launched: str, folder: Path | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.task, self.settings = model, task, settings
        self.training_options = setting(settings, Training)
        self.dtype = self.training_options.dtype(launched)
        options = setting(settings, Distillation)
        if options.features and not teachers:
            raise RecipeError(
                f"distillation: features={options.features!r} need a network to match; give "
                "recover(..., teacher=...)"
            )
        self.hooks = [
            hook for s in settings if isinstance(s, QuantizeGradients) for hook in s.attach(model)
        ]
        self.price = Price(model, bytes_weight, settings)
        self.teachers: Teachers | None = None
        if teachers and (share > 0 or options.features):
            self.teachers = Teachers(
                model, teachers, task, options, share=share, temperature=temperature,
                autocast=self.autocast, precision=self.dtype, folder=folder,
            )  # fmt: skip

    def autocast(self) -> AbstractContextManager[None]:
        """Products in `dtype`, where that is not float32."""
        on = self.dtype != torch.float32
        return torch.autocast(device_of(self.model).type, self.dtype if on else None, enabled=on)

    def forward(self, batch: Batch, progress: float) -> Tensor:
        """The loss of one batch; progress: how far the training has come, from 0 to 1."""
        with self.autocast():
            output = self.model(*batch.args, **batch.kwargs)
        output = convert_to_fp32(output)
        loss = self.training_options.loss_of(self.task, output, batch.target)
        if self.teachers is not None:
            loss = self.teachers(loss, output, batch)
        for penalty in self.settings:
            if isinstance(penalty, Regularise):
                loss = loss + penalty.penalty(self.model)
        return loss + self.price.cost(self.model, progress)

    def end_epoch(self) -> None:
        """What the teachers said is kept, where that was asked."""
        if self.teachers is not None:
            self.teachers.end_epoch()

    def close(self) -> None:
        """Leave the networks as they were."""
        for hook in self.hooks:
            hook.remove()
        if self.teachers is not None:
            self.teachers.close()
