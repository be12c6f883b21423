"""A whole search: to its goal, killed and gone on, refused, with trials that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import digits_task, small_net

import taut
from taut.errors import GoalError, RunError, SearchError
from taut.frontier import Frontier
from taut.report import write_report
from taut.search import jobs, loop, search
from taut.search.study import Study
from taut.types import Candidate, Measurement
from taut.watch import Watch

FEW = {"epochs": 1, "techniques": "share_values, prune_weights"}


class Heard(Watch):
    """Remembers what it was told."""

    def __init__(self):
        self.trials, self.epochs, self.said = [], 0, []

    def say(self, text):
        self.said.append(text)

    def on_epoch(self, record):
        self.epochs += 1

    def on_trial(self, candidate, done, trials):
        self.trials.append((done, trials))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A finished search of eight trials, and what it told on its way."""
    net, task = trained_net(), digits_task()
    heard = Heard()
    folder = tmp_path_factory.mktemp("search") / "run"
    goal = "bytes<=14%, score>=-5%"
    return search(net, task, goal, folder=folder, trials=8, watch=heard, **FEW), heard


def trained_net():
    import conftest

    net = small_net()
    net.load_state_dict(conftest._trained_state())
    return net.eval()


def recipes(result):
    return [c.recipe for c in result.candidates]


def test_a_search_finds_what_keeps_the_goal(found):
    result, heard = found
    assert result.met
    assert result.measurement.size_bytes <= 0.14 * result.original.size_bytes
    assert result.measurement.score >= 0.95 * result.original.score
    assert len(result.candidates) == len(set(recipes(result))) == 8
    assert heard.trials == [(i, 8) for i in range(1, 9)]
    file = result.folder / "net.taut"
    assert file.stat().st_size == result.measurement.size_bytes
    assert digits_task().evaluate(taut.load(file, small_net())) == result.measurement.score
    keep = [c for c in result.frontier if result.goal.met(c.measurement, result.original)]
    assert result.candidate.measurement.size_bytes == min(c.measurement.size_bytes for c in keep)


def test_every_recipe_of_it_can_be_done_again_by_compress(found, tmp_path):
    result, _ = found
    again = taut.compress(trained_net(), digits_task(), result.candidate.recipe, folder=tmp_path)
    assert (tmp_path / "net.taut").read_bytes() == (result.folder / "net.taut").read_bytes()
    assert again.measurement.score == result.measurement.score


def test_the_whole_frontier_is_timed_in_one_run(found):
    result, heard = found
    assert isinstance(result.frontier, Frontier)
    timed = json.loads((result.folder / "run.json").read_text())["timed"]
    assert len(timed) >= len(result.frontier) >= 1
    assert any("of the frontier in turn" in s for s in heard.said)
    for candidate in result.frontier:
        assert [t.batch for t in candidate.measurement.latencies] == [1, 64]
        assert all(t.runs >= 5 for t in candidate.measurement.latencies)


def test_the_report_is_written_and_tells_the_command(found):
    result, _ = found
    page = write_report(result, trained_net()).read_text("utf-8")
    assert "taut search task.py --goal" in page
    assert "--trials 8" in page
    assert "--techniques" in page


def test_the_same_call_again_returns_at_once_and_more_trials_add_to_it(found, tmp_path):
    result, _ = found
    goal, heard = str(result.goal), Heard()
    again = search(
        trained_net(), digits_task(), goal, folder=result.folder, trials=8, watch=heard, **FEW
    )
    assert heard.trials == []
    assert recipes(again) == recipes(result)
    assert again.candidate.measurement == result.candidate.measurement
    more = search(
        trained_net(), digits_task(), goal, folder=result.folder, trials=9, watch=heard, **FEW
    )
    assert heard.trials == [(9, 9)]
    assert recipes(more)[:8] == recipes(result)


def test_it_explains_what_it_chose(found):
    text = found[0].explain()
    assert text.startswith("Of ")
    assert found[0].candidate.recipe in text
    assert "bytes<=14%: kept; asked <= " in text


def test_an_impossible_goal_names_the_nearest_point_and_what_binds(tmp_path):
    result = search(
        trained_net(), digits_task(), "bytes<=4%, score>=+3%", folder=tmp_path, trials=2, **FEW
    )
    assert not result.met
    text = result.explain()
    assert "None of 2 candidates keeps the goal bytes<=4%, score>=+3%" in text
    assert f"The nearest: {result.candidate.recipe}" in text
    assert "score>=+3%: binds; asked >= " in text
    assert "no candidate does, " in text


def test_where_everything_is_predicted_hopeless_the_least_is_tried(tmp_path):
    goal = "bytes<=0.1%, score>=-50%"
    result = search(trained_net(), digits_task(), goal, folder=tmp_path, trials=1, **FEW)
    assert len(result.candidates) == 1
    assert result.ruled_out >= 60
    assert "bytes<=0.1%: binds" in result.explain()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": "tpee"}, SearchError, "no sampler is named 'tpee'; did you mean 'tpe'"),
        ({"halving": "halvin"}, SearchError, "no tournament is named 'halvin'; did you mean"),
        ({"trials": 0}, SearchError, "trials must be at least 1, got 0"),
        ({"workers": 2.5}, SearchError, "workers must be at least 1, got 2.5"),
        ({"engine": "torc"}, SearchError, "no engine is named 'torc'; did you mean 'torch'"),
        ({"minimize": "byte"}, GoalError, "no axis is named 'byte'; did you mean 'bytes'"),
        ({"workers": 2, "ray": "auto"}, SearchError, "workers=2 are processes of this machine"),
        ({"settings": "recover()"}, SearchError, "settings are steps that change how recoveries"),
        ({"speed": 2}, SearchError, "unexpected keyword argument 'speed'"),
    ],
)
def test_what_there_is_not_is_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        search(small_net(), digits_task(), "bytes<=5%", folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_contradictory_bounds_are_refused(tmp_path):
    with pytest.raises(GoalError, match="bounds each axis once, got 'bytes' twice"):
        search(small_net(), digits_task(), "bytes<=5%, bytes<=40kB", folder=tmp_path)


def test_the_study_of_another_task_is_refused(found, tmp_path):
    result, _ = found
    with pytest.raises(RunError, match=r"study 'digits' belongs to another search .its weights is"):
        search(small_net(), digits_task(), str(result.goal), folder=result.folder, **FEW)
    with pytest.raises(RunError, match=r"its goal is 'bytes<=14%, score>=-5%', not 'bytes<=3%'"):
        search(trained_net(), digits_task(), "bytes<=3%", folder=result.folder, **FEW)


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@127.0.0.1:9/study", "sqlite:////no/such/folder/study.db"]
)
def test_a_storage_that_does_not_answer_is_told_without_its_password(url, tmp_path):
    with pytest.raises(
        RunError, match=r"the study at .* does not answer: .*; check --storage"
    ) as e:
        search(small_net(), digits_task(), "bytes<=5%", folder=tmp_path, storage=url)
    assert "secret" not in str(e.value)


def test_a_foreign_study_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=url, study_name="digits", directions=["maximize"] * 2)
    study.ask()
    with pytest.raises(RunError, match="'digits' was not begun by taut search"):
        Study(tmp_path, "digits", {}, ("score", "bytes"), "higher", url)


def test_a_fresh_start_deletes_no_other_tasks_study(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    given = (tmp_path, "name", {"task": "mine"}, ("score", "bytes"), "higher", url)
    first = Study(*given)
    first.ask(optuna.samplers.RandomSampler(seed=0))
    first.close()
    yours = (tmp_path, "name", {"task": "yours"}, ("score", "bytes"), "higher", url, True)
    with pytest.raises(
        RunError, match="is not of task 'yours' but of 'mine', so it is not deleted"
    ):
        Study(*yours)
    again = Study(*given)
    assert len(again.optuna.get_trials()) == 1
    again.close()
    fresh = Study(*given, True)
    assert not fresh.optuna.get_trials()
    fresh.close()


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tmp_path, monkeypatch):
    real, calls = jobs.Trial.go, []

    def sometimes(self):
        calls.append(str(self.recipe))
        if len(calls) == 1:
            raise MemoryError("CUDA out of memory")
        return real(self)

    monkeypatch.setattr(jobs.Trial, "go", sometimes)
    goal = "bytes<=20%, score>=-20%"
    result = search(trained_net(), digits_task(), goal, folder=tmp_path, trials=2, **FEW)
    assert len(result.candidates) == 1
    (lost,) = result.lost
    assert (lost.recipe, lost.why) == (calls[0], "MemoryError: CUDA out of memory")
    assert "came to nothing: MemoryError: CUDA out of memory" in result.explain()
    assert "CUDA out of memory" in (tmp_path / "log.txt").read_text()


def test_where_every_trial_fails_there_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Trial, "go", lambda self: 1 / 0)
    with pytest.raises(RunError, match=r"none of the trials came to an end .ZeroDivisionError"):
        search(trained_net(), digits_task(), "bytes<=20%", folder=tmp_path, trials=2, **FEW)


@pytest.mark.parametrize("sampler", ["random", "grid", "gp", "nsga2", "nsga3"])
def test_every_sampler_proposes(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Trial, "go", simulated)
    monkeypatch.setattr(loop, "timed", untimed)
    goal, options = "bytes<=20%, score>=-50%", {**FEW, "sampler": sampler, "trials": 12}
    first = search(trained_net(), digits_task(), goal, folder=tmp_path / "a", **options)
    again = search(trained_net(), digits_task(), goal, folder=tmp_path / "b", **options)
    assert recipes(first) == recipes(again)
    assert len(set(recipes(first))) == len(recipes(first)) == 12


def simulated(self):
    """In place of a training: a candidate whose size and score follow from its recipe."""
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / "net.taut").write_bytes(SIMULATED.read_bytes())
    spread = int.from_bytes(str(self.recipe).encode()[-40:], "big") % 1000 / 1000
    measurement = Measurement(
        score=0.9 * spread, size_bytes=200 + int(4000 * spread), parameters=5000,
        nonzero_parameters=100, macs=5000, effective_macs=100,
    )  # fmt: skip
    path = str(self.folder / "net.taut")
    return Candidate(recipe=str(self.recipe), measurement=measurement, path=path, epochs=1)


SIMULATED = Path()


@pytest.fixture(autouse=True)
def _a_file_for_simulations(tmp_path_factory):
    global SIMULATED
    if Path() == SIMULATED:
        SIMULATED = tmp_path_factory.mktemp("simulated") / "net.taut"
        taut.pack(trained_net(), SIMULATED)


def untimed(ground, files, **_):
    return [((), ())] * (len(files) + 1)


def test_a_search_that_stops_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Trial, "go", simulated)
    monkeypatch.setattr(loop, "timed", untimed)
    goal, options = "bytes<=20%, score>=-50%", {**FEW, "trials": 16, "batch": 3}
    whole = search(trained_net(), digits_task(), goal, folder=tmp_path / "a", **options)

    class Stops(Watch):
        def on_trial(self, candidate, done, trials):
            if done == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(trained_net(), digits_task(), goal, folder=tmp_path / "b", watch=Stops(), **options)
    rest = search(trained_net(), digits_task(), goal, folder=tmp_path / "b", **options)
    assert recipes(rest) == recipes(whole)


@pytest.mark.parametrize("halving", ["halving", "hyperband"])
def test_tournaments_train_few_to_the_end(halving, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Trial, "go", simulated)
    monkeypatch.setattr(loop, "timed", untimed)
    goal, options = "bytes<=20%, score>=-50%", {**FEW, "epochs": 9, "trials": 14}
    result = search(
        trained_net(), digits_task(), goal, folder=tmp_path / "a", halving=halving, **options
    )
    spent = [
        sum(s.epochs for s in taut.Recipe.parse(r).steps if isinstance(s, taut.Recover))
        for r in recipes(result)
    ]
    assert len(spent) == 14
    assert set(spent) == {1, 3, 9}
    if halving == "halving":
        assert sum(spent) < 14 * 9 / 2

    class Stops(Watch):
        def on_trial(self, candidate, done, trials):
            if done == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(trained_net(), digits_task(), goal, folder=tmp_path / "b", halving=halving,
               watch=Stops(), **options)  # fmt: skip
    rest = search(
        trained_net(), digits_task(), goal, folder=tmp_path / "b", halving=halving, **options
    )
    assert recipes(rest) == recipes(result)


def test_a_survivor_trains_on_from_its_rung(tmp_path):
    heard = Heard()
    result = search(
        trained_net(), digits_task(), "bytes<=20%, score>=-50%", folder=tmp_path, trials=3,
        halving="halving", watch=heard, **{**FEW, "epochs": 3},
    )  # fmt: skip
    assert heard.epochs == 3 * 1 + 1 * 2
    grown = [r for r in recipes(result) if r.endswith("recover(epochs=1) > recover(epochs=2)")]
    assert len(grown) == 1


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from taut.task import load_task
from taut.search import search
torch.set_num_threads(1)
task = load_task({task!r})
search(task.model(), task, {goal!r}, folder={folder!r}, trials={trials},
       epochs=1, techniques="share_values, prune_weights")
"""


def started(task_file, folder, goal, trials=40):
    tests = str(Path(__file__).parent)
    script = SCRIPT.format(
        tests=tests, task=str(task_file), goal=goal, folder=str(folder), trials=trials
    )
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ})


def finished(folder):
    return len(list(Path(folder).glob("trials/*/trial.json")))


def test_killed_at_any_moment_it_loses_only_what_was_under_way(task_file, tmp_path):
    folder, goal = tmp_path / "run", "bytes<=20%, score>=-20%"
    process = started(task_file, folder, goal)
    deadline = time.monotonic() + 300
    while finished(folder) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = finished(folder)
    assert done >= 2
    task = taut.load_task(task_file)
    heard = Heard()
    result = search(task.model(), task, goal, folder=folder, trials=done + 1, watch=heard, **FEW)
    assert len(result.candidates) == done + 1
    assert heard.epochs <= 2  # the one under way, and one more
    states = [t.state.name for t in optuna_trials(folder)]
    assert "RUNNING" not in states


@pytest.mark.parametrize("url", ["", "sqlite:///{}/study.db"])
def test_a_trial_that_was_being_asked_for_is_given_up(tmp_path, url):
    given = tmp_path, "digits", {}, ("score", "bytes"), "higher", url.format(tmp_path) or None
    killed = Study(*given)
    killed.optuna.ask()
    killed.close()  # before the trial gets its owner
    again = Study(*given)
    assert again.adopt() == []
    (trial,) = again.optuna.trials
    again.close()
    # another folder may be asking for it in a database that is shared
    assert trial.state.name == ("RUNNING" if url else "FAIL")


def test_a_trial_that_was_being_told_is_told_again(tmp_path):
    given = tmp_path, "digits", {}, ("score", "bytes"), "higher"
    killed = Study(*given)
    trial = killed.ask(optuna.samplers.RandomSampler())
    killed.accept(trial, "quantize(bits=8)")
    trial.set_constraint("bytes", 0.5)
    killed.close()  # before it told the rest
    again = Study(*given)
    (adopted,) = again.adopt()
    again.rule_out(adopted, "too large", {"bytes": 0.5, "ms": 0.25})
    (trial,) = again.optuna.trials
    again.close()
    assert trial.state.name == "PRUNED"
    assert trial.constraints == {"bytes": 0.5, "ms": 0.25}


def optuna_trials(folder):
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage).get_trials()


def test_two_processes_share_one_study(task_file, tmp_path):
    folder, goal = tmp_path / "run", "bytes<=20%, score>=-20%"
    both = [started(task_file, folder, goal, trials=5) for _ in range(2)]
    assert [p.wait(300) for p in both] == [0, 0]
    tried = [t for t in optuna_trials(folder) if "taut: recipe" in t.user_attrs]
    assert len(tried) == 5
    assert {t.state.name for t in tried} == {"COMPLETE"}
    assert finished(folder) == 5
    assert len({t.user_attrs["taut: recipe"] for t in tried}) == 5


def test_a_line_that_was_half_written_is_cut_off(found, tmp_path):
    path = found[0].folder / "study.journal"
    before = path.read_bytes()
    path.write_bytes(before + b'{"op_code":4,"wor')
    again = search(
        trained_net(), digits_task(), str(found[0].goal), folder=found[0].folder, trials=8, **FEW
    )
    assert path.read_bytes()[: len(before)] == before
    assert len(again.candidates) >= 8
