"""Which answers changed: counted by hand, with the examples as pictures or texts."""

import base64
import struct
import zlib

import pytest
import torch
from torch import nn

import taut
from taut.answers import MOST_CLASSES, MOST_SHOWN, answers


class Says(nn.Module):
    """Answers each example by the class that its first number names in a list."""

    def __init__(self, said, classes=3):
        super().__init__()
        self.said, self.classes = torch.tensor(said), classes
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        places = x.flatten(1)[:, 0].long()
        return nn.functional.one_hot(self.said[places], self.classes).float()


TARGETS = [0, 0, 1, 1, 2, 2]
BEFORE = [0, 0, 1, 2, 2, 1]
AFTER = [0, 1, 1, 1, 2, 0]  # the second is lost, the fourth won, the last as wrong as before


def task(x=None, targets=TARGETS, **more):
    x = torch.arange(float(len(targets)))[:, None] if x is None else x
    y = torch.tensor(targets)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    return taut.Task(train=batches, test=batches, **more)


def numbered(*shape):
    """Examples whose first number is their place."""
    x = torch.rand(len(TARGETS), *shape)
    x.flatten(1)[:, 0] = torch.arange(float(len(TARGETS)))
    return x


def decoded(uri):
    """Width, height and the bytes of a PNG's lines."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, parts = 8, {}
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(kind + data)
        parts[kind] = data
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert depth == 8
    return width, height, colour, zlib.decompress(parts[b"IDAT"])


def test_what_changed_is_counted():
    found = answers(Says(BEFORE), Says(AFTER), task(about={"labels": ["a", "b", "c"]}))
    assert (found.examples, found.changed, found.lost, found.won) == (6, 3, 1, 1)
    assert found.before == ((2, 0, 0), (0, 1, 1), (0, 1, 1))
    assert found.after == ((1, 1, 0), (0, 2, 0), (1, 0, 1))
    assert found.classes == ("a", "b", "c")
    cells = {(m.target, m.answer): (m.before, m.after, m.right) for m in found.moved}
    assert cells == {
        ("a", "a"): (2, 1, True), ("a", "b"): (0, 1, False), ("b", "b"): (1, 2, True),
        ("b", "c"): (1, 0, False), ("c", "a"): (0, 1, False), ("c", "b"): (1, 0, False),
    }  # fmt: skip
    assert [(e.number, e.target, e.before, e.after, e.was_right, e.is_right)
            for e in found.shown] == [
        (2, "a", "a", "b", True, False), (4, "b", "c", "b", False, True),
        (6, "c", "b", "a", False, False),
    ]  # fmt: skip
    assert not any(e.picture or e.text for e in found.shown)  # one number is no picture


@pytest.mark.parametrize(("shape", "size", "colour"), [
    ((1, 8, 6), (6, 8), 0), ((3, 8, 8), (8, 8), 2), ((8, 8), (8, 8), 0),
    ((1, 256, 128), (32, 64), 0),
])  # fmt: skip
def test_images_become_pictures(shape, size, colour):
    x = numbered(*shape)
    found = answers(Says(BEFORE), Says(AFTER), task(x))
    width, height, kind, lines = decoded(found.shown[0].picture)
    assert (width, height) == size
    assert kind == colour
    each = 1 + width * (3 if colour else 1)
    rows = torch.tensor(list(lines)).view(height, each)
    assert not rows[:, 0].any()  # no filter
    if max(shape) <= 64:
        image = x[1].view(-1, *shape[-2:])
        wanted = (image - image.min()) / (image.max() - image.min()) * 255
        got = rows[:, 1:].view(height, width, -1).permute(2, 0, 1)
        torch.testing.assert_close(got.float(), wanted.round())


def test_a_task_may_show_its_examples_itself():
    shown = task(show=lambda x: f"number {int(x)}, <b>" + "long " * 100)
    texts = [e.text for e in answers(Says(BEFORE), Says(AFTER), shown).shown]
    assert [t[:13] for t in texts] == ["number 1, <b>", "number 3, <b>", "number 5, <b>"]
    assert {len(t) for t in texts} == {280}
    drawn = task(show=lambda x: torch.eye(8) * x)
    assert all(e.picture for e in answers(Says(BEFORE), Says(AFTER), drawn).shown)


def test_few_of_many_are_shown_those_that_were_lost_first():
    count = 200
    targets = [0] * count
    before, after = [0] * 100 + [1] * 100, [1] * 100 + [0] * 100
    found = answers(Says(before), Says(after), task(targets=targets))
    assert (found.changed, found.lost, found.won) == (200, 100, 100)
    assert len(found.shown) == MOST_SHOWN
    assert [e.was_right for e in found.shown] == [True] * 12 + [False] * 12
    only = answers(Says(before), Says([1] * 200), task(targets=targets))
    assert [e.was_right for e in only.shown] == [True] * MOST_SHOWN


def test_very_many_classes_have_no_matrix():
    many = MOST_CLASSES + 1
    found = answers(Says(BEFORE, many), Says(AFTER, many), task())
    assert (found.classes, found.before, found.after) == ((), (), ())
    assert found.moved[0].target in {"0", "1", "2"}


def test_what_is_no_class_has_no_answers():
    x = torch.arange(6.0)[:, None]
    regression = taut.Task(train=[(x, x)], test=[(x, x)], loss=nn.functional.mse_loss)
    assert answers(Says(BEFORE), Says(AFTER), regression) is None
    positions = torch.zeros(6, 4, dtype=torch.long)
    each = taut.Task(train=[(x, positions)], test=[(x, positions)])
    assert answers(Says(BEFORE), Says(AFTER), each) is None


def test_the_networks_keep_their_modes():
    first, second = Says(BEFORE).train(), Says(AFTER).eval()
    answers(first, second, task())
    assert (first.training, second.training) == (True, False)


def test_what_the_loss_ignores_is_left_out():
    found = answers(Says(BEFORE), Says(AFTER), task(targets=[0, -100, 1, 1, -1, 2]))
    assert found.examples == 4
    assert sum(map(sum, found.before)) == 4
    assert [e.number for e in found.shown] == [4, 6]  # as they stand in the data
    assert answers(Says(BEFORE), Says(AFTER), task(targets=[-100] * 6)) is None


def test_a_show_that_fails_is_told_and_loses_nothing(caplog):
    def show(x):
        raise KeyError("no such picture")

    found = answers(Says(BEFORE), Says(AFTER), task(show=show))
    assert [(e.number, e.picture, e.text) for e in found.shown] == [
        (2, "", ""), (4, "", ""), (6, "", ""),
    ]  # fmt: skip
    assert "show() failed on example 2: 'no such picture'" in caplog.text
