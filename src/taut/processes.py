"""Several processes that train together (accelerate launch, torchrun): who does what.

Every process runs the same program. The main one measures and writes; the others learn from it
what came out, so that all decide alike.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

# Before there is a group: its functions take the group of the moment as an argument's default, and
# would hold it to the very end if PyTorch imported them later.
import torch.distributed.nn.functional
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

T = TypeVar("T")


def state() -> PartialState:
    """What accelerate knows of the processes; without an accelerator they talk by gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


@atexit.register
def part() -> None:
    """Hang up while Python still runs; nothing can be sent or gathered afterwards.

    A thread of gloo's lets go of the tensors it sent a while after they arrived. Where Python is
    already ending by then, that aborts the process ("terminate called without an active
    exception"; pytorch/pytorch#190489). The end of the group joins its threads, so nothing may
    hold the group any longer, not even in a cycle.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that measures and writes; true where there is one only."""
    return bool(state().is_main_process)


def count() -> int:
    """How many processes train together."""
    return int(state().num_processes)


def index() -> int:
    """Which of the processes this is; the main one is 0."""
    return int(state().process_index)


def all_agree(here: bool, device: torch.device) -> bool:
    """Whether it is so in every process."""
    if count() == 1:
        return here
    flag = torch.tensor(int(here), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def once(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in all of them; what it raises is raised in all."""
    if count() == 1:
        return make()
    found: list[Any] = [None, None]
    if is_main():
        try:
            found = [make(), None]
        except Exception as error:
            found = [None, error]
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]  # type: ignore[no-any-return]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    return gather_object([value]) if count() > 1 else [value]


def share(items: Iterable[T]) -> Iterator[T]:
    """This process's part of what every process reads alike: one item of each round.

    Where the items do not come out even, the last round takes from the first ones again, so that
    all processes take as many steps.
    """
    here, every = state().process_index, count()
    first: list[T] = []
    last = -1
    for last, item in enumerate(items):
        if len(first) < every:
            first.append(item)
        if last % every == here:
            yield item
    missing = -(last + 1) % every
    if here >= every - missing:
        yield first[(here - (every - missing)) % len(first)]


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if count() > 1:
        for tensor in model.state_dict().values():
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            torch.distributed.broadcast(raw, 0)
            tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def align_random() -> None:
    """Give every process the main one's random numbers, so that all read the data alike."""
    if count() > 1:
        torch.set_rng_state(once(torch.get_rng_state))
