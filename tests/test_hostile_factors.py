"""Hostile files of low rank: refused as those of test_hostile.py are, and kept by them.

`TAUT_WRITE_HOSTILE=1 pytest tests/test_hostile.py tests/test_hostile_factors.py` writes the files.
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


def low_rank(rank: Any, factors: Any = PLAIN) -> list[Any]:
    return ["low_rank.v1", {"rank": rank}, {"factors": factors}]


ATTACKS: dict[str, tuple[bytes, str]] = {
    **{
        f"rank_{name}": (weight(low_rank(value)), r"rank must lie in \[1, \d+\], got")
        for name, value in (
            ("none", 0), ("bool", True), ("float", 2.0), ("huge", HUGE), ("text", "2"),
            ("below", -1),
        )
    },
    "rank_missing": (weight(["low_rank.v1", {}, {"factors": PLAIN}]), "got None"),
    "rank_bare": (weight(["low_rank.v1", {"rank": 1}]), "lacks its part 'factors'"),
    "rank_vector": (entries(["a", [8], low_rank(1)]), "shape of at least two dimensions, got"),
    "rank_scalar": (entries(["a", [], low_rank(1)]), "shape of at least two dimensions, got"),
    "rank_void": (entries(["a", [1 << 39, 0], low_rank(1)]), "claim 549,755,813,888 numbers"),
    "rank_empty": (entries(["a", [8, 0], low_rank(1)]), r"rank must lie in \[1, 0\]"),
    "rank_dry": (
        entries(["a", [1 << 9, 1 << 10], low_rank(1 << 8)], stream=DRY), "the coded stream",
    ),
}  # fmt: skip
KEPT = ("rank_dry", "rank_huge", "rank_vector")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_at_no_cost(tmp_path: Path, name: str) -> None:
    check_cheap(check_refused(tmp_path, *ATTACKS[name]))


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_files_are_these(name: str) -> None:
    check_kept(name, ATTACKS[name][0])


NODES = st.recursive(
    st.just(PLAIN),
    lambda inner: st.one_of(
        st.builds(low_rank, st.integers(1, 5), inner),
        st.builds(lambda v: ["sparse.v1", {}, {"values": v}], inner),
    ),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "any.taut"


@given(NODES, st.lists(st.integers(0, 40), max_size=4), st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_stream(path: Path, node: Any, shape: list[int], stream: bytes) -> None:
    refused_or_read(path, weight(node, stream))
    refused_or_read(path, weight(node, stream, shape))
