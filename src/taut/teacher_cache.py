"""A teacher's outputs on disk, so that it runs once for each example and not once an epoch.

    <folder>/<fingerprint of the teacher>/<digest of the keys>.pt, tensors alone
        keys     [n, 16] uint8: 128-bit hashes of the examples' bytes
        outputs  [n, ...]: the rows that the teacher gave for them

What is read back has the very bits that the teacher gave when it first saw the example. An example
is known by its content: other data, another teacher, precision, device or version of PyTorch are
computed anew. Where an example's output depends on its neighbours in the batch, whole batches are
the examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from taut.errors import RunError
from taut.files import write_atomically
from taut.modules import device_of
from taut.processes import gathered, is_main
from taut.task import Batch

_log = logging.getLogger("taut")

Compute = Callable[[Batch], Tensor]


class TeacherCache:
    """The outputs of one teacher in eval mode. precision: what its products are computed in."""

    def __init__(self, folder: str | Path, teacher: nn.Module, precision: torch.dtype) -> None:
        self.folder = Path(folder) / _fingerprint(teacher, precision)
        self.known: dict[bytes, Tensor] = {}
        self.fresh: dict[bytes, Tensor] = {}
        self.written: list[Path] = []
        self.by_row: bool | None = None
        self.epoch = self.asked = self.found = 0
        self.gave_up = False
        for path in sorted(self.folder.glob("*.pt")):
            self.known |= _read(path)

    def outputs(self, batch: Batch, compute: Compute) -> Tensor:
        """The teacher's outputs for a batch, by `compute` where they are not known."""
        if self.gave_up:
            return compute(batch)
        rows, whole = _row_keys(batch), _whole_key(batch)
        keys = [whole] if rows is None or self.by_row is False else rows
        held = [self._row(k) for k in keys]
        if all(h is not None for h in held):
            return self._note(batch, len(keys), len(keys), _joined(held, keys is rows))
        output = compute(batch)
        if self.by_row is None:
            self.by_row = rows is not None and _independent(batch, output, compute)
            keys = rows if rows is not None and self.by_row else [whole]
        stored = output.detach().cpu()
        new = stored.unbind() if keys is rows else (stored,)
        missing = [self._row(k) is None for k in keys]
        self.fresh |= {k: v for k, v, m in zip(keys, new, missing, strict=True) if m}
        return self._note(batch, len(keys), len(keys) - sum(missing), output)

    def end_epoch(self) -> None:
        """Write what is new, for all processes."""
        for part in gathered(self.fresh):
            if is_main() and part:
                self._write(part)
            self.known |= part
        self.fresh = {}
        self.epoch += 1
        self.asked = self.found = 0

    def _row(self, key: bytes) -> Tensor | None:
        return self.known.get(key, self.fresh.get(key))

    def _note(self, batch: Batch, asked: int, found: int, output: Tensor) -> Tensor:
        """Count what was found; after the first epoch that should be nearly everything."""
        self.asked += asked
        self.found += found
        if self.epoch and 2 * self.found < self.asked:
            _log.warning(
                "distillation: of %d examples of epoch %d the cache holds %d: the data are changed "
                "at random, or shuffled into batches that it must take whole, and cannot be "
                "cached; the teacher runs for each batch", self.asked, self.epoch + 1, self.found,
            )  # fmt: skip
            self.gave_up = True
            for path in self.written:
                path.unlink(missing_ok=True)
            self.known, self.fresh = {}, {}
        device = next((a.device for a in batch.args if isinstance(a, Tensor)), None)
        return output if device is None else output.to(device)

    def _write(self, part: dict[bytes, Tensor]) -> None:
        shapes: dict[tuple[Any, ...], list[bytes]] = {}
        for key, row in part.items():
            shapes.setdefault((row.shape, row.dtype), []).append(key)
        for keys in shapes.values():
            packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)
            outputs = torch.stack([part[k] for k in keys])
            path = self.folder / f"{xxhash.xxh3_64_hexdigest(b''.join(keys))}.pt"
            parts = {"keys": packed.view(-1, 16), "outputs": outputs}
            write_atomically(path, partial(torch.save, parts))
            self.written.append(path)


def _read(path: Path) -> dict[bytes, Tensor]:
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
        keys, outputs = parts["keys"], parts["outputs"]
        if keys.dtype != torch.uint8 or keys.shape != (len(outputs), 16):
            raise ValueError(f"keys of shape {list(keys.shape)} for {list(outputs.shape)}")
    except Exception as error:  # whatever a damaged file makes of itself
        raise RunError(
            f"cannot read the cached outputs in {path} ({type(error).__name__}); remove that file"
        ) from error
    return dict(zip(map(bytes, keys.numpy()), outputs.unbind(), strict=True))


def _joined(held: list[Tensor | None], by_row: bool) -> Tensor:
    rows = [h for h in held if h is not None]
    return torch.stack(rows) if by_row else rows[0]


def _leaves(value: Any) -> Iterator[Any]:
    """What the arguments of a forward consist of, tensors and plain values."""
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _parts(batch: Batch) -> tuple[list[Tensor], bytes]:
    """The tensors of a batch's arguments, and all else about them but their first dimension."""
    leaves = list(_leaves((batch.args, batch.kwargs)))
    tensors = [a for a in leaves if isinstance(a, Tensor)]
    words = (f"{a.dtype}{list(a.shape[1:])}" if isinstance(a, Tensor) else repr(a) for a in leaves)
    return tensors, ",".join(words).encode()


def _row_keys(batch: Batch) -> list[bytes] | None:
    """One key for each example; None where the tensors do not share their first dimension."""
    tensors, form = _parts(batch)
    n, flat = batch.size, (*batch.args, *batch.kwargs.values())
    nested = any(isinstance(a, tuple | list | dict) for a in flat)
    if nested or not tensors or any(not t.dim() or len(t) != n for t in tensors):
        return None
    hashes = [xxhash.xxh3_128(form) for _ in range(n)]
    for tensor in tensors:
        for digest, row in zip(hashes, _bytes(tensor).view(n, -1).numpy(), strict=True):
            digest.update(row.data)
    return [h.digest() for h in hashes]


def _whole_key(batch: Batch) -> bytes:
    tensors, form = _parts(batch)
    digest = xxhash.xxh3_128(b"whole" + form)
    for tensor in tensors:
        digest.update(str(list(tensor.shape)).encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.digest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _independent(batch: Batch, output: Tensor, compute: Compute) -> bool:
    """Whether half of the batch alone gets the answers that it got among the others."""
    n, half = batch.size, batch.size // 2
    if n < 2 or not output.dim() or len(output) != n:
        return False

    def cut(value: Any) -> Any:
        return value[:half] if isinstance(value, Tensor) else value

    part = Batch(
        args=tuple(map(cut, batch.args)), kwargs={k: cut(v) for k, v in batch.kwargs.items()},
        target=cut(batch.target),
    )  # fmt: skip
    alone, among = compute(part), output[:half]
    slack = 1e-3 * float(among.abs().amax()) if among.numel() else 0.0
    return alone.shape == among.shape and bool(((alone - among).abs() <= slack).all())


def _fingerprint(teacher: nn.Module, precision: torch.dtype) -> str:
    """Of all that the outputs depend on, but the examples."""
    said = f"{teacher} {precision} {device_of(teacher)} {torch.__version__}"
    digest = xxhash.xxh3_128(said.encode())
    for name, value in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(value).numpy().data)
    return digest.hexdigest()
