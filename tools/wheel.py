"""Builds the wheel, installs it where there is nothing but what it asks for, and uses it there.

    python tools/wheel.py

The environment is new; what the wheel requires, and what that requires in turn, is linked into it
from the one that runs this. So nothing is downloaded, and what pyproject.toml forgot is missed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **options: object) -> None:
    """Run a command; exit with its output where it fails."""
    done = subprocess.run(
        [*map(str, command)], check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    print(done.stdout, end="", flush=True)


def built(folder: Path) -> Path:
    """The wheel, which has kernels where there is a compiler."""
    run(sys.executable, "-m", "pip", "-qq", "wheel", "--no-deps", "--no-build-isolation", ROOT,
        "-w", folder)  # fmt: skip
    (wheel,) = folder.glob("taut-*.whl")
    if not has_kernels(wheel) and shutil.which(os.environ.get("CXX", "c++")):
        sys.exit(f"{wheel.name} has no kernels, though there is a compiler")
    return wheel


def has_kernels(wheel: Path) -> bool:
    """Whether the kernels were built."""
    with zipfile.ZipFile(wheel) as files:
        return any("native_ops" in name for name in files.namelist())


def needed(wheel: Path) -> set[str]:
    """The distributions that a wheel requires, however indirectly, without its extras."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = [n for n in files.namelist() if n.endswith(".dist-info/METADATA")]
        told = files.read(name).decode()
    lines = [line.partition(": ")[2] for line in told.splitlines() if line.startswith("Requires-D")]
    found: set[str] = set()
    waiting = [(line, "") for line in lines]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if f"{name}[{wanted}]" not in found:
                found.add(f"{name}[{wanted}]")
                waiting += [(text, wanted) for text in metadata.requires(name) or ()]
    return {name.partition("[")[0] for name in found}


def environment(folder: Path, wheel: Path) -> Path:
    """A new environment with the wheel and what it requires; its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "-qq", "install", "--no-deps", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in needed(wheel):
        files = metadata.distribution(name).files or []
        for top in {f.parts[0] for f in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return python


def digits(folder: Path) -> None:
    """The images that the smoke test trains on."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    np.savez(folder / "digits.npz", x=(x[order] / 16).astype("float32"), y=y[order])


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        wheel = built(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        python = environment(folder / "environment", wheel)
        digits(folder)
        plain = () if has_kernels(wheel) else ("--plain",)
        run(python, "-I", ROOT / "tools" / "smoke.py", folder, *plain, cwd=folder)


if __name__ == "__main__":
    main()
