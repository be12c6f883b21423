"""lookup_lstm: all steps of an LSTM in one call, against its definition step by step."""

import pytest
import torch

from taut.kernels import lookup_lstm, reference
from taut.kernels.lookup import pack_indices

from .conftest import needs_native


def given(steps: int, batch: int, size: int) -> dict[str, torch.Tensor]:
    """Inputs, states and 3-bit weights of an LSTM."""
    return {
        "inputs": torch.randn(steps, batch, 4 * size),
        "hidden": torch.randn(batch, size),
        "cell": torch.randn(batch, size),
        "codes": pack_indices(torch.randint(0, 8, (4 * size, size)), 3),
        "table": torch.randn(1, 1, 8) / size**0.5,
    }


@pytest.mark.parametrize(
    ("steps", "batch", "size"), [(1, 1, 16), (7, 1, 33), (5, 3, 130), (0, 2, 8)]
)
def test_it_is_the_definition(variant: tuple[str, ...], steps: int, batch: int, size: int) -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 8, (4 * size, size))
    args = {**given(steps, batch, size), "codes": pack_indices(index, 3)}
    before = {k: v.clone() for k, v in args.items()}
    states, last = lookup_lstm(**args, bits=3)
    weight = args["table"][0, 0][index].double()
    hidden, cell = args["hidden"].double(), args["cell"].double()
    assert states.shape == (steps, batch, size)
    for t in range(steps):
        gates = args["inputs"][t].double()
        hidden, cell = reference.lstm_cell(gates, hidden @ weight.T, cell)
        torch.testing.assert_close(states[t].double(), hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(last.double(), cell, rtol=0, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in args.items())


@needs_native
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("inputs", torch.zeros(2, 1, 60), r"inputs must be \[steps, batch, 64\]"),
        ("cell", torch.zeros(1, 15), r"hidden and cell must be \[1, 16\], got \[1, 15\]"),
        ("hidden", torch.zeros(1, 16).double(), "hidden and cell has the wrong dtype"),
        ("codes", torch.zeros(60, 16, dtype=torch.int32), "words, got codes"),
    ],
)
def test_wrong_arguments_are_refused(name: str, value: torch.Tensor, said: str) -> None:
    args = {**given(2, 1, 16), name: value}
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.lookup_lstm(*args.values(), 3, 16)
