"""Selections on a real network: they keep few weights, and those do the work of all."""

import pytest
import torch

import taut
from taut.data import Batches, images, mnist
from taut.errors import DataError
from taut.modules import clone, tensor_at
from taut.recover import Recover, recover
from taut.techniques import L0Gates, VariationalDropout
from taut.zoo import LeNet300


@pytest.fixture(scope="module")
def lenet():
    """LeNet-300-100 of 3,000 digits, and its task."""
    try:
        data = mnist()
    except DataError as error:
        pytest.skip(f"MNIST is not to be had here: {error}")
    x, tx = images(data.train_images[:3000]), images(data.test_images[-2000:])
    task = taut.Task(
        train=Batches(x, data.train_labels[:3000], 128, shuffle=True),
        test=Batches(tx, data.test_labels[-2000:], 1000),
    )
    torch.manual_seed(0)
    net = LeNet300()
    recover(net, task, Recover(epochs=6, learning_rate=2e-3))
    return net, task


@pytest.mark.parametrize(
    ("technique", "price"), [(VariationalDropout(), 7e-4), (L0Gates(), 8e-3)], ids=["noise", "l0"]
)
def test_lenet_loses_nine_weights_in_ten(lenet, technique, price):
    original, task = lenet
    net = taut.apply(clone(original), technique, task)
    options = Recover(epochs=6, learning_rate=3e-3, bytes_weight=price)
    recover(net, task, options, teacher=original)
    names = ("fc1.weight", "fc2.weight", "fc3.weight")
    left = sum(int(tensor_at(net.eval(), n).count_nonzero()) for n in names)
    assert left < 0.1 * 266_200
    assert task.evaluate(net) > task.evaluate(original) - 0.015
