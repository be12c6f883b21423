"""Taut's kernels as operations of OpenVINO: the library that it loads, built when first asked for.

    core = openvino.Core()
    core.add_extension(extension())

OpenVINO's wheel brings its headers and libraries, and Taut its kernels as a static library: a C++
compiler puts both together in a few seconds, and the result is kept for that version of OpenVINO.
It needs no Python: C++ programs load the same file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from taut.errors import ExportError
from taut.kernels import native

SOURCES = Path(__file__).parent / "csrc"
_MAIN = "openvino/extension.cpp"
_INSTALL = "install Taut with its kernels: `pip install --no-build-isolation --force-reinstall`"


def extension() -> Path:
    """The library for `core.add_extension`; built, if it must be, and kept.

    A library that was built with Taut for this OpenVINO comes first (TAUT_OPENVINO in
    CMakeLists.txt). $CXX names the compiler, else c++ and g++ are tried.

    Raises ExportError without OpenVINO, Taut's native kernels or a compiler, or where that fails.
    """
    wheel, version = _openvino()
    kernels = _kernels()
    built = kernels.with_name(f"taut_openvino-{version}.so")
    if built.is_file():
        return built
    kept = folder() / f"taut_openvino-{version}-{_digest(wheel, kernels)}.so"
    if not kept.is_file():
        _build(kept, wheel, kernels)
    return kept


def folder() -> Path:
    """Where built libraries are kept: `openvino` in $TAUT_CACHE, else in the user's caches."""
    if given := os.environ.get("TAUT_CACHE"):
        return Path(given) / "openvino"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "taut" / "openvino"


def command(to: Path, wheel: Path, kernels: Path, compiler: str) -> list[str]:
    """What compiles the library against the headers of the wheel, whose libraries it will find."""
    libs = wheel / "libs"
    return [
        compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden",
        "-DOV_THREAD=OV_THREAD_TBB_ADAPTIVE", f"-I{SOURCES}", "-isystem", str(wheel / "include"),
        str(SOURCES / _MAIN), str(kernels), *linked(wheel), f"-Wl,-rpath,{libs}", "-o", str(to),
    ]  # fmt: skip


def linked(wheel: Path) -> list[str]:
    """The libraries of the wheel that the extension, or a program that infers, is linked with."""
    found = [sorted((wheel / "libs").glob(f"lib{n}.so*")) for n in ("openvino", "tbb")]
    if not all(found):
        raise ExportError(
            f"the OpenVINO in {wheel} has no libraries to build against; install the one of PyPI: "
            "pip install openvino"
        )
    return [str(files[0]) for files in found]


def wheel() -> Path:
    """The folder of the installed OpenVINO, which holds `include` and `libs`."""
    return _openvino()[0]


def compiler() -> str:
    """The C++ compiler: $CXX, else c++ or g++."""
    given = os.environ.get("CXX")
    for name in [given] if given else ["c++", "g++"]:
        if found := shutil.which(name):
            return found
    raise ExportError(
        f"Taut's operations for OpenVINO are compiled when first used, and there is no C++20 "
        f"compiler{f' {given!r}' if given else ''}; install g++ 12 or newer, or name one in $CXX"
    )


def _openvino() -> tuple[Path, str]:
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        raise ExportError("OpenVINO is not installed; pip install 'taut[openvino]'")
    return Path(found.origin).parent, importlib.metadata.version("openvino")


def _kernels() -> Path:
    if native.LIBRARY is None:
        raise ExportError(f"Taut runs without its native kernels here; {_INSTALL}")
    found = Path(native.LIBRARY).with_name("libtaut_kernels.a")
    if not found.is_file():
        raise ExportError(
            f"{found} is missing, which OpenVINO's extension is built from; {_INSTALL}"
        )
    return found


def _digest(wheel: Path, kernels: Path) -> str:
    """Of all that the library is made from, so that a change of it builds anew."""
    digest = hashlib.sha256(str(wheel).encode())
    for file in [*sorted(SOURCES.glob("*.h")), *sorted((SOURCES / "openvino").iterdir()), kernels]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _build(to: Path, wheel: Path, kernels: Path) -> None:
    with_what = compiler()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent) as place:
            made = Path(place) / to.name
            run(command(made, wheel, kernels, with_what))
            os.replace(made, to)
    except OSError as error:
        raise ExportError(
            f"cannot write {to}: {error.strerror or error}; name another folder in $TAUT_CACHE"
        ) from error


def run(line: Sequence[str]) -> None:
    """Run a compiler; ExportError with the first of what it says where it fails."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:5])
        raise ExportError(
            f"{line[0]} cannot compile Taut's operations for OpenVINO ({sys.platform}): {said}"
        )
