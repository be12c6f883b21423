"""lstm_cell and gru_cell against PyTorch's own cells."""

import pytest
import torch

from taut.kernels import gru_cell, lstm_cell, reference

from .conftest import needs_native


def assert_close_to_double(got: torch.Tensor, truth: torch.Tensor) -> None:
    """Four units in the last place of numbers around one: sums of a few functions' errors."""
    torch.testing.assert_close(got.double(), truth, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 1024])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_an_lstm_steps(variant: tuple[str, ...], size: int, batch: int, spread: float) -> None:
    i, h = spread * torch.randn(2, batch, 4 * size)
    cell = torch.randn(batch, size)
    got = lstm_cell(i, h, cell)
    for ours, truth in zip(
        got, reference.lstm_cell((i + h).double(), h.double() * 0, cell.double()), strict=True
    ):
        assert_close_to_double(ours, truth)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 1024])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_a_gru_steps(variant: tuple[str, ...], size: int, batch: int, spread: float) -> None:
    i, h = spread * torch.randn(2, batch, 3 * size)
    state = torch.randn(batch, size)
    truth = reference.gru_cell(i.double(), h.double(), state.double())
    assert_close_to_double(gru_cell(i, h, state), truth)


def test_small_arguments_keep_their_digits(variant: tuple[str, ...]) -> None:
    content = torch.logspace(-30, 0, 64)[None]
    i = torch.cat([torch.full((1, 64), 1e4), torch.zeros(1, 64), content, torch.zeros(1, 64)], 1)
    _, cell = lstm_cell(i, torch.zeros_like(i), torch.zeros(1, 64))
    torch.testing.assert_close(cell.double(), content.double().tanh(), rtol=5e-7, atol=0)


def test_far_arguments_saturate_and_nan_stays(variant: tuple[str, ...]) -> None:
    for value in (1e4, float("inf")):
        i = torch.full((1, 64), value)
        hidden, cell = lstm_cell(i, torch.zeros(1, 64), torch.ones(1, 16))
        assert torch.equal(cell, torch.full((1, 16), 2.0))
        assert bool(hidden.isfinite().all())
        _, cell = lstm_cell(-i, torch.zeros(1, 64), torch.ones(1, 16))
        assert float(cell.abs().max()) < 1e-30
    nan = torch.full((1, 64), float("nan"))
    assert bool(lstm_cell(nan, nan, torch.ones(1, 16))[0].isnan().all())
    assert bool(gru_cell(nan[:, :48], nan[:, :48], torch.ones(1, 16)).isnan().all())


def test_nothing_in_gives_nothing_out(variant: tuple[str, ...]) -> None:
    empty = torch.zeros(0, 64)
    assert lstm_cell(empty, empty, torch.zeros(0, 16))[1].shape == (0, 16)
    assert gru_cell(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0)).shape == (2, 0)


def test_gradients_go_by_the_definition() -> None:
    i = torch.randn(2, 64, requires_grad=True)
    lstm_cell(i, torch.zeros(2, 64), torch.zeros(2, 16))[0].sum().backward()
    assert i.grad is not None


@needs_native
def test_wrong_arguments_are_refused() -> None:
    i, cell = torch.randn(2, 64), torch.randn(2, 16)
    with pytest.raises(RuntimeError, match=r"i and h must be \[2, 64\], got \[2, 60\]"):
        torch.ops.taut.lstm_cell(i, i[:, :60].contiguous(), cell)
    with pytest.raises(RuntimeError, match="state has the wrong dtype"):
        torch.ops.taut.gru_cell(i[:, :48].contiguous(), i[:, :48].contiguous(), cell.double())
