"""Signs that products of bits hand on to one another in OpenVINO: who gets them, who refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_layers import alike, answer, bits, damaged, kept_onnx, onnx
from torch import Tensor, nn

from taut.activations import LevelCode
from taut.kernels import Levels
from taut.layers import pack_layer

openvino = pytest.importorskip("openvino")


def cut(threshold: float, channels: int = 1) -> LevelCode:
    """Inputs of two levels; with a threshold of its own for each of several channels."""
    by = torch.full((channels,), threshold) + torch.arange(channels) / 40
    sign = Levels.sign(by)
    return LevelCode(
        Levels(
            thresholds=sign.thresholds, pattern=sign.pattern, scale=torch.tensor([0.5]), offset=0.5
        )
    )


def binary(code: LevelCode, channels: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    """A packed binary convolution."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    pack_layer(conv, {"weight": bits((out, channels, kernel, kernel), 1)}, code)
    return conv


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm that has seen something."""
    made = nn.BatchNorm2d(channels)
    nn.init.normal_(made.running_mean)
    nn.init.uniform_(made.running_var, 20, 60)
    nn.init.normal_(made.weight)
    return made


class Chain(nn.Module):
    """Binary convolutions one after the other, each behind a norm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 1)
        self.first, self.norm = binary(cut(0.1), 20, channels), norm(channels)
        self.second = binary(cut(0.2, channels), channels, 33, stride=2)
        self.then, self.third = norm(33), binary(cut(0.3), 33, 10, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(self.stem(x))))
        x = torch.relu(self.then(self.second(x)))
        return self.third(x)


class Block(nn.Module):
    """What the first gives is cut by the second and summed; what that gives, by two at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = binary(cut(0.1), 20, 20), binary(cut(0.2), 20, 20)
        self.alike = nn.ModuleList(binary(cut(0.3), 20, 20) for _ in range(2))
        self.other = binary(cut(0.4), 20, 20)
        self.norms = nn.ModuleList(norm(20) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        x = torch.relu(x + self.norms[1](self.second(x)))
        return self.alike[0](x) + self.alike[1](x) + self.other(x)


def operations(file: bytes) -> list:
    """Taut's, in order."""
    return [n for n in onnx.load_from_string(file).graph.node if n.domain == "taut"]


def signs(node) -> int:
    return next(a.i for a in node.attribute if a.name == "signs")


@pytest.mark.parametrize("channels", [20, 64, 130])
def test_a_chain_hands_on_signs_alone_and_answers_alike(core, channels, tmp_path):
    network, x = Chain(channels).eval(), torch.randn(3, 3, 9, 10)
    file = kept_onnx(network, x, tmp_path / "net.onnx")
    first, second, third = operations(file)
    assert [signs(n) for n in (first, second, third)] == [2, 2, 0]
    assert second.input[0] == first.output[0]
    assert third.input[0] == second.output[0]
    assert [len(n.output) for n in (first, second, third)] == [1, 1, 1]
    alike(answer(core, file, x), network(x).detach())


def test_signs_stand_beside_the_numbers_where_others_read_those(core, tmp_path):
    network, x = Block().eval(), torch.randn(2, 20, 9, 10)
    file = kept_onnx(network, x, tmp_path / "net.onnx")
    first, second, *rest = operations(file)
    assert (signs(first), signs(second)) == (1, 1)
    assert second.input[0] == first.output[1]
    assert second.input[2] == first.output[0]
    given = [n.input[0] for n in rest]
    assert given.count(second.output[1]) == 2  # cut alike
    assert given.count(second.output[0]) == 1  # by another threshold
    assert {signs(n) for n in rest} == {0}
    alike(answer(core, file, x), network(x).detach())


def test_what_leaves_the_network_stays_numbers(core, tmp_path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = binary(cut(0.1), 20, 20), binary(cut(0.2), 20, 20)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.second(y), y

    network, x = Both().eval(), torch.randn(2, 20, 6, 5)
    file = kept_onnx(network, x, tmp_path / "net.onnx")
    model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = model(x.numpy())
    for at, wanted in enumerate(network(x)):
        alike(torch.from_numpy(np.array(found[at])), wanted.detach())


# ---- bad signs ------------------------------------------------------------------------------

BAD = {
    "too large": ("binary", {"signs": 3}, r"signs must lie in \[0, 2\], got 3"),
    "negative": ("conv, binary", {"signs": -1}, r"signs must lie in \[0, 2\], got -1"),
    "no thresholds": ("binary", {"signs": 1}, "ends within thresholds of what follows"),
    "no numbers": ("conv, binary", {"signs": 2}, "ends within thresholds of what follows"),
    "words": ("binary", {"signs": "yes"}, "Bad cast|BitplaneMatmul"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_attributes_throw(core, case):
    name, attributes, said = BAD[case]
    with pytest.raises(RuntimeError, match=said):
        core.read_model(damaged(name, **attributes))


def test_thresholds_by_which_no_signs_are_given_throw(core):
    with pytest.raises(RuntimeError, match="192 bytes more than it should"):  # 33 floats
        core.read_model(damaged("binary", lambda raw: torch.cat([raw, raw[:192]])))


def bytes_in(file: bytes) -> bytes:
    """The same file, which says that its input is bytes."""
    model = onnx.load_from_string(file)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return model.SerializeToString()


@pytest.mark.parametrize("case", ["shared", "sparse", "real inputs", "conv, sparse"])
def test_operations_of_other_inputs_take_no_signs(core, case):
    with pytest.raises(RuntimeError, match="input 0 must be float32, got u8"):
        core.read_model(bytes_in(damaged(case)))


NO_SIGNS = {
    "learned levels": "taken by weights whose inputs are cut in two",
    "conv, k bits": "taken by weights whose inputs are cut in two",
    "conv, binary": "signs have their channels last",
}


@pytest.mark.parametrize("case", NO_SIGNS)
def test_signs_that_say_too_little_throw(core, case):
    with pytest.raises(RuntimeError, match=NO_SIGNS[case]):
        core.read_model(bytes_in(damaged(case)))
