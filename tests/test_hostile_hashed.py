"""Hostile files of hashed weights, and of parts that are to be the same as others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile import PLAIN, attempt_both, check_cheap, check_refused, entries, text, weight

from taut.coding import Encoder


def hashed(shape: Any = (3, 4), stream: bytes = b"", part: Any = PLAIN, **scalars: Any) -> bytes:
    """A file whose weight a hash draws from its buckets."""
    return weight(["hashed.v1", {"buckets": 4, **scalars}, {"buckets": part}], stream, shape)


def banded(*counts: int) -> bytes:
    """A file of filters of 2 × 2 whose bands have so many buckets."""
    coder = Encoder()
    coder.plain("seed", np.zeros(4, np.uint8), 1, 4)
    coder.integers("bands", np.array(counts, np.int64), len(counts))
    coder.plain("buckets", np.zeros(8, np.uint8), 2, 4)
    return hashed((3, 4, 2, 2), coder.finish(), bands=3)


DRAWN = ["hashed.v1", {"buckets": 4}]
NO_BUCKETS = {"none": 0, "below": -1, "bool": True, "float": 4.0, "text": "4", "huge": 1 << 31}
NO_RUN = {"two": 2, "bool": True, "float": 4.0, "text": "4"}
NO_SCALE = {"zero": 0.0, "below": -1.0, "whole": 2, "fine": 0.1, "huge": 1e39, "text": "1"}
ATTACKS: dict[str, tuple[bytes, str]] = {
    "scalar": (hashed([]), "hashed.v1 needs a shape of at least one dimension"),
    "no_count": (weight(["hashed.v1", {}, {"buckets": PLAIN}]), r"\[1, 2\*\*31\), got None"),
    "no_part": (weight(DRAWN), "hashed.v1 lacks its part 'buckets'"),
    "beyond": (hashed(buckets=1 << 30), "'buckets' claims 1,073,741,824 numbers, more than all"),
    **{
        f"buckets_{name}": (hashed(buckets=n), r"hashed.v1: buckets must lie in \[1, 2\*\*31\)")
        for name, n in NO_BUCKETS.items()
    },
    **{
        f"run_{name}": (hashed(run=run), "hashed.v1: run must be 1, 4, 16 or 64")
        for name, run in NO_RUN.items()
    },
    **{
        f"scale_{name}": (hashed(scale=scale), "hashed.v1: scale must be a bfloat16 above 0")
        for name, scale in NO_SCALE.items()
    },
    "scale_infinite": (text('[["a",[3],["hashed.v1",{"buckets":1,"scale":1e999}]]]'), "got inf"),
    "bands_without": (hashed(bands=2), r"a filter of \[\] has 1 or 1 bands"),
    "bands_few": (hashed((3, 4, 2, 2), bands=2), r"a filter of \[2, 2\] has 1 or 3 bands"),
    "bands_bool": (hashed(bands=True), "has 1 or 1 bands"),
    "bands_wide": (hashed((1, 1, 33, 33), bands=65), "none above 1024 numbers has several"),
    "bands_great": (hashed((1, 1, 1 << 10, 1 << 9), bands=1535), "none above 1024 numbers"),
    "band_empty": (banded(3, 1, 0), r"bands share out the 4 buckets, .* got \(3, 1, 0\)"),
    "band_below": (banded(9, -1, -4), "bands share out the 4 buckets"),
    "bands_sum": (banded(2, 2, 2), r"bands share out the 4 buckets, .* got \(2, 2, 2\)"),
    "run_idle": (hashed(run=1), "scalars or parts that do nothing"),
    "bands_idle": (hashed(bands=1), "scalars or parts that do nothing"),
    "scale_idle": (hashed(scale=1.0), "scalars or parts that do nothing"),
    "same_as_itself": (hashed(part="weight.buckets"), "'weight.buckets', which is no earlier part"),
    "same_as_later": (hashed(part="bias.buckets"), "'bias.buckets', which is no earlier part"),
    "same_as_nothing": (hashed(part=""), "the same as '', which is no earlier part"),
    "same_as_a_tensor": (
        entries(["a", [4], PLAIN], ["b", [9], [*DRAWN, {"buckets": "a"}]]),
        "b.buckets, of the shape .4., is to be the same as 'a', which is no earlier part",
    ),
    "same_of_another_shape": (
        entries(
            ["a", [9], ["hashed.v1", {"buckets": 3}, {"buckets": PLAIN}]],
            ["b", [9], [*DRAWN, {"buckets": "a.buckets"}]],
        ),
        r"the same as 'a.buckets', which is of the shape \[3\]",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path, *ATTACKS[name])


@pytest.mark.parametrize("name", ["beyond", "bands_great"])
def test_a_great_claim_takes_no_memory(tmp_path: Path, name: str) -> None:
    check_cheap(check_refused(tmp_path, *ATTACKS[name]))


NODES = st.builds(
    lambda n, more, part: ["hashed.v1", {"buckets": n, **more}, {"buckets": part}],
    st.integers(1, 40),
    st.sampled_from([{}, {"run": 4}, {"bands": 3}, {"scale": 0.5}]),
    st.sampled_from([PLAIN, ["integers.v1"], "first.buckets"]),
)


@given(NODES, NODES, st.lists(st.integers(0, 40), max_size=4), st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_stream_in_hashed_weights(
    tmp_path_factory: pytest.TempPathFactory, one: Any, two: Any, shape: list[int], stream: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.taut"
    path.write_bytes(entries(["first", shape, one], ["second", shape, two], stream=stream))
    attempt_both(path)
    path.write_bytes(text(json.dumps([["weight", shape, one]]), stream))
    attempt_both(path)
