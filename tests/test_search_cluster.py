"""A search on Ray's local cluster of several nodes, one of which is killed in the middle."""

import threading
import time

import pytest
from conftest import digits_task
from test_search import trained_net

from taut.errors import SearchError
from taut.search import loop, search

ray = pytest.importorskip("ray")

OPTIONS = {"trials": 4, "epochs": 1, "batch": 2, "techniques": "share_values, quantize"}
GOAL = "bytes<=30%, score>=-50%"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_cluster_that_loses_a_node_finds_what_one_process_finds(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(loop, "timed", lambda ground, files, **_: [((), ())] * (len(files) + 1))
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    alone = search(trained_net(), digits_task(), GOAL, folder=tmp_path / "a", **OPTIONS)
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        other = cluster.add_node(num_cpus=1)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip(f"this machine is too busy for Ray's nodes to start: {error}")
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        folder = tmp_path / "b"

        def kill():
            while not list(folder.glob("trials/*/trial.json")):
                time.sleep(0.1)
            cluster.remove_node(other, allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        spread = search(
            trained_net(), digits_task(), GOAL, folder=folder, ray=cluster.address, **OPTIONS
        )
        killer.join(60)
        assert not killer.is_alive()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert [c.recipe for c in spread.candidates] == [c.recipe for c in alone.candidates]
    assert [c.measurement.score for c in spread.frontier] == [
        c.measurement.score for c in alone.frontier
    ]
    for one, same in zip(alone.candidates, spread.candidates, strict=True):
        assert one.measurement.size_bytes == same.measurement.size_bytes


def test_no_cluster_is_told(tmp_path):
    with pytest.raises(SearchError, match=r"no Ray cluster answers at '127.0.0.1:9'"):
        search(trained_net(), digits_task(), GOAL, folder=tmp_path, ray="127.0.0.1:9", **OPTIONS)
