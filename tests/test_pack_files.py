"""The .taut file on disk: its size and account, models that do not fit, files that cannot be."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_pack import PRUNE, SHARE, recode, same_tensors
from torch import nn

from taut.container import encode
from taut.errors import FormatError, RunError
from taut.pack import inspect, load, pack, packed_state
from taut.packed import Plain
from taut.recoding import Recoding
from taut.sparse_weight import SparseWeight
from taut.techniques import PruneWeights
from taut.zoo.lenet import LeNet5

# ---- sizes ----------------------------------------------------------------------------------


def lenet5() -> nn.Module:
    model = LeNet5()
    names = tuple(f"{n}.weight" for n in ("conv1", "conv2", "fc1", "fc2"))
    recode(model, *names, steps=(PruneWeights(sparsity=0.92), SHARE))
    return model


def test_the_overhead_of_lenet5_stays_under_200_bytes(tmp_path: Path) -> None:
    size_bytes = pack(lenet5(), tmp_path / "net.taut")
    summary = inspect(tmp_path / "net.taut")
    assert summary.size_bytes == size_bytes
    assert 14 < summary.overhead_bytes < 200
    assert sum(t.numel for t in summary.tensors) == 431_080
    coded = sum(t.size_bytes for t in summary.tensors)
    assert summary.size_bytes - summary.overhead_bytes - 1 <= coded
    assert coded <= summary.size_bytes - summary.overhead_bytes


def test_the_account_names_every_part(tmp_path: Path) -> None:
    model = lenet5()
    size_bytes = pack(model, tmp_path / "net.taut")
    tensors = {t.names[0]: t for t in inspect(tmp_path / "net.taut").tensors}
    fc1 = tensors["fc1.weight"]
    kept = int(model.fc1.weight.count_nonzero())
    assert (fc1.shape, fc1.numel, fc1.format) == ((500, 800), 400_000, "sparse.v1")
    counts = {name: part.count for name, part in fc1.parts.items()}
    assert counts == {"positions": 400_000, "values.index": kept, "values.table.values": 8}
    # By the entropy of 32,000 positions among 400,000 and of three bits a value.
    assert 0.98 * 160_875 < fc1.parts["positions"].bits < 1.01 * 160_875 + 2000
    assert 2 * kept < fc1.parts["values.index"].bits < 3.01 * kept + 100
    assert fc1.size_bytes == pytest.approx(sum(p.bits for p in fc1.parts.values()) / 8)
    assert tensors["conv1.bias"].parts["values"].count == 20
    assert size_bytes < 431_080 * 4 / 35


def test_what_says_nothing_costs_next_to_nothing(tmp_path: Path) -> None:
    """Two million zeros and a constant: load takes from the model what it may expect."""
    model = nn.ParameterDict(
        {"zeros": torch.zeros(2000, 1000), "ones": torch.ones(1000), "count": torch.zeros(1)}
    )
    assert pack(model, tmp_path / "net.taut") < 600
    fresh = nn.ParameterDict({n: torch.rand_like(t) for n, t in model.items()})
    same_tensors(load(tmp_path / "net.taut", fresh).state_dict(), model.state_dict())
    with pytest.raises(FormatError, match=r"claim 2,001,001 numbers, a file of [\d,]+ bytes may"):
        inspect(tmp_path / "net.taut")


def test_many_layers_alike_fit_the_header(tmp_path: Path) -> None:
    """What zlib makes of long runs of like entries must stay under the bound against bombs."""

    def deep() -> nn.Module:
        layers = (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(400))
        return nn.Sequential(*layers)

    pack(deep(), tmp_path / "net.taut")
    load(tmp_path / "net.taut", deep())


# ---- models that do not fit -----------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, hidden: int = 5, names: tuple[str, ...] = ("fc1", "fc2")) -> None:
        super().__init__()
        for name, (n_in, n_out) in zip(names, ((4, hidden), (hidden, 3), (3, 3)), strict=False):
            self.add_module(name, nn.Linear(n_in, n_out))


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "extra": (lambda: Net(names=("fc1", "fc2", "fc3")), r"the file lacks fc3\.bias, fc3\.weight"),
    "missing": (lambda: Net(names=("fc1",)), r"Net lacks fc2\.bias, fc2\.weight"),
    "renamed": (
        lambda: Net(names=("fc1", "head")),
        r"the file lacks head\.bias, head\.weight; Net lacks fc2\.bias, fc2\.weight",
    ),
    "shape": (
        lambda: Net(hidden=6),
        r"fc1\.weight is \[5, 4\] in the file and \[6, 4\] in the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("steps", [(), (PRUNE, SHARE)], ids=["plain", "recoded"])
def test_a_model_that_differs_is_told_how_and_left_alone(
    tmp_path: Path, wrong: str, steps: tuple[Recoding, ...]
) -> None:
    model = Net()
    if steps:
        recode(model, "fc1.weight", "fc2.weight", steps=steps)
    pack(model, tmp_path / "net.taut")
    build, message = WRONG[wrong]
    other = build().train()
    before, layers = copy.deepcopy(other.state_dict()), [type(m) for m in other.modules()]
    with pytest.raises(
        FormatError, match=rf"net\.taut: the file is of another model than Net: {message}"
    ):
        load(tmp_path / "net.taut", other)
    same_tensors(other.state_dict(), before)
    assert [type(m) for m in other.modules()] == layers
    assert other.training


def test_damage_in_the_stream_leaves_the_model_alone(tmp_path: Path) -> None:
    state = packed_state(Net())
    broken = dict(list(state.items())[:-1])
    last = next(n for n in state if n not in broken)
    whole, short = encode(state), encode(broken)
    assert len(whole) > len(short)
    wide = SparseWeight(torch.ones(state[last].shape) > 0, Plain.of(torch.zeros(0)))
    (tmp_path / "net.taut").write_bytes(encode({**broken, last: wide}))
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormatError, match=r"net\.taut: the coded stream"):
        load(tmp_path / "net.taut", model)
    same_tensors(model.state_dict(), before)


def test_a_packed_model_is_not_loaded_into(tmp_path: Path) -> None:
    model = Net()
    recode(model, "fc1.weight", steps=(PRUNE,))
    pack(model, tmp_path / "net.taut")
    loaded = load(tmp_path / "net.taut", Net())
    with pytest.raises(FormatError, match="packed already; load into a freshly built one"):
        load(tmp_path / "net.taut", loaded)


# ---- files ----------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read .*nowhere\.taut: No such file"):
        load(tmp_path / "nowhere.taut", Net())
    with pytest.raises(FormatError, match=r"cannot read .*: Is a directory"):
        inspect(tmp_path)


def test_an_unwritable_target_raises_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.taut").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*net\.taut: "):
        pack(Net(), tmp_path / "file" / "net.taut")
    with pytest.raises(RunError, match=r"cannot write .*folder\.taut: Is a directory"):
        pack(Net(), tmp_path / "folder.taut")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.taut"]
    assert (tmp_path / "file").read_text() == "in the way"
    assert list((tmp_path / "folder.taut").iterdir()) == []


def test_a_write_that_breaks_off_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(Net(), tmp_path / "net.taut")
    before = (tmp_path / "net.taut").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taut.files.os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device; free some space"):
        pack(Net(), tmp_path / "net.taut")
    assert [p.name for p in tmp_path.iterdir()] == ["net.taut"]
    assert (tmp_path / "net.taut").read_bytes() == before


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    pack(Net(), tmp_path / "a" / "b" / "net.taut")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["net.taut"]
