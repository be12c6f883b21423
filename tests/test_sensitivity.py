"""Sensitivities: the numbers are those of the scan, and the page shows them."""

import json
import math
import re

import pytest
import torch
from nets import traced
from plotly.offline import get_plotlyjs

from taut.errors import RunError
from taut.sensitivity import Sensitivity, render, sensitivity, write_plot
from taut.statistics import SPARSITIES, Statistics


def test_the_numbers_are_those_of_the_scan(trained, task):
    torch.manual_seed(1)
    found = sensitivity(trained, task)
    torch.manual_seed(1)
    loss = task.calibration_loss()
    assert found.baseline == loss(trained)
    assert found.examples == 1024
    assert found.sparsities == SPARSITIES
    for site in traced(trained, torch.zeros(2, 64)).sites:
        assert found.losses[site.name] == Statistics(trained, loss).sensitivity(site).losses
        assert found.weights[site.name] == site.numel


def invented(**changes):
    given = {
        "task": "a <b>", "examples": 10, "baseline": 0.5, "sparsities": (0.3, 0.5),
        "losses": {"x</script>": (0.6, math.inf)}, "weights": {"x</script>": 1200},
    }  # fmt: skip
    return Sensitivity(**{**given, **changes})


def test_the_page_holds_the_curves_and_escapes_names():
    page = render(invented())
    assert "<h1>a &lt;b&gt;: loss" in page
    shown = re.search(r'Plotly.newPlot\("plot", (\[.*?\]), \{', page).group(1)
    (curve,) = json.loads(shown)
    assert curve["name"] == "x</script> (1,200)"
    assert (curve["x"], curve["y"]) == ([0.3, 0.5], [0.6, None])
    assert page.count("</script>") == 2
    assert not re.search(r'(src|href)="http', page.replace(get_plotlyjs(), ""))


def test_a_network_without_weights_has_an_empty_plot():
    assert '"shapes": []' in render(invented(baseline=math.nan, losses={}))


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"plot\.html"):
        write_plot(invented(), tmp_path / "file" / "plot.html")
