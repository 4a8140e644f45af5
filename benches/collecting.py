"""Frames a second of `lewm.collect` beside stable-worldmodel's World: same task, size and number of steps, to disk.

    python -m benches.collecting --peer PYTHON [--size 224] [--rounds 3] [--out benches/results/NAME.jsonl]

Both act at random, in turn; the peer writes uncompressed HDF5, we our lossless store. Ours includes starting the
environments, the peer's does not; of the peer the best of two environment counts is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benches.common import cpu

import lewm

TASKS = {"PushT": ("lewm/PushT-v0", "swm/PushT-v1"), "TwoRoom": ("lewm/TwoRoom-v0", "swm/TwoRoom-v1")}
STEPS = 100


def ours(env_id: str, size: int, episodes: int) -> float:
    """Frames a second, making the environments included."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        data = lewm.collect(
            env_id, Path(folder) / "x.lewm", episodes=episodes, size=size, policy="random", max_steps=STEPS
        )
        return data.frame_count / (time.perf_counter() - started)


def theirs(python: str, env_id: str, size: int, episodes: int, count: int, form: str) -> dict[str, float]:
    """The peer's frames a second, without making the environments."""
    script = Path(__file__).with_name("peer_collect.py")
    arguments = [env_id, size, episodes, STEPS, count, form]
    done = subprocess.run([python, script, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Runs both in turn and prints a row for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a Python that has stable-worldmodel")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", default="hdf5", help="of the peer's files")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    options = parser.parse_args(arguments)
    for name, (own, other) in TASKS.items():
        mine, peer = [], []
        for _ in range(options.rounds):
            mine.append(ours(own, options.size, 192))
            peer += [theirs(options.peer, other, options.size, 16, count, options.format) for count in (4, 8)]
        best = max(row["frames_per_s"] for row in peer)
        row = {
            "name": f"collect {name} {options.size}",
            "frames_per_s": round(statistics.median(mine)),
            "spread": [round(min(mine)), round(max(mine))],
            "peer_frames_per_s": round(best),
            "ratio": round(statistics.median(mine) / best, 2),
            "peer": f"stable-worldmodel {peer[0]['version']}, {options.format}",
            "cpu": cpu(),
            "lewm": lewm.__version__,
        }
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
