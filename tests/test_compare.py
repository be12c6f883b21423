"""Every technique at several strengths on one network: rows, refusals, the page."""

import json
import re

import pytest
from conftest import digits_task, small_net
from test_search import Heard, trained_net

from taut.comparison import comparison_data, write_comparison
from taut.errors import RunError, SearchError
from taut.search import compare
from taut.technique import techniques

FEW = {"epochs": 1, "strengths": 2, "techniques": "share_values, code_length, fold_norms, low_rank"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    heard, folder = Heard(), tmp_path_factory.mktemp("compare")
    return compare(trained_net(), digits_task(), folder=folder, watch=heard, **FEW), heard


def test_each_technique_comes_at_its_strengths(found):
    result, heard = found
    recipes = [(r.technique, r.recipe) for r in result.rows]
    assert [t for t, _ in recipes] == [
        "code_length", "code_length", "fold_norms", "low_rank", "low_rank", "share_values",
        "share_values",
    ]  # fmt: skip
    assert all(r.endswith("recover(epochs=1)") for _, r in recipes)
    assert recipes[0][1].startswith("code_length() > aim(size_bytes=")
    assert recipes[-2][1] == "share_values(bits=1) > recover(epochs=1)"
    assert recipes[-1][1] == "share_values(bits=8) > recover(epochs=1)"
    assert len(heard.trials) + sum(bool(r.why) for r in result.rows) >= len(result.rows)


def test_what_does_not_apply_says_why(found):
    (row,) = [r for r in found[0].rows if r.technique == "fold_norms"]
    assert (row.candidate is None) == bool(row.why)


def test_all_are_timed_in_one_run_and_recorded(found):
    result, _ = found
    for candidate in result.candidates:
        assert [t.batch for t in candidate.measurement.latencies] == [1, 64]
    record = json.loads((result.folder / "compare.json").read_text())
    assert [r["recipe"] for r in record["rows"]] == [r.recipe for r in result.rows]
    assert 1 <= len(result.frontier) <= len(result.candidates)


def test_again_it_trains_nothing(found):
    heard = Heard()
    again = compare(trained_net(), digits_task(), folder=found[0].folder, watch=heard, **FEW)
    assert heard.epochs == 0
    assert [r.recipe for r in again.rows] == [r.recipe for r in found[0].rows]


def test_the_page_has_the_table_and_the_picture(found):
    result, _ = found
    data = comparison_data(result, trained_net())
    assert len(data.candidates) == len(result.candidates)
    assert {c.family for c in data.curves} <= set(techniques())
    page = write_comparison(result, trained_net()).read_text("utf-8")
    own = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert len(page.encode()) < 6_000_000
    for candidate in result.candidates:
        assert f"<code>{candidate.recipe.replace('>', '&gt;')}</code>" in own
    assert own.count('role="img"') == 3
    assert "https://" not in own
    assert "// FRONTIER" not in page
    assert "function candidates(" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": 0}, "compare: strengths must be at least 1, got 0"),
        ({"techniques": "prune"}, "compare: techniques='prune' names no technique"),
        ({"settings": "low_rank()"}, "settings are steps that change how recoveries train"),
    ],
)
def test_what_there_is_not_is_refused(options, message, tmp_path):
    with pytest.raises(SearchError, match=message):
        compare(small_net(), digits_task(), folder=tmp_path, **options)


def test_another_networks_folder_is_refused(found):
    with pytest.raises(RunError, match=r"belongs to another comparison .its weights is"):
        compare(small_net(), digits_task(), folder=found[0].folder, **FEW)
