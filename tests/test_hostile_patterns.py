"""Hostile files of blocks and of N of M: refused as those of test_hostile.py are, and kept by them.

`TAUT_WRITE_HOSTILE=1 pytest tests/test_hostile.py tests/test_hostile_patterns.py` writes the files.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile import (
    DRY,
    HUGE,
    PLAIN,
    check_cheap,
    check_kept,
    check_refused,
    entries,
    refused_or_read,
    weight,
)

BLOCKS = ["blocks.v1", {"rows": 4}, {"values": PLAIN}]
TWO_FOUR = ["n_of_m.v1", {"keep": 2, "of": 4}, {"values": PLAIN}]


def groups(keep: Any, of: Any) -> list[Any]:
    return ["n_of_m.v1", {"keep": keep, "of": of}, {"values": PLAIN}]


ATTACKS: dict[str, tuple[bytes, str]] = {
    **{
        f"rows_{name}": (weight(["blocks.v1", {"rows": value}]), "rows must be 4 or 16, got")
        for name, value in (("bool", True), ("float", 4.0), ("eight", 8), ("huge", HUGE))
    },
    "rows_missing": (weight(["blocks.v1", {}, {"values": PLAIN}]), "4 or 16, got None"),
    "blocks_vector": (entries(["a", [8], BLOCKS]), "shape of at least two dimensions .* got"),
    "blocks_void": (entries(["a", [1 << 39, 0], BLOCKS]), "claim 549,755,813,888 numbers"),
    "blocks_bare": (weight(["blocks.v1", {"rows": 4}]), "lacks its part 'values'"),
    **{
        f"groups_{name}": (weight(groups(*of)), "must keep N of M with 0 < N < M <= 128, got")
        for name, of in (
            ("none", (0, 4)), ("all", (4, 4)), ("bool", (True, 4)), ("float", (2, 4.0)),
            ("wide", (2, 129)), ("huge", (2, HUGE)), ("text", ("2", 4)),
        )
    },
    "groups_missing": (weight(["n_of_m.v1", {"keep": 2}]), "got 2 of None"),
    "groups_bare": (weight(TWO_FOUR[:2]), "lacks its part 'values'"),
    "groups_scalar": (entries(["a", [], TWO_FOUR]), "needs a shape of at least one dimension"),
    "groups_void": (entries(["a", [1 << 39, 0], TWO_FOUR]), "claim 549,755,813,888 numbers"),
    "groups_dry": (entries(["a", [1 << 9, 1 << 10], TWO_FOUR], stream=DRY), "the coded stream"),
    "blocks_dry": (entries(["a", [1 << 9, 1 << 10], BLOCKS], stream=DRY), "the coded stream"),
    "groups_thin": (entries(["a", [1 << 20, 1], groups(1, 128)]), "the coded stream"),
}  # fmt: skip
KEPT = ("blocks_dry", "blocks_vector", "groups_dry", "groups_wide")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_at_no_cost(tmp_path: Path, name: str) -> None:
    check_cheap(check_refused(tmp_path, *ATTACKS[name]))


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_files_are_these(name: str) -> None:
    check_kept(name, ATTACKS[name][0])


NODES = st.recursive(
    st.just(PLAIN),
    lambda inner: st.one_of(
        st.builds(lambda r, v: ["blocks.v1", {"rows": r}, {"values": v}],
                  st.sampled_from([4, 16]), inner),
        st.builds(lambda n, m, v: ["n_of_m.v1", {"keep": n, "of": m}, {"values": v}],
                  st.integers(1, 3), st.integers(4, 9), inner),
        st.builds(lambda v: ["sparse.v1", {}, {"values": v}], inner),
    ),
    max_leaves=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "any.taut"


@given(NODES, st.lists(st.integers(0, 40), max_size=4), st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_stream(path: Path, node: Any, shape: list[int], stream: bytes) -> None:
    refused_or_read(path, weight(node, stream))
    refused_or_read(path, weight(node, stream, shape))
