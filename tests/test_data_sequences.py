"""The data sets of texts and series: out of pip's packages, an installed aeon or a mirror."""

import hashlib
import io
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch

from taut import data
from taut.errors import DataError

LINES = "1\t2.5\tA good film\u00e9.\r\n2\t-0.5\t It''s long, \r\n3\t0\tSo so".encode()
TRAIN = b"@problemName x\n@data\n1,2,3:4,5,6:2\n7:8:1\n"
TEST = b"@data\n9.5,1:0,-1e-1:9\n"
SERIES = dict(zip(data.JAPANESE_VOWELS_DIGESTS, (TRAIN, TEST), strict=True))
LINES_FILE = next(iter(data.MOVIE_LINES_DIGESTS))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; tiny data sets; no aeon, no network, a pip that finds nothing."""

    def no_network(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    folder = tmp_path / "cache"
    monkeypatch.setenv("TAUT_DATA", str(folder))
    monkeypatch.setattr(data, "MOVIE_LINES_DIGESTS", {LINES_FILE: digest(LINES)})
    series = {name: digest(content) for name, content in SERIES.items()}
    monkeypatch.setattr(data, "JAPANESE_VOWELS_DIGESTS", series)
    monkeypatch.setattr("taut.data.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("taut.data.urllib.request.urlopen", no_network)
    fake_pip(monkeypatch, {}, status=1, says="ERROR: no matching distribution")
    return folder


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes], status: int = 0, says: str = ""
) -> None:
    """A pip whose `download` leaves a package with this content, unless its status is an error."""

    def run(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        if status == 0:
            with zipfile.ZipFile(Path(cwd) / "some-1.0.zip", "w") as package:
                for name, bytes_ in content.items():
                    package.writestr(f"some/deep/{name}", bytes_)
        return subprocess.CompletedProcess(command, status, stdout="", stderr=says)

    monkeypatch.setattr("taut.data.subprocess.run", run)


def tar(content: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, bytes_ in content.items():
            member = tarfile.TarInfo(f"../folder/{name}")
            member.size = len(bytes_)
            archive.addfile(member, io.BytesIO(bytes_))
    return stream.getvalue()


def check_lines() -> None:
    lines = data.movie_lines()
    assert lines.sentences == ("A good film\u00e9.", "It''s long,", "So so")
    assert lines.ratings.tolist() == [2.5, -0.5, 0]


def check_series() -> None:
    series = data.japanese_vowels()
    assert [s.tolist() for s in series.train] == [[[1, 4], [2, 5], [3, 6]], [[7, 8]]]
    assert series.train_labels.tolist() == [1, 0]
    torch.testing.assert_close(series.test[0], torch.tensor([[9.5, 0], [1, -0.1]]))
    assert series.test_labels.tolist() == [8]


def test_lines_come_from_the_archive_in_the_package_and_stay(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, {"a.txt": b"", "data.tar.gz": tar({"b.txt": b"", LINES_FILE: LINES})})
    check_lines()
    fake_pip(monkeypatch, {}, status=1)
    check_lines()
    assert {p.name for p in (cache / "movie-lines").iterdir()} == {LINES_FILE}


def test_lines_come_from_the_mirror(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == data.MOVIE_LINES_MIRROR
        return io.BytesIO(tar({LINES_FILE: LINES}))

    monkeypatch.setattr("taut.data.urllib.request.urlopen", urlopen)
    check_lines()


def test_series_come_from_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, SERIES)
    check_series()


def test_series_come_from_an_installed_aeon(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    for name, content in SERIES.items():
        (folder / name).write_bytes(content)

    class Found:
        submodule_search_locations = (str(tmp_path / "aeon"),)

    monkeypatch.setattr("taut.data.importlib.util.find_spec", lambda name: Found())
    check_series()


@pytest.mark.parametrize("status", [0, 1])
def test_every_source_is_named_with_its_failure(
    cache: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    fake_pip(monkeypatch, {LINES_FILE: LINES + b"!"}, status, "noise\nERROR: it is gone")
    reason = "ERROR: it is gone" if status else "has a wrong SHA-256"
    with pytest.raises(DataError, match=rf"movie-lines: no source has(.|\n)*{reason}") as error:
        data.movie_lines()
    assert "no route to host" in str(error.value)
    assert str(cache) in str(error.value)


def test_real_movie_lines() -> None:
    try:
        lines = data.movie_lines()
    except DataError as error:
        pytest.skip(f"the lines are not to be had here: {error}")
    assert len(lines.sentences) == len(lines.ratings) == 10_605
    assert lines.sentences[2] == "Effective but too tepid biopic"
    assert lines.ratings[2] == pytest.approx(-0.6)
    assert int((lines.ratings > 0).sum()) == 5242


def test_real_japanese_vowels() -> None:
    try:
        series = data.japanese_vowels()
    except DataError as error:
        pytest.skip(f"the series are not to be had here: {error}")
    assert (len(series.train), len(series.test)) == (270, 370)
    assert {s.shape[1] for s in series.train + series.test} == {12}
    lengths = [len(s) for s in series.train + series.test]
    assert (min(lengths), max(lengths)) == (7, 29)
    assert series.train_labels.bincount().tolist() == [30] * 9
