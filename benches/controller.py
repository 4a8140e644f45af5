"""`lewm.Controller` on TwoRoom: how long a planning call takes, and what a smaller budget costs in success.

    python -m benches.controller [--model runs/demo/model.safetensors] [--pairs 400] [--calls 400] [--out ROWS.jsonl]

A planning call is one that encodes the newest frame and plans; the calls between, which only hand out the next action,
are not counted. Success is that of protocol `two-room-25-50` on pairs of `seed=3`, paired with float32, 100 x 10,
executing whole plans. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import time
from pathlib import Path

import numpy as np
from benches.common import cpu, precisions

import lewm
from lewm.envs.two_room import TwoRoomEnv, frame
from lewm.evaluation import PROTOCOLS

ROOT = Path(__file__).resolve().parent.parent

# samples, iterations; with float32, the first is what everything is compared with
BUDGETS = ((100, 10), (64, 8), (32, 5))


def planning_ms(model: lewm.Model, planner: lewm.CEM, calls: int) -> np.ndarray:
    """Milliseconds of `calls` planning calls of one controller after another, each in an environment of its own."""
    env = TwoRoomEnv(obs_type="pixels", size=model.config.image_size)
    times: list[float] = []
    seed = 0
    while len(times) < calls + 20:
        obs, info = env.reset(seed=seed)
        goal = frame(info["goal_state"], size=model.config.image_size)
        controller = lewm.Controller(model, goal, planner=planner, execute=1, seed=seed)
        seed += 1
        for step in range(10 * model.config.action_block):
            started = time.perf_counter()
            action = controller(obs)
            if step % model.config.action_block == 0:
                times.append(1e3 * (time.perf_counter() - started))
            obs, _, terminated, _, _ = env.step(action)
            if terminated:
                break
    return np.array(times[20 : calls + 20])  # the first ones warm up


def main(arguments: list[str] | None = None) -> None:
    """Prints a row for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "model.safetensors")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    options = parser.parse_args(arguments)
    protocol = dataclasses.replace(PROTOCOLS["two-room-25-50"], seed=3, pairs=options.pairs)
    rows, base = [], None
    for precision, (samples, iterations) in itertools.product(precisions(), BUDGETS):
        model = lewm.load(options.model, backend="cpu", precision=precision)
        planner = lewm.CEM(samples=samples, iterations=iterations, elites=max(2, samples // 10))
        times = planning_ms(model, planner, options.calls)
        success = np.array(lewm.evaluate(model, protocol, planner=planner).success, float)
        base = success if base is None else base
        difference = success - base
        rows.append(
            {
                "name": f"controller {samples}x{iterations}",
                "precision": model.precision,
                "calls": options.calls,
                **{f"p{q}_ms": round(float(np.percentile(times, q)), 2) for q in (50, 95, 99)},
                "pairs": options.pairs,
                "success": round(success.mean(), 4),
                "points": round(100 * difference.mean(), 2),
                "points_plus_minus": round(196 * difference.std(ddof=1) / len(difference) ** 0.5, 2),
                "date": datetime.date.today().isoformat(),
                "device": cpu(),
                "lewm": lewm.__version__,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
