"""From text to tensors, and what is refused on the way."""

import re
import sys
from pathlib import Path

import pytest
import torch

from taut.errors import DataError
from taut.texts import Alphabet, Words, package_folder, padded, read_text

# Files


def test_text_comes_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffnaïve\n".encode())
    assert read_text(tmp_path / "a.txt") == "naïve\n"


def test_other_encodings_are_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo na\xefve\n")
    with pytest.raises(DataError, match=r"must be UTF-8, got the byte 0xef in line 2; convert it"):
        read_text(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"one\ntwo na\xefve\n"


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt is empty; a text needs at least one character"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"b\.txt cannot be read: No such file"):
        read_text(tmp_path / "b.txt")


# Characters and words


def test_an_alphabet_goes_both_ways() -> None:
    alphabet = Alphabet.of("to be, or not\U0001f600")
    assert len(alphabet) == 9
    assert alphabet.decode(alphabet.encode("not to\U0001f600")) == "not to\U0001f600"
    assert alphabet.encode("e").tolist() == [alphabet.letters.index("e")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abXa", "alphabet of 2 characters has no 'X', the one at 2 of the text; replace it"),
        ("", "an empty text has no characters to encode"),
    ],
)
def test_an_alphabet_refuses(text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Alphabet.of("ab").encode(text)


@pytest.mark.parametrize("token", [-1, 2])
def test_an_alphabet_refuses_a_token(token: int) -> None:
    with pytest.raises(DataError, match=re.escape(f"a token must lie in [0, 2), got {token}")):
        Alphabet.of("ab").decode(torch.tensor([0, token]))


def test_words_are_numbered_by_how_often_they_come() -> None:
    words = Words.of(["It's bad, bad!", "bad, it's"], most=2)
    assert words.known == {"bad": 2, "it's": 3}
    assert len(words) == 4
    assert words.encode("It's not BAD").tolist() == [3, 1, 2]
    assert words.encode(" ").tolist() == [1]


# Several lengths


def test_padding_and_lengths() -> None:
    x, lengths = padded([torch.ones(3, 2), torch.ones(1, 2)])
    assert x.tolist() == [[[1, 1]] * 3, [[1, 1], [0, 0], [0, 0]]]
    assert lengths.tolist() == [3, 1]


def test_padding_refuses() -> None:
    with pytest.raises(DataError, match="takes at least one sequence, got none"):
        padded([])
    with pytest.raises(DataError, match="sequence 1 of 2 is empty; leave it out"):
        padded([torch.ones(2), torch.ones(0)])
    with pytest.raises(DataError, match=r"at most 4 steps, .* got 5 in sequence 0 of 1; cut it"):
        padded([torch.ones(5)], longest=4)


# A package that holds a network


def test_a_package_that_is_missing_is_named_with_its_command() -> None:
    with pytest.raises(DataError, match="no_such_encoder is not installed; get it by `pip x`"):
        package_folder("no_such_encoder", ["tokenizer.json"], "pip x")


def test_sequences_of_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"all else alike, got \[2, 4\] in sequence 1 beside \[3\]"):
        padded([torch.zeros(3), torch.zeros(2, 4)])
    with pytest.raises(DataError, match=r"all else alike, got \[\] in sequence 0 beside \[\]"):
        padded([torch.tensor(3)])


def test_an_empty_text_has_no_alphabet() -> None:
    with pytest.raises(DataError, match="an empty text has no alphabet; give at least one"):
        Alphabet.of("")


def test_a_missing_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some_encoder"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('must not run')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert package_folder("some_encoder", [], "pip x") == folder
    with pytest.raises(DataError, match=r"some_encoder lacks tokenizer\.json .* --force-reinstall"):
        package_folder("some_encoder", ["tokenizer.json"], "pip x")
