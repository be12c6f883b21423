"""LeNet-5 on MNIST: the network is trained on first use and kept beside the data."""

import os
from pathlib import Path

import torch

import taut
from taut.data import Batches, data_folder, images, mnist
from taut.zoo import LeNet5

EPOCHS = int(os.environ.get("TAUT_EPOCHS", "4"))
EXAMPLES = int(os.environ.get("TAUT_EXAMPLES", "60000"))  # fewer for a quick look
VALIDATION = EXAMPLES // 12  # the last of the training images choose the best epoch

digits = mnist()
inputs = images(digits.train_images[:EXAMPLES], mean=0.0, std=1.0)
labels = digits.train_labels[:EXAMPLES]


def train():
    return Batches(inputs[:-VALIDATION], labels[:-VALIDATION], batch_size=128, shuffle=True)


def validation():
    return Batches(inputs[-VALIDATION:], labels[-VALIDATION:], batch_size=1000)


def test():
    return Batches(images(digits.test_images, mean=0.0, std=1.0), digits.test_labels, 1000)


def model():
    net = LeNet5(dropout=0.4)
    kept = Path(os.environ.get("TAUT_WEIGHTS", data_folder() / f"lenet5-{EPOCHS}-{EXAMPLES}.pt"))
    if not kept.is_file():
        fit(net)
        torch.save(net.state_dict(), kept)
    net.load_state_dict(torch.load(kept, weights_only=True))
    return net


def fit(net):
    print(f"training LeNet-5 for {EPOCHS} epochs, once")
    torch.manual_seed(0)
    options = taut.Recover(epochs=EPOCHS, learning_rate=2e-3, weight_decay=0.1, distill=0.0)
    task = taut.Task(train=train, test=test, validation=validation)
    for record in taut.recover(net, task, options):
        print(f"  epoch {record.epoch}: validation score {record.score:.4f}")
