"""What someone does first with Taut: compress a network, look at the report, run the file.

    python tools/smoke.py FOLDER [--plain]

FOLDER holds digits.npz, 8 × 8 images with their labels; --plain: no kernels were built. It is run
by the Python of the environment that is tested, and needs nothing that Taut itself does not need.
"""

import json
import platform
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch

PLAIN = "--plain" in sys.argv
if not PLAIN:
    warnings.simplefilter("error", RuntimeWarning)  # Taut without its kernels warns
import taut  # noqa: E402
from taut.kernels import native  # noqa: E402

TASK = """
    import numpy as np
    import torch
    from torch import nn
    from taut.data import Batches

    data = np.load({digits!r})
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])

    def model():
        net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        net.load_state_dict(torch.load({weights!r}, weights_only=True))
        return net

    def train():
        return Batches(x[:1400], y[:1400], 64, shuffle=True)

    def test():
        return Batches(x[1400:], y[1400:], 397)
"""
RECIPE = (
    "prune_weights(sparsity=0.6) > recover(epochs=5, learning_rate=5e-3) > share_values(bits=4)"
)


def main(folder: Path) -> None:
    """Raise, or exit with the reason, where anything is not as it should be."""
    place = Path(taut.__file__).resolve()
    if not place.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"taut comes from {place}, not from this environment")
    if native.LOADED == PLAIN:
        sys.exit(f"kernels: {native.LIBRARY}")
    weights = folder / "weights.pt"
    text = TASK.format(digits=str(folder / "digits.npz"), weights=str(weights))
    (folder / "task.py").write_text(textwrap.dedent(text), encoding="utf-8")
    torch.save(trained(folder).state_dict(), weights)
    command = [str(Path(sys.executable).parent / "taut"), "compress", str(folder / "task.py")]
    command += ["--recipe", RECIPE, "--run-folder", str(folder / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"taut compress failed:\n{done.stdout}{done.stderr}")
    run = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    before, after = run["original"], run["candidates"][0]["measurement"]
    report = (folder / "run" / "report.html").read_text(encoding="utf-8")
    small = taut.load(folder / "run" / "net.taut", model=network())
    task = taut.load_task(folder / "task.py")
    score = task.evaluate(small)
    wrong = {
        "the report is no page": "</html>" not in report,
        "the file is not four times smaller": before["size_bytes"] < 4 * after["size_bytes"],
        "the file scores otherwise than it was said to": abs(score - after["score"]) > 0.01,
        "the score is lost": score < before["score"] - 0.05,
    }
    if any(wrong.values()):
        sys.exit(f"wrong: {', '.join(k for k, v in wrong.items() if v)}: {before} {after} {score}")
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}: taut compresses "
        f"{before['size_bytes']:,} bytes to {after['size_bytes']:,}, score "
        f"{before['score']:.3f} to {score:.3f}, {'without' if PLAIN else 'with'} native kernels"
    )


def network() -> torch.nn.Module:
    """The network of the task."""
    nn = torch.nn
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def trained(folder: Path) -> torch.nn.Module:
    """The same, knowing its digits."""
    data = np.load(folder / "digits.npz")
    x, y = (torch.from_numpy(data[k][:1400]) for k in ("x", "y"))
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
