"""Hostile files of shared vectors, mirrored tables and structured weights: each is refused."""

from pathlib import Path

import numpy as np
import pytest
from test_hostile import HUGE, PLAIN, check_refused, entries, weight

from taut.coding import Encoder

ROWS = {"part0": PLAIN, "part1": PLAIN}
MIRRORED = ["mirrored.v1", {}, {"first": PLAIN}]


def coded_index(entries: int, count: int = 12) -> bytes:
    """The stream of twelve indices, and what a decoder needs to read on."""
    coder = Encoder()
    coder.symbols("index", np.zeros(count, np.int64), entries, count)
    return coder.finish() + b"\1" * 8


def coded_kinds(kinds: list[int]) -> bytes:
    """The stream of which part each of three rows is in, and what a decoder needs to read on."""
    coder = Encoder()
    coder.symbols("kinds", np.array(kinds), 2, 3)
    return coder.finish() + b"\1" * 8


def coded_tie() -> bytes:
    """The same of the three rows of a weight, tied to two."""
    return coded_index(2, 3)


ATTACKS: dict[str, tuple[bytes, str]] = {
    **{
        f"vectors_{name}": (
            weight(["shared_vectors.v1", scalars, {"table": PLAIN}]), message
        )
        for name, scalars, message in (
            ("bare", {}, "width must be 2, 4 or 8, got None"),
            ("odd", {"entries": 4, "width": 3}, "width must be 2, 4 or 8, got 3"),
            ("bool", {"entries": 4, "width": True}, "width must be 2, 4 or 8, got True"),
            ("float", {"entries": 4, "width": 2.0}, "width must be 2, 4 or 8, got 2.0"),
            ("wide", {"entries": 4, "width": 8}, "vectors of 8 are wider than the 4 columns"),
            ("none", {"entries": 0, "width": 2}, r"entries must lie in \[1, 256\], got 0"),
            ("huge", {"entries": HUGE, "width": 2}, r"entries must lie in \[1, 256\], got 1"),
        )
    },
    "mirrored_odd": (
        weight(["shared_values.v1", {"entries": 3}, {"table": MIRRORED}], coded_index(3)),
        r"mirrored.v1 needs an even number of entries, got \[3\]",
    ),
    "mirrored_matrix": (
        weight(["mirrored.v1", {}, {"first": PLAIN}]),
        r"mirrored.v1 needs an even number of entries, got \[3, 4\]",
    ),
    **{
        f"scale_{name}": (
            weight(["shared_values.v1", {"entries": 2}, {"table": [
                "scaled.v1", {} if scale is None else {"scale": scale}, {"first": PLAIN}
            ]}], coded_index(2)),
            "scaled.v1: scale must be a bfloat16 above 0, got",
        )
        for name, scale in (
            ("missing", None), ("zero", 0.0), ("below", -1.0), ("whole", 1), ("fine", 0.1),
            ("huge", 1e39), ("text", "1"), ("bool", True),
        )
    },
    "table_of_none": (
        weight(["shared_values.v1", {"entries": 2}, {"table": [
            "scaled.v1", {"scale": 1.0}, {"first": "weight.index"}
        ]}], coded_index(2)),
        "weight.table.first, .* is to be the same as 'weight.index', which is no earlier part",
    ),
    **{
        f"{structure}_{name}": (
            weight([f"{structure}.v1", scalars, {"generators": PLAIN}]), message
        )
        for structure in ("circulant", "toeplitz")
        for name, scalars, message in (
            ("missing", {}, "block must be a whole number, got None"),
            ("bool", {"block": True}, "block must be a whole number, got True"),
            ("float", {"block": 2.0}, "block must be a whole number, got 2.0"),
            ("none", {"block": 0}, r"block must lie in \[1, 4\] \(its inputs\), got .*0"),
            ("wide", {"block": 5}, r"block must lie in \[1, 4\] \(its inputs\), got .*5"),
            ("huge", {"block": HUGE}, r"block must lie in \[1, 4\]"),
            ("more", {"block": 2, "terms": 1}, "scalars or parts that do nothing"),
        )
    },
    **{
        f"kronecker_{name}": (
            weight(["kronecker.v1", scalars, {"generators": PLAIN}]), message
        )
        for name, scalars, message in (
            ("missing", {"high": 1, "wide": 2}, "terms must be a whole number, got None"),
            ("uneven", {"high": 2, "wide": 2, "terms": 1}, "high must divide 3, got .*'high': 2"),
            ("none", {"high": 1, "wide": 0, "terms": 1}, "wide must divide 4"),
            ("below", {"high": -1, "wide": 2, "terms": 1}, "high must divide 3"),
            ("huge", {"high": 1, "wide": HUGE, "terms": 1}, "wide must divide 4"),
            ("terms", {"high": 1, "wide": 2, "terms": 3}, r"terms must lie in \[1, 2\]"),
            ("endless", {"high": 1, "wide": 2, "terms": HUGE}, r"terms must lie in \[1, 2\]"),
        )
    },
    **{
        f"tied_{name}": (weight(["tied.v1", scalars, {"book": PLAIN}]), message)
        for name, scalars, message in (
            ("missing", {}, r"rows must lie in \[1, 3\], got None"),
            ("none", {"rows": 0}, r"rows must lie in \[1, 3\], got 0"),
            ("bool", {"rows": True}, r"rows must lie in \[1, 3\], got True"),
            ("more", {"rows": 4}, r"rows must lie in \[1, 3\], got 4"),
            ("huge", {"rows": HUGE}, r"rows must lie in \[1, 3\], got"),
            ("flag", {"rows": 2, "scaled": 1}, "kernels and scaled are true or left out, got"),
            ("flat", {"rows": 2, "kernels": True}, r"kernels need a shape .* in 3 .* \[3, 4\]"),
        )
    },
    "tied_idle": (weight(["tied.v1", {"rows": 2, "scaled": False}, {"book": PLAIN}], coded_tie()),
                  "scalars or parts that do nothing"),
    "tied_bare": (weight(["tied.v1", {"rows": 2}], coded_tie()), "lacks its part 'book'"),
    "tied_void": (
        entries(["a", [0, 4], ["tied.v1", {"rows": 1}, {"book": PLAIN}]]), "a shape of numbers in 2"
    ),
    **{
        f"rows_{name}": (weight(["row_parts.v1", scalars, ROWS], coded_kinds([0, 0, 1])), message)
        for name, scalars, message in (
            ("missing", {}, "2 to 16 parts .*, got None"),
            ("one", {"parts": 1}, "2 to 16 parts .*, got 1"),
            ("bool", {"parts": True}, "2 to 16 parts .*, got True"),
            ("many", {"parts": 17}, "2 to 16 parts .*, got 17"),
            ("huge", {"parts": HUGE}, "2 to 16 parts .*, got"),
        )
    },
    "rows_of_none": (
        weight(["row_parts.v1", {"parts": 2}, ROWS], coded_kinds([0, 0, 0])),
        "row_parts.v1: part 1 has no row",
    ),
    "rows_flat": (
        entries(["a", [4], ["row_parts.v1", {"parts": 2}, ROWS]]), r"two dimensions, got 2 of \[4\]"
    ),
    "rows_lacking": (
        weight(["row_parts.v1", {"parts": 2}, {"part0": PLAIN}], coded_kinds([0, 0, 1])),
        "lacks its part 'part1'",
    ),
    "structure_empty": (
        entries(["a", [0, 4], ["circulant.v1", {"block": 2}, {"generators": PLAIN}]]),
        r"circulant.v1 needs a shape of numbers, got \[0, 4\]",
    ),
    "generators_missing": (weight(["circulant.v1", {"block": 2}]), "lacks its part 'generators'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path, *ATTACKS[name])
