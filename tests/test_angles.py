"""Angles between the rows of weights, against vectors whose angles are known."""

import json
import math

import pytest
import torch
from torch import nn

import taut
from taut.angles import angles, held_at, row_angles, sign_angle
from taut.layers import pack_layer, packed_layers
from taut.modules import clone
from taut.packed import Plain
from taut.sparse_weight import SparseWeight
from taut.techniques import PruneWeights, ShareValues


def test_angles_and_lengths_of_vectors_that_are_known() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    after = torch.tensor([[2.0, 0.0], [2.0, 2.0], [0.0, -6.0], [-1.0, -1.0]])
    found = row_angles("w", before, after)
    each = torch.tensor([0.0, 45.0, 90.0, 180.0], dtype=torch.float64)
    lengths = torch.tensor([2.0, math.sqrt(2), 2.0, 1.0], dtype=torch.float64)
    assert (found.rows, found.dimensions, found.left_out) == (4, 2, 0)
    assert found.angle == pytest.approx(float(each.mean()))
    assert found.angle_spread == pytest.approx(float(each.std(correction=0)))
    assert found.length == pytest.approx(float(lengths.mean()))
    assert found.length_spread == pytest.approx(float(lengths.std(correction=0)))


def test_small_angles_are_exact() -> None:
    for angle in (1e-8, 1e-4, 1.0):
        turned = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        found = row_angles("w", torch.tensor([[1.0, 0.0]]), turned)
        assert found.angle == pytest.approx(math.degrees(angle), rel=1e-7)


def test_the_rows_of_a_convolution_are_its_filters() -> None:
    before, after = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    found = row_angles("w", before, after)
    cosines = nn.functional.cosine_similarity(before.flatten(1), after.flatten(1))
    assert (found.rows, found.dimensions) == (5, 12)
    assert found.angle == pytest.approx(float(cosines.acos().rad2deg().mean()), rel=1e-4)


def test_rows_without_an_angle_are_left_out_and_counted() -> None:
    before, after = torch.ones(4, 3), torch.ones(4, 3)
    after[0], after[1, 1], before[2] = 0.0, math.nan, 0.0
    found = row_angles("w", before, after)
    assert (found.rows, found.left_out, found.angle, found.length) == (4, 3, 0.0, 1.0)
    empty = row_angles("w", before, torch.zeros(4, 3))
    assert empty.left_out == 4
    assert math.isnan(empty.angle)
    told = json.loads(json.dumps(empty.to_json(), allow_nan=False))
    assert (told["angle"], told["length_spread"], told["rows"]) == (None, None, 4)


def test_the_angle_of_random_signs_is_that_of_the_paper_and_of_random_vectors() -> None:
    assert sign_angle(10**6) == pytest.approx(37.07, abs=0.005)
    assert sign_angle(1) == 0.0
    assert math.cos(math.radians(sign_angle(2))) == pytest.approx(math.sqrt(2) * 2 / math.pi)
    generator = torch.Generator().manual_seed(0)
    for dimensions in (3, 9, 150):
        w = torch.randn(40_000, dimensions, generator=generator, dtype=torch.float64)
        cosines = nn.functional.cosine_similarity(w, w.sign())
        seen = math.degrees(math.acos(float(cosines.mean())))
        assert seen == pytest.approx(sign_angle(dimensions), abs=0.15)


def test_signs_of_a_weight_come_out_at_the_expected_angle() -> None:
    w = torch.randn(500, 300)
    found = row_angles("w", w, w.sign() * 0.02)
    assert found.angle == pytest.approx(found.sign_angle, abs=0.2)


def test_what_was_recoded_is_told_and_nothing_else(trained: nn.Module, task: taut.Task) -> None:
    assert angles(trained, clone(trained)) == ()
    only = "0.weight, 3.weight"
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.5, scope="layer", only=only), task)
    found = angles(trained, net)
    assert [a.name for a in found] == ["0.weight", "3.weight"]
    before, after = trained[0].weight.detach(), net[0].weight.detach()
    assert found[0] == row_angles("0.weight", before, after)
    # What is left of a vector turns by its own length, as it was cut at right angles.
    cosines = after.norm(dim=1) / before.norm(dim=1)
    assert found[0].length == pytest.approx(float(cosines.mean()), rel=1e-5)
    assert found[0].angle == pytest.approx(float(cosines.acos().rad2deg().mean()), rel=1e-3)


def test_it_reads_packed_weights_without_keeping_them(
    trained: nn.Module, task: taut.Task, tmp_path: object
) -> None:
    net = taut.apply(clone(trained), ShareValues(bits=2), task)
    path = f"{tmp_path}/net.taut"
    taut.pack(net, path)
    loaded = taut.load(path, clone(trained))
    found = angles(trained, loaded)
    assert [a.name for a in found] == ["0.weight", "3.weight", "5.weight"]
    assert all(0 < a.angle < 37 for a in found)
    assert sum(layer.decoded_bytes() for layer in packed_layers(loaded).values()) == 0
    named = angles(trained, loaded, ["3.weight"])
    assert named == (found[1],)


def test_a_packed_weight_that_is_the_same_counts_as_recoded() -> None:
    layer = nn.Linear(3, 2)
    same = clone(layer)
    weight = layer.weight.detach()
    everything = torch.ones(2, 3, dtype=torch.bool)
    pack_layer(same, {"weight": SparseWeight(everything, Plain.of(weight.flatten(), "float32"))})
    (found,) = angles(layer, same)
    assert (found.angle, found.length) == (0.0, 1.0)
    assert torch.equal(held_at(same, "weight"), weight)
