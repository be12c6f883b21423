"""From text to tensors: files, characters, words, batches of several lengths.

>>> words = Words.of(["a good film", "a film"])
>>> padded([words.encode(s) for s in ("a good film", "a bad film")])
(tensor([[2, 4, 3],
        [2, 1, 3]]), tensor([3, 3]))
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from taut.data import characters
from taut.errors import DataError


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without its byte-order mark.

    Raises DataError for a file that is not there, is empty, or is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not content:
        raise DataError(f"{path} is empty; a text needs at least one character")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} must be UTF-8, got the byte 0x{content[error.start]:02x} in line {line}; "
            f"convert it, as by `iconv -f latin1 -t utf-8`"
        ) from error


@dataclass(frozen=True)
class Alphabet:
    """Characters as numbers: the place of each in `letters`.

    >>> Alphabet.of("abba").encode("bab")
    tensor([1, 0, 1])
    """

    letters: str

    @classmethod
    def of(cls, text: str) -> Alphabet:
        """The characters of a text, in the order of their codes. Raises DataError for none."""
        if not text:
            raise DataError("an empty text has no alphabet; give at least one character")
        return cls(characters(text)[1])

    def __len__(self) -> int:
        return len(self.letters)

    def encode(self, text: str) -> Tensor:
        """[n] int64. Raises DataError for an empty text and for a character that is not known."""
        if not text:
            raise DataError("an empty text has no characters to encode; give at least one")
        places = {letter: i for i, letter in enumerate(self.letters)}
        at = next((i for i, letter in enumerate(text) if letter not in places), None)
        if at is not None:
            raise DataError(
                f"the alphabet of {len(self)} characters has no {text[at]!r}, the one at {at} of "
                "the text; replace it, or train with an alphabet that has it"
            )
        return torch.tensor([places[letter] for letter in text])

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """The text of [n] tokens. Raises DataError for a token that is no place in the alphabet."""
        numbers = [int(t) for t in tokens]
        odd = next((t for t in numbers if not 0 <= t < len(self)), None)
        if odd is not None:
            raise DataError(f"a token must lie in [0, {len(self)}), got {odd}")
        return "".join(self.letters[t] for t in numbers)


@dataclass(frozen=True)
class Words:
    """Words as numbers from 2 on, in lower case; 0 is padding, 1 any word that is not known."""

    known: dict[str, int]

    @classmethod
    def of(cls, sentences: Iterable[str], most: int = 1_000_000) -> Words:
        """The `most` words that come most often, the first ones first where they come alike."""
        counted = Counter(word for s in sentences for word in _words(s))
        return cls({word: i for i, (word, _) in enumerate(counted.most_common(most), start=2)})

    def __len__(self) -> int:
        return len(self.known) + 2

    def encode(self, sentence: str) -> Tensor:
        """[n] int64; [1], a single unknown word, for a sentence without words."""
        return torch.tensor([self.known.get(word, 1) for word in _words(sentence)] or [1])


def _words(sentence: str) -> list[str]:
    return re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", sentence.lower())


def padded(sequences: Sequence[Tensor], longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Sequences of several lengths as one tensor, zeros behind each: [n, steps, ...], lengths [n].

    sequences: [length, ...] each, all else alike. longest: the most steps that the network was
    trained for. Raises DataError for no sequence, an empty one, one that is longer, and one whose
    steps are of another shape.
    """
    if not sequences:
        raise DataError("padded() takes at least one sequence, got none")
    for i, sequence in enumerate(sequences):
        if not sequence.dim() or sequence.shape[1:] != sequences[0].shape[1:]:
            raise DataError(
                f"sequences are [length, ...], all else alike, got {list(sequence.shape)} in "
                f"sequence {i} beside {list(sequences[0].shape)}"
            )
        if not len(sequence):
            raise DataError(f"sequence {i} of {len(sequences)} is empty; leave it out")
        if longest is not None and len(sequence) > longest:
            raise DataError(
                f"a sequence must have at most {longest} steps, what the network was trained for, "
                f"got {len(sequence)} in sequence {i} of {len(sequences)}; cut it"
            )
    lengths = torch.tensor([len(s) for s in sequences])
    return pad_sequence(list(sequences), batch_first=True), lengths


def package_folder(package: str, files: Sequence[str], install: str) -> Path:
    """The folder of an installed package, which is not imported, with these files in it.

    install: the command that brings it. Raises DataError where the package or a file is missing.
    """
    found = importlib.util.find_spec(package)
    roots = [Path(r) for r in (found.submodule_search_locations or () if found else ())]
    if not roots:
        raise DataError(f"the package {package} is not installed; get it by `{install}`")
    for file in files:
        if not (roots[0] / file).is_file():
            raise DataError(
                f"{package} lacks {file} in {roots[0]}; reinstall it by "
                f"`{install} --force-reinstall`"
            )
    return roots[0]
