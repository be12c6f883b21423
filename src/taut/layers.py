"""Packed layers: any packed weight inside any layer.

A layer is packed in place: its class gains a mixin, so it stays an instance of what it was
(`isinstance(layer, nn.Linear)` holds, `layer.weight` reads the decoded weight), and only its weight
is held in packed form. It runs dense (decoded once, then PyTorch's own operation) or packed
(through the weight's `matmul`, never a dense copy): dense at first, then as `tune` chooses. A layer
of a class Taut does not know runs dense by reading its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from taut.activations import InputCode, channels_at
from taut.attention import attended, is_usual
from taut.errors import DataError
from taut.kernels import gru_cell, lstm_cell
from taut.modules import drop_flat_weights
from taut.packed import PackedWeight


class Packed(nn.Module):
    """What every packed layer has: `packed`, its weights by parameter name, and `runs_dense`.

    input_code: what its input is rounded to, if it is.
    """

    packed: nn.ModuleDict
    input_code: InputCode | None
    runs_dense: bool
    _decoded: dict[str, Tensor]
    _dtypes: dict[str, torch.dtype]  # of the parameters; packed parts keep their own

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters", {})
        if name in parameters:  # first, as in nn.Module: this runs at every forward
            return parameters[name]
        packed = self.__dict__.get("_modules", {}).get("packed")
        if packed is not None and name in packed:
            return self.decoded(name)
        return super().__getattr__(name)

    def decoded(self, name: str) -> Tensor:
        """The dense weight, made anew each time; kept for vectors and in dense layers."""
        if name in self._decoded:
            return self._decoded[name]
        dense = cast(PackedWeight, self.packed[name]).dense().to(self._dtypes[name])
        if self.runs_dense or not self.multiplies or dense.dim() < 2:
            self._decoded[name] = dense
            self.__dict__[name] = dense  # found without __getattr__ from now on
        return dense

    def _drop_decoded(self) -> None:
        for name in self._decoded:
            self.__dict__.pop(name, None)
        self._decoded.clear()

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the layer multiplies it."""
        return x if self.input_code is None else self.input_code.rounded(x, channels_at(self))

    def product(self, name: str, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], by the weight's own product; by PyTorch's where it is plain."""
        if name in self.packed:
            return cast(PackedWeight, self.packed[name]).matmul(x)
        return F.linear(x, getattr(self, name))

    @property
    def multiplies(self) -> bool:
        """Whether any of its packed weights is a layer's matrix; vectors always run decoded."""
        matrices = any(len(cast(PackedWeight, w).shape) > 1 for w in self.packed.values())
        return matrices and isinstance(self, tuple(kind for kind, _ in _KINDS))

    def decoded_bytes(self) -> int:
        """What the dense copies take beside the packed weights, once the layer runs dense."""
        return sum(t.numel() * t.element_size() for t in self._decoded.values())

    def run_dense(self, dense: bool) -> None:
        """Choose how the layer runs; what was decoded is dropped."""
        self.runs_dense = dense
        self._drop_decoded()
        for weight in self.packed.children():
            cast(PackedWeight, weight).forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._drop_decoded()
        for name, dtype in self._dtypes.items():
            self._dtypes[name] = fn(torch.empty(0, dtype=dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _PackedLinear(Packed):
    def forward(self, x: Tensor) -> Tensor:
        if self.runs_dense or "weight" not in self.packed:
            return F.linear(self.rounded(x), self.weight, self.bias)
        weight = cast(PackedWeight, self.packed["weight"])
        y = weight.matmul(x) if self.input_code is None else self.input_code.product(weight, x)
        return y if self.bias is None else y + self.bias


class _PackedConv(Packed):
    """Convolution in one or two dimensions; one is two of which the first has length one."""

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, self)
        flat = isinstance(self, nn.Conv1d)
        batched = x.dim() == (3 if flat else 4)
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if self.runs_dense or not plain or not batched or "weight" not in self.packed:
            x = self.rounded(x) if batched else self.rounded(x[None])[0]
            return cast(Tensor, layer._conv_forward(x, layer.weight, layer.bias))
        stride, padding, dilation = (
            (fill, size[0]) if flat else (size[0], size[1])
            for fill, size in (
                (1, layer.stride), (0, cast("tuple[int, ...]", layer.padding)), (1, layer.dilation)
            )
        )  # fmt: skip
        weight = cast(PackedWeight, self.packed["weight"])
        image = x.unsqueeze(2) if flat else x
        how = (stride, padding, dilation, layer.groups)
        code = self.input_code
        y = weight.conv2d(image, *how) if code is None else code.convolution(weight, image, *how)
        if layer.bias is not None:
            y = y + layer.bias[:, None, None]
        return y.squeeze(2) if flat else y


class _PackedEmbedding(Packed):
    def forward(self, index: Tensor) -> Tensor:
        if self.runs_dense or cast(nn.Embedding, self).max_norm is not None:
            try:
                return cast(Tensor, super().forward(index))
            except IndexError:
                self._refuse_beyond(index)
                raise
        # A weight that computes its rows has one for any number; an exported graph cannot look.
        if index.numel() and not torch.compiler.is_compiling():
            self._refuse_beyond(index)
        weight = cast(PackedWeight, self.packed["weight"])
        return weight.rows(index).to(self._dtypes["weight"])

    def _refuse_beyond(self, index: Tensor) -> None:
        rows = cast(nn.Embedding, self).num_embeddings
        low, high = (int(n) for n in index.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(
                f"index out of range: {type(self).__name__} has {rows} rows, got "
                f"{low if low < 0 else high}"
            ) from None


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
        if not len(sequence):
            raise DataError(
                f"{type(self).__name__} takes at least one step, got an input of shape "
                f"{list(x.shape)}; leave empty sequences out"
            )
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

    def _run(
        self, x: Tensor, state: tuple[Tensor, ...], suffix: str, back: bool, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One direction of one layer. x: [steps, batch, in]; all its steps go in as one product."""
        layer = cast(nn.RNNBase, self)
        inputs = self.product("weight_ih" + suffix, x)
        bias = None
        if layer.bias:
            inputs = inputs + getattr(self, "bias_ih" + suffix)
            bias = getattr(self, "bias_hh" + suffix)
            if layer.mode == "LSTM":  # its gates are plain sums: both biases go in at once
                inputs, bias = inputs + bias, None
        whole = layer.mode == "LSTM" and not layer.proj_size and lengths is None and len(x) > 0
        if whole and "weight_hh" + suffix in self.packed:
            recurrent = cast(PackedWeight, self.packed["weight_hh" + suffix])
            hidden, cell = state
            if back:
                inputs = inputs.flip(0)
            states, cell = recurrent.lstm(inputs, hidden, cell)
            return states.flip(0) if back else states, (states[-1], cell)
        outputs: list[Tensor] = [x[0]] * len(x)
        for t in reversed(range(len(x))) if back else range(len(x)):
            hidden = self.product("weight_hh" + suffix, state[0])
            if bias is not None:
                hidden = hidden + bias
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
            out, cell = lstm_cell(i, h, state[1])
            if cast(nn.RNNBase, self).proj_size:
                out = self.product("weight_hr" + suffix, out)
            return out, cell
        if mode == "GRU":
            return (gru_cell(i, h, state[0]),)
        return ((i + h).tanh() if mode == "RNN_TANH" else (i + h).relu(),)


class _PackedAttention(Packed):
    """Multi-head attention whose projections, the one of its output too, run packed or dense."""

    def run_dense(self, dense: bool) -> None:
        super().run_dense(dense)
        layer = cast(nn.MultiheadAttention, self)
        if isinstance(layer.out_proj, Packed):
            layer.out_proj.run_dense(dense)
        # False keeps PyTorch's fused inference away, which would read the dense weights.
        layer._qkv_same_embed_dim = dense and self._joint()

    def _joint(self) -> bool:
        """Whether one matrix projects queries, keys and values."""
        return "in_proj_weight" in self.packed or self._parameters.get("in_proj_weight") is not None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        layer = cast(nn.MultiheadAttention, self)
        if self.runs_dense or self.training or not is_usual(layer, query):
            layer._qkv_same_embed_dim = self._joint()
            out = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            layer._qkv_same_embed_dim &= self.runs_dense
            return cast("tuple[Tensor, Tensor | None]", out)
        same = query is key and key is value
        parts = self._project_all(query) if same else self._project(query, key, value)
        return attended(
            layer, parts, key_padding_mask, attn_mask, need_weights, average_attn_weights
        )

    def _project_all(self, x: Tensor) -> Iterable[Tensor]:
        if not self._joint():
            return self._project(x, x, x)
        y = self.product("in_proj_weight", x)
        bias = cast(nn.MultiheadAttention, self).in_proj_bias
        return (y if bias is None else y + bias).chunk(3, -1)

    def _project(self, *inputs: Tensor) -> Iterable[Tensor]:
        layer = cast(nn.MultiheadAttention, self)
        for i, x in enumerate(inputs):
            part = slice(i * layer.embed_dim, (i + 1) * layer.embed_dim)
            if self._joint():
                y = self.product("in_proj_weight", x)[..., part]
            else:
                y = self.product("qkv"[i] + "_proj_weight", x)
            yield y if layer.in_proj_bias is None else y + layer.in_proj_bias[part]


_KINDS: tuple[tuple[type[nn.Module], type[Packed]], ...] = (
    (nn.Linear, _PackedLinear),
    (nn.Conv1d, _PackedConv),
    (nn.Conv2d, _PackedConv),
    (nn.Embedding, _PackedEmbedding),
    (nn.LSTM, _PackedRecurrent),
    (nn.GRU, _PackedRecurrent),
    (nn.RNN, _PackedRecurrent),
    (nn.MultiheadAttention, _PackedAttention),
)


def pack_layer(
    module: nn.Module, weights: dict[str, PackedWeight], code: InputCode | None = None
) -> None:
    """Replace parameters of a layer, by name, with packed weights, in place.

    code: what the layer's input is rounded to.
    """
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
    layer.input_code = code
    layer.run_dense(True)


def unpack_layer(layer: Packed, weights: Mapping[str, nn.Parameter]) -> None:
    """Make a packed layer the plain one that it was, in place, with these for its packed weights.

    What its input was rounded to is dropped.
    """
    assert set(weights) == set(layer.packed)
    layer.run_dense(True)
    del layer._modules["packed"]
    layer._modules.pop("input_code", None)
    for name in ("_decoded", "_dtypes", "input_code", "runs_dense"):
        layer.__dict__.pop(name, None)
    layer.__class__ = type(layer).__bases__[1]
    for name, value in weights.items():
        layer.register_parameter(name, value)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def packed_layers(model: nn.Module) -> dict[str, Packed]:
    """The packed layers of a model, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Packed)}


def run_dense(model: nn.Module, dense: bool) -> None:
    """Make every packed layer run dense, or packed."""
    for layer in packed_layers(model).values():
        layer.run_dense(dense)


def _map(f: Any, value: Any) -> Any:
    return tuple(f(v) for v in value) if isinstance(value, tuple) else f(value)
