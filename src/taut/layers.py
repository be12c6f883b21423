"""Packed layers: any packed weight inside any layer.

A layer is packed in place: its class gains a mixin, so it stays an instance of what it was
(`isinstance(layer, nn.Linear)` holds, `layer.weight` reads the decoded weight), and only its weight
is held in packed form. It runs dense (decoded once, then PyTorch's own operation) or packed
(through the weight's `matmul`, never a dense copy). A layer of a class Taut does not know runs
dense by reading its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from taut.modules import drop_flat_weights
from taut.recoding import PackedWeight


class Packed(nn.Module):
    """What every packed layer has: `packed`, its weights by parameter name, and `runs_dense`."""

    packed: nn.ModuleDict
    runs_dense: bool
    _decoded: dict[str, Tensor]
    _dtypes: dict[str, torch.dtype]  # of the parameters; packed parts keep their own

    def __getattr__(self, name: str) -> Any:
        packed = self.__dict__.get("_modules", {}).get("packed")
        if packed is not None and name in packed:
            return self.decoded(name)
        return super().__getattr__(name)

    def decoded(self, name: str) -> Tensor:
        """The dense weight: kept once the layer runs dense, else made anew at each call."""
        if name in self._decoded:
            return self._decoded[name]
        dense = cast(PackedWeight, self.packed[name]).dense().to(self._dtypes[name])
        if self.runs_dense:
            self._decoded[name] = dense
        return dense

    def product(self, name: str, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], by the weight's own product."""
        return cast(PackedWeight, self.packed[name]).matmul(x)

    def decoded_bytes(self) -> int:
        """What the dense copies take beside the packed weights, once the layer runs dense."""
        return sum(t.numel() * t.element_size() for t in self._decoded.values())

    def run_dense(self, dense: bool) -> None:
        """Choose how the layer runs; what was decoded is dropped."""
        self.runs_dense = dense
        self._decoded.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._decoded.clear()
        for name, dtype in self._dtypes.items():
            self._dtypes[name] = fn(torch.empty(0, dtype=dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _PackedLinear(Packed):
    def forward(self, x: Tensor) -> Tensor:
        if self.runs_dense:
            return cast(Tensor, super().forward(x))
        y = self.product("weight", x)
        return y if self.bias is None else y + self.bias


class _PackedConv(Packed):
    """Convolution in one or two dimensions as a product with unfolded windows."""

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, self)
        flat = isinstance(self, nn.Conv1d)
        unfolds = layer.groups == 1 and layer.padding_mode == "zeros"
        batched = x.dim() == (3 if flat else 4)
        if self.runs_dense or not unfolds or not batched or isinstance(layer.padding, str):
            return cast(Tensor, super().forward(x))
        if flat:
            x = x.unsqueeze(2)
        kernel, stride, padding, dilation = (
            ((0 if n == "padding" else 1), *v) if flat else v
            for n in ("kernel_size", "stride", "padding", "dilation")
            for v in [cast("tuple[int, ...]", getattr(layer, n))]
        )
        windows = F.unfold(x, kernel, dilation, padding, stride)  # [n, in·window, places]
        y = self.product("weight", windows.transpose(1, 2))
        y = (y if layer.bias is None else y + layer.bias).transpose(1, 2)
        size = [
            (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d in range(2)
        ]
        y = y.reshape(*y.shape[:2], *size)
        return y.squeeze(2) if flat else y


class _PackedEmbedding(Packed):
    def forward(self, index: Tensor) -> Tensor:
        if self.runs_dense or cast(nn.Embedding, self).max_norm is not None:
            return cast(Tensor, super().forward(index))
        return cast(PackedWeight, self.packed["weight"]).rows(index).to(self._dtypes["weight"])


class _PackedRecurrent(Packed):
    """LSTM, GRU and RNN: every step goes through the packed product of its weights."""

    def run_dense(self, dense: bool) -> None:
        super().run_dense(dense)
        drop_flat_weights(cast(nn.RNNBase, self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.run_dense(self.runs_dense)
        return self

    def forward(self, x: Any, hx: Any = None) -> Any:
        if self.runs_dense or self.training:
            return super().forward(x, hx)
        layer = cast(nn.RNNBase, self)
        lengths, sequence = None, x
        if isinstance(x, PackedSequence):
            sequence, lengths = pad_packed_sequence(x, batch_first=False)
            lengths = lengths.to(sequence.device)
        elif x.dim() == 2:
            given = None if hx is None else _map(lambda h: h.unsqueeze(1), hx)
            out, state = self.forward(x.unsqueeze(0 if layer.batch_first else 1), given)
            return out.squeeze(0 if layer.batch_first else 1), _map(lambda h: h.squeeze(1), state)
        elif layer.batch_first:
            sequence = x.transpose(0, 1)
        states = self._start(sequence, hx)
        finals, directions = [], 2 if layer.bidirectional else 1
        for depth in range(layer.num_layers):
            outs = []
            for way in range(directions):
                suffix = f"_l{depth}" + ("_reverse" if way else "")
                state = tuple(s[depth * directions + way] for s in states)
                out, state = self._run(sequence, state, suffix, bool(way), lengths)
                outs.append(out)
                finals.append(state)
            sequence = torch.cat(outs, -1)
        ends = tuple(torch.stack(s) for s in zip(*finals, strict=True))
        final = ends if layer.mode == "LSTM" else ends[0]
        if isinstance(x, PackedSequence):
            assert lengths is not None
            if x.sorted_indices is not None:
                sequence, lengths = sequence[:, x.sorted_indices], lengths[x.sorted_indices]
            data = pack_padded_sequence(sequence, lengths.cpu()).data
            return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), final
        return (sequence.transpose(0, 1) if layer.batch_first else sequence), final

    def _start(self, sequence: Tensor, hx: Any) -> tuple[Tensor, ...]:
        layer = cast(nn.RNNBase, self)
        if hx is not None:
            return hx if isinstance(hx, tuple) else (hx,)
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        hidden = sequence.new_zeros(count, sequence.shape[1], layer.proj_size or layer.hidden_size)
        if layer.mode != "LSTM":
            return (hidden,)
        return hidden, sequence.new_zeros(count, sequence.shape[1], layer.hidden_size)

    def _times(self, name: str, x: Tensor) -> Tensor:
        if name in self.packed:
            return self.product(name, x)
        return F.linear(x, getattr(self, name))

    def _run(
        self, x: Tensor, state: tuple[Tensor, ...], suffix: str, back: bool, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One direction of one layer. x: [steps, batch, in]."""
        layer = cast(nn.RNNBase, self)
        inputs = self._times("weight_ih" + suffix, x)
        if layer.bias:
            inputs = inputs + getattr(self, "bias_ih" + suffix)
        outputs: list[Tensor] = [x[0]] * len(x)
        for t in reversed(range(len(x))) if back else range(len(x)):
            hidden = self._times("weight_hh" + suffix, state[0])
            if layer.bias:
                hidden = hidden + getattr(self, "bias_hh" + suffix)
            new = self._cell(inputs[t], hidden, state, suffix)
            if lengths is not None:
                alive = (t < lengths).unsqueeze(1)
                new = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
            state = new
            outputs[t] = state[0]
        return torch.stack(outputs), state

    def _cell(
        self, i: Tensor, h: Tensor, state: tuple[Tensor, ...], suffix: str
    ) -> tuple[Tensor, ...]:
        """One step, from the gates' products with the input (i) and with the hidden state (h)."""
        mode = cast(nn.RNNBase, self).mode
        if mode == "LSTM":
            enter, forget, content, leave = (i + h).chunk(4, -1)
            cell = forget.sigmoid() * state[1] + enter.sigmoid() * content.tanh()
            out = leave.sigmoid() * cell.tanh()
            if cast(nn.RNNBase, self).proj_size:
                out = self._times("weight_hr" + suffix, out)
            return out, cell
        if mode == "GRU":
            (i_r, i_z, i_n), (h_r, h_z, h_n) = i.chunk(3, -1), h.chunk(3, -1)
            new = (i_n + (i_r + h_r).sigmoid() * h_n).tanh()
            update = (i_z + h_z).sigmoid()
            return (new + update * (state[0] - new),)
        return ((i + h).tanh() if mode == "RNN_TANH" else (i + h).relu(),)


_KINDS: tuple[tuple[type[nn.Module], type[Packed]], ...] = (
    (nn.Linear, _PackedLinear),
    (nn.Conv1d, _PackedConv),
    (nn.Conv2d, _PackedConv),
    (nn.Embedding, _PackedEmbedding),
    (nn.LSTM, _PackedRecurrent),
    (nn.GRU, _PackedRecurrent),
    (nn.RNN, _PackedRecurrent),
)


def pack_layer(module: nn.Module, weights: dict[str, PackedWeight]) -> None:
    """Replace parameters of a layer, by name, with packed weights, in place."""
    if isinstance(module, Packed) or hasattr(module, "packed"):
        raise TypeError(f"{type(module).__name__} is packed already, or has its own `packed`")
    cls = type(module)
    mixin = next((m for k, m in _KINDS if getattr(cls, "forward", None) is k.forward), Packed)
    dtypes = {name: getattr(module, name).dtype for name in weights}
    for name in weights:
        delattr(module, name)
    module.__class__ = type(f"Packed{cls.__name__}", (mixin, cls), {})
    layer = cast(Packed, module)
    layer._decoded, layer._dtypes = {}, dtypes
    layer.packed = nn.ModuleDict(cast("dict[str, nn.Module]", weights))
    layer.run_dense(True)


def packed_layers(model: nn.Module) -> dict[str, Packed]:
    """The packed layers of a model, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Packed)}


def run_dense(model: nn.Module, dense: bool) -> None:
    """Make every packed layer run dense, or packed."""
    for layer in packed_layers(model).values():
        layer.run_dense(dense)


def _map(f: Any, value: Any) -> Any:
    return tuple(f(v) for v in value) if isinstance(value, tuple) else f(value)
