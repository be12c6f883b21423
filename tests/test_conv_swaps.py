"""The six swaps of a convolution as structure: shapes, counts, work; and edits that are refused."""

import itertools
import math

import pytest
import torch
from torch import nn

from taut import edits
from taut.container import encode
from taut.conv_swaps import BETWEEN, KINDS, Conv, Swap, macs, numbers, stages, why_not
from taut.errors import FormatError
from taut.pack import load
from taut.packed import Plain

WIDTHS = {"separable": 2, "grouped": 4, "fire": 3, "stacked": 5, "asymmetric": 5, "parallel": 1}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES = {
    "plain": (2, {"padding": 2}),
    "strided": (2, {"padding": 2, "stride": (2, 3)}),
    "dilated": (2, {"padding": (4, 2), "dilation": (2, 1)}),
    "same": (2, {"padding": "same", "padding_mode": "reflect", "dilation": (1, 2)}),
    "valid": (2, {"padding": "valid"}),
    "uneven": (2, {"padding": (3, 1), "stride": 2}),
    "circular": (2, {"padding": 2, "padding_mode": "circular", "bias": False}),
    "line": (1, {"padding": 2, "stride": 2}),
    "solid": (3, {"padding": 2, "stride": (1, 2, 2)}),
    "long": (2, {"kernel_size": (1, 7), "padding": (0, 3), "stride": 2}),
    "sheets": (3, {"kernel_size": (5, 1, 5), "padding": (2, 0, 2), "stride": (1, 2, 1)}),
    "seven": (2, {"kernel_size": 7, "padding": 4}),
}


def layer_of(geometry):
    dims, options = GEOMETRIES[geometry]
    layer = CONVS[dims](8, 12, **{"kernel_size": 5, **options})
    return layer, torch.randn(2, 8, *[17, 14, 11][:dims])


POSSIBLE = [
    (g, k) for g, k in itertools.product(GEOMETRIES, KINDS)
    if not why_not(k, Conv.of(layer_of(g)[0]), WIDTHS[k])
]  # fmt: skip


def test_what_is_refused_is_refused_for_a_reason():
    refused = {*itertools.product(GEOMETRIES, KINDS)} - {*POSSIBLE}
    assert refused == {
        *itertools.product(["valid", "uneven", "seven"], ["fire", "parallel"]),
        *itertools.product(["line", "long"], ["asymmetric", "parallel"]),
        ("long", "stacked"), ("sheets", "stacked"),
    }  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("geometry", "to"), POSSIBLE)
def test_shape_numbers_and_work_are_as_foretold(geometry, to, between):
    layer, x = layer_of(geometry)
    made = Swap(layer="", to=to, width=WIDTHS[to], between=between).made(layer)
    for p in made.parameters():
        nn.init.normal_(p)
    conv, work = Conv.of(layer), 0

    def count(module, given, out):
        nonlocal work
        work += module.weight.numel() * math.prod(out.shape[2:])

    for module in made.modules():
        if isinstance(module, tuple(CONVS.values())):
            assert module.padding_mode == layer.padding_mode
            module.register_forward_hook(count)
    assert made(x).shape == layer(x).shape
    assert conv.spots(tuple(x.shape[2:])) == layer(x).shape[2:]
    assert work == macs(to, conv, WIDTHS[to], tuple(x.shape[2:]))
    held = sum(t.numel() for t in (*made.parameters(), *made.buffers()))
    assert held == numbers(to, conv, WIDTHS[to], between, layer.bias is not None)


@pytest.mark.parametrize(("geometry", "to"), POSSIBLE)
def test_every_output_reads_the_window_that_it_read(geometry, to):
    """Where a swap's output depends on an input, the old one's does."""
    layer, x = layer_of(geometry)
    made = Swap(layer="", to=to, width=WIDTHS[to], between="nothing").made(layer)
    for p in itertools.chain(made.parameters(), layer.parameters()):
        nn.init.ones_(p)
    x = x[:1].requires_grad_()
    spots = layer(x).shape[2:]
    for where in ((0, *[0] * len(spots)), (-1, *(n // 2 for n in spots)), (5, *[-1] * len(spots))):
        new, old = (torch.autograd.grad(m(x)[0][where], x)[0] != 0 for m in (made, layer))
        assert not (new & ~old).any()
        if to in ("separable", "asymmetric", "stacked"):
            assert torch.equal(new, old)


def test_which_parts_each_becomes():
    def shapes(to, conv, width):
        return [[part.shape for part in stage] for stage in stages(to, conv, width)]

    conv = Conv.of(nn.Conv2d(8, 12, 5, padding=2))
    assert shapes("separable", conv, 2) == [[(16, 1, 5, 5)], [(12, 16, 1, 1)]]
    assert shapes("grouped", conv, 4) == [[(12, 2, 5, 5)]]
    assert shapes("fire", conv, 3) == [[(3, 8, 1, 1)], [(6, 3, 1, 1), (6, 3, 5, 5)]]
    assert shapes("stacked", conv, 5) == [[(5, 8, 3, 3)], [(12, 5, 3, 3)]]
    assert shapes("asymmetric", conv, 5) == [[(5, 8, 1, 5)], [(12, 5, 5, 1)]]
    assert shapes("parallel", conv, 1) == [[(6, 8, 1, 5), (6, 8, 5, 1)]]
    solid = Conv.of(nn.Conv3d(4, 8, 3, padding=1))
    assert shapes("asymmetric", solid, 6) == [
        [(6, 4, 1, 1, 3)], [(6, 6, 1, 3, 1)], [(8, 6, 3, 1, 1)]
    ]  # fmt: skip
    assert [s[0] for s in shapes("parallel", solid, 1)[0]] == [2, 3, 3]
    seven = Conv.of(nn.Conv2d(8, 12, 7, padding=4, stride=2))
    assert [s[0].padding for s in stages("stacked", seven, 5)] == [(2, 2), (1, 1), (1, 1)]
    assert [s[0].stride for s in stages("stacked", seven, 5)] == [(1, 1), (1, 1), (2, 2)]


def test_a_shuffle_shows_each_group_all_the_others():
    layer = nn.Conv2d(8, 12, 3)
    made = Swap(layer="", to="grouped", width=4, between="norm").made(layer)
    nn.init.constant_(made[0].bias, 0)
    nn.init.constant_(made[0].weight, 1)
    x = torch.zeros(1, 8, 3, 3)
    x[:, 2] = 1  # of the second group
    assert made(x).flatten().nonzero().flatten().tolist() == [1, 5, 9]


# ---- hostile edits --------------------------------------------------------------------------


def plain_net():
    return nn.Sequential(
        nn.Conv2d(8, 8, 5), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 8), nn.Conv2d(8, 8, 1),
        nn.ConvTranspose2d(8, 8, 3), nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 5, padding=2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layer": "9"}, "has no attribute .9.; build the model"),
        ({"layer": "2"}, "'2' is no plain convolution: it is a Linear"),
        ({"layer": "4"}, "'4' is no plain convolution: it is a ConvTranspose2d"),
        ({"layer": ""}, "'' is no plain convolution: it is a Sequential"),
        ({"layer": "1"}, "'1' cannot become separable: its channels come in groups"),
        ({"layer": "3"}, "'3' cannot become separable: its kernel is 1 × 1, a mix of channels"),
        ({"to": "magic"}, "'0' must become one of separable, .*, parallel, got 'magic'"),
        ({"between": "gelu"}, "'0' must become one of norm, relu, nothing, got 'gelu'"),
        ({"width": 0}, "width of '0' must be 1 or more, .* got 0"),
        ({"width": -3, "to": "fire"}, "width of '0' must be 1 or more, .* got -3"),
        ({"width": True}, "width is of another type"),
        ({"width": 1.0}, "width is of another type"),
        ({"width": 10**15}, "'0' would take .* numbers, which must be fewer than its 1,608"),
        ({"width": 10**15, "to": "stacked"}, "numbers, which must be fewer than its 1,608"),
        ({"width": 10**15, "to": "asymmetric"}, "numbers, which must be fewer than its 1,608"),
        ({"width": 1, "to": "grouped"}, "take 1,608 numbers, which must be fewer than its 1,608"),
        ({"width": 3, "to": "grouped"}, "8 and 8 channels do not divide into 3 groups"),
        ({"width": 2, "to": "parallel"}, "width of '0' must be 1 or more"),
        ({"to": "parallel"}, r"its padding \(0, 0\) does not centre the kernel 5 × 5"),
        ({"layer": "6", "to": "fire"}, "1 outputs cannot be split into 2 branches"),
        ({"layer": "5", "to": "asymmetric"}, "its kernel is 3, of one dimension"),
        ({"layer": "5", "to": "stacked"}, "its kernel is 3, and not 5 × 5, 7 × 7 or larger"),
    ],
)
def test_hostile_edits_are_refused_and_the_model_is_untouched(options, told, tmp_path):
    edit = {"layer": "0", "to": "separable", "width": 1, "between": "norm", **options}
    model = plain_net()
    state = {(n,): Plain.of(t) for n, t in model.state_dict().items()}
    path = tmp_path / "bad.taut"
    path.write_bytes(encode(state, [["swap", edit]]))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(FormatError, match=told):
        load(path, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not edits.of(model)


def test_a_layer_that_holds_more_is_no_plain_convolution():
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    net[0].register_buffer("mask", torch.ones(8, 8, 3, 3))
    with pytest.raises(FormatError, match=r"'0' is no plain .*: it holds more than a weight and"):
        Swap(layer="0", to="separable", width=1, between="norm").replay(net)
