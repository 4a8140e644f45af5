"""What `lewm.Controller(..., monitor=True)` costs, on TwoRoom.

    python -m benches.monitor [--model runs/demo/model.safetensors] [--rounds 40] [--precision auto]

A control step is a call that plans. With `execute=1` there is one at each block boundary, which encodes its picture
anyway: the monitor adds the prediction of one block. When whole plans are executed it also adds the pictures at the
boundaries in between. Each round runs the same 5 blocks with the monitor and without, in turn; what is reported is the
median over rounds of the time that a round took longer, for each block, as a share of the median control step without.
The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from benches.common import cpu

import lewm
from lewm.envs.two_room import render_states
from lewm.monitor import Calibration

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = 5


def seconds(controller: lewm.Controller, frames: np.ndarray) -> np.ndarray:
    """Of each call."""
    controller.reset()
    times = []
    for frame in frames:
        started = time.perf_counter()
        controller(frame)
        times.append(time.perf_counter() - started)
    return np.array(times)


def main(arguments: list[str] | None = None) -> None:
    """Prints a row for each way to execute plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "model.safetensors")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args(arguments)
    model = lewm.load(options.model, backend="cpu", precision=options.precision)
    block, size = model.config.action_block, model.config.image_size
    calls = 1 + BLOCKS * block  # the monitor's first word is at the end of the first block
    frames = render_states(np.linspace((40, 60), (90, 180), calls), size)
    goal = render_states(np.array([[180, 60]]), size)[0]
    normal = Calibration.of(np.linspace(0.01, 1, 1000))
    for execute in (1, BLOCKS):
        off, on = (lewm.Controller(model, goal, execute=execute, monitor=monitor) for monitor in (False, normal))
        times = np.array([[seconds(each, frames) for each in (off, on)] for _ in range(options.rounds + 3)])[3:]
        step = np.median(times[:, 0, 0 :: execute * block])
        extra = np.median(times[:, 1].sum(-1) - times[:, 0].sum(-1)) / BLOCKS
        rows = {
            "execute": execute,
            "control_step_ms": round(1e3 * step, 3),
            "monitor_ms_per_block": round(1e3 * extra, 3),
            "share_of_a_control_step": round(extra / step, 4),
            "share_of_all_calls": round(BLOCKS * extra / np.median(times[:, 0].sum(-1)), 4),
            "precision": model.precision,
            "rounds": options.rounds,
            "load": round(os.getloadavg()[0], 1),
            "device": cpu(),
            "lewm": lewm.__version__,
        }
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
