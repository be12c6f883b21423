"""`make demo`: a LeNet-5 in, a file 300 times smaller out, and the proof that it still works."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RECIPE = (
    "code_length() > training(precision='bfloat16') > "
    "recover(epochs=10, learning_rate=2e-3, temperature=2, bytes_weight=2e-5)"
)


def taut(*arguments):
    """Run Taut in a process of its own and return what it printed as JSON."""
    command = [sys.executable, "-m", "taut.cli", *map(str, arguments)]
    if "--json" not in arguments:
        return subprocess.run(command, check=True)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    task, folder = HERE / "task.py", Path("runs/demo")
    taut("compress", task, "--recipe", RECIPE, "--run-folder", folder, "--fresh")
    print("reading net.taut back in a fresh process")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    before, promised = record["original"], record["candidates"][0]["measurement"]
    again = taut("measure", task, folder / "net.taut", "--json")["net.taut"]
    if again["score"] != promised["score"]:
        sys.exit(f"the score was {promised['score']} and is {again['score']} after reloading")
    lost = 100 * (before["score"] - again["score"])
    ratio = before["size_bytes"] / (folder / "net.taut").stat().st_size
    print(f"the same score to the digit: {again['score']}")
    print(f"{ratio:.1f} times smaller, {lost:.2f} points of the score lost")
    print(f"report: {(folder / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
