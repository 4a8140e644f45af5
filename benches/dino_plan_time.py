"""One plan of LeWM and one of DINO-WM on this machine, with the work and the token counts that make the difference.

    python -m benches.dino_plan_time [--out ROWS.jsonl] [--candidates 9 27] [--threads 1] [--quick]

Preset `tiny`: whole plans of both, in turn. Preset `paper`: whole plans of LeWM; of DINO-WM, whose plan would take
hours on a CPU, two encodings and the scoring of a few candidates, from which a plan is extrapolated: candidates are
scored independently of each other, so that time is proportional to their number (both counts that are timed are in the
row). The networks are random, which times do not depend on. With one thread what counts is seconds of work, which
other programs change least, else time by the clock, on a machine that does nothing else. `--quick` only checks that it
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benches.cpu_plan import STATS, THREADS, Rows, frames, in_turn, plan_flop, precisions, weights_of
from torch.utils.flop_counter import FlopCounterMode

import lewm
from lewm import dino_wm
from lewm.config import PRESETS
from lewm.dino_wm import DinoConfig, DinoNetwork, DinoWM, random_vit
from lewm.model_file import write_atomically


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call: of work on one thread, by the clock on several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def dino(preset: str, **changes: Any) -> DinoWM:
    """A DINO-WM of that preset with random weights."""
    config = DinoConfig(action_dim=2, **{**dino_wm.PRESETS[preset].model, **changes})
    torch.manual_seed(0)
    weights = DinoNetwork(config).state_dict()
    weights.update({f"encoder.{name}": torch.from_numpy(value) for name, value in random_vit(config).items()})
    return DinoWM(config, weights, stats=STATS, meta={"encoder": {"source": "random", "seed": 0}}, device="cpu")


def counted(model: lewm.Model, planner: lewm.CEM) -> float:
    """Floating-point operations of one plan as torch executes it: two pictures, and every candidate of every iteration.

    Matrix products, convolutions and attention; two operations a multiply-add. A masked score is computed and counts.
    """
    c = model.config
    latents = np.zeros((1, 1, c.embed_dim), np.float32)
    with FlopCounterMode(display=False) as encoding:
        model.encode(np.zeros((c.image_size, c.image_size, 3), np.uint8))
    with FlopCounterMode(display=False) as scoring:
        model.costs(latents, latents[:, 0], np.zeros((1, 1, planner.horizon, c.block_dim), np.float32))
    return float(2 * encoding.get_total_flops() + planner.samples * planner.iterations * scoring.get_total_flops())


def scored(model: DinoWM, planner: lewm.CEM, candidates: int) -> Callable[[], float]:
    """What gives the seconds in which that many candidates are scored."""
    c, rng = model.config, np.random.default_rng(0)
    z, goal = (rng.standard_normal((1, c.embed_dim)).astype(np.float32) for _ in range(2))
    blocks = rng.standard_normal((1, candidates, planner.horizon, c.block_dim)).astype(np.float32)
    return lambda: timed(lambda: model.costs(z[:, None], goal, blocks))


def measure(rows: Rows, preset: str, planner: lewm.CEM, rounds: int, candidates: list[int], changes: dict) -> None:
    """All rows of one preset, the ratios last."""
    _, weights = weights_of(preset)
    lewms = {("torch", "float32"): "torch", **{("cpu", p): "cpu" for p in precisions()}}
    models: dict[Any, lewm.Model] = {
        ("LeWM", backend, precision): lewm.Model.from_state_dict(
            weights, preset=preset, stats=STATS, backend=backend, precision=precision, device=device
        )
        for (backend, precision), device in ((key, "cpu" if key[0] == "torch" else None) for key in lewms)
    }
    ours = dino(preset, **changes)
    models["DINO-WM", "torch", "float32"] = ours
    whole = preset == "tiny"

    cases: dict[Any, tuple[Callable[[], float], int]] = {}
    for key, model in models.items():
        obs, goal = (p[0] for p in frames(model.config.image_size, 1, False))
        if key[0] == "LeWM" or whole:
            lewm.plan(obs, goal, model=model, planner=replace(planner, iterations=1))  # allocates
            cases[key] = (
                lambda m=model, o=obs, g=goal: timed(lambda: lewm.plan(o, g, model=m, planner=planner)),
                rounds,
            )
        else:
            model.encode(obs)
            cases[(*key, "encode")] = (lambda m=model, o=obs: timed(lambda: m.encode(o)), rounds)
            for n in candidates:
                cases[(*key, n)] = (scored(ours, planner, n), rounds)
    times = in_turn(cases)

    # Work as torch executes it; the CPU engine keeps keys and values and does the least there is.
    executed = {key: counted(m, planner) for key, m in models.items() if key[1] == "torch"}
    seconds: dict[Any, float] = {}
    for key, model in models.items():
        system, backend, precision = key
        values: dict[str, Any] = {"extrapolated": False}
        if key in times:
            seconds[key] = statistics.median(times[key])
            values["all_seconds"] = [round(t, 5) for t in times[key]]
        else:
            encode = statistics.median(times[(*key, "encode")])
            each = {n: statistics.median(times[(*key, n)]) / n for n in candidates}
            seconds[key] = 2 * encode + planner.samples * planner.iterations * each[candidates[-1]]
            values = {
                "extrapolated": True,
                "from": f"{candidates[-1]} of {planner.samples * planner.iterations} candidates, and encoding",
                "encode_seconds": encode,
                "seconds_per_candidate": {str(n): float(f"{s:.4g}") for n, s in each.items()},
            }
        flop = executed[key] if backend == "torch" else plan_flop(model.config, planner)
        c: Any = model.config
        if isinstance(model, DinoWM):
            values |= {"encoder": model.label, "parameters": model.parameters()}
        else:
            values["parameters"] = sum(v.size for v in model._engine.weights().values())
        rows.add(
            f"plan {preset} {planner.samples}x{planner.iterations} {system}",
            system=system,
            preset=preset,
            backend=backend,
            precision=precision,
            tokens_per_frame=c.tokens if isinstance(c, DinoConfig) else 1,
            width=c.encoder_dim if isinstance(c, DinoConfig) else c.embed_dim,
            history=c.history,
            seconds_per_plan=seconds[key],
            **values,
            tflop_per_plan=flop / 1e12,
            gflop_per_s=flop / seconds[key] / 1e9,
            torch=torch.__version__,
        )
    theirs = seconds["DINO-WM", "torch", "float32"]
    work = executed["DINO-WM", "torch", "float32"]
    for key in seconds:
        if key[0] == "LeWM":
            flop = executed.get(key) or plan_flop(models[key].config, planner)
            rows.add(
                f"ratio {preset} {planner.samples}x{planner.iterations}",
                system="DINO-WM / LeWM",
                preset=preset,
                backend=f"torch / {key[1]}",
                precision=f"float32 / {key[2]}",
                times_lewm=theirs / seconds[key],
                extrapolated=not whole,
                times_flop=work / flop,
                # How much faster DINO-WM's larger products do the same work.
                times_gflop_per_s=(work / theirs) / (flop / seconds[key]),
                times_tokens=ours.config.tokens,
                torch=torch.__version__,
            )


def main(arguments: list[str] | None = None) -> None:
    """Measures both presets and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    parser.add_argument("--candidates", type=int, nargs="+", default=[9, 27], help="to time of DINO-WM, preset paper")
    parser.add_argument("--rounds", type=int, default=3, help="of preset paper; 5 times as many of tiny")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    options = parser.parse_args(arguments)
    threads = 1 if options.quick else options.threads
    os.environ["LEWM_NUM_THREADS"] = str(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = Rows()
    rows.common |= {"threads": threads, "clock": "work" if threads == 1 else "wall"}
    try:
        for preset in ("tiny", "paper"):
            planner, rounds = lewm.CEM(**PRESETS[preset].planner), options.rounds * (5 if preset == "tiny" else 1)
            candidates, changes = options.candidates, {}
            if options.quick:
                planner, rounds, candidates = lewm.CEM(samples=4, iterations=2, elites=2, horizon=2), 1, [1, 2]
                changes = {"encoder_depth": 1, "predictor_depth": 1, "encoder_size": 28}
            measure(rows, preset, planner, rounds, candidates, changes)
    finally:
        torch.set_num_threads(before)
    if options.out:
        write_atomically(options.out, "".join(json.dumps(row) + "\n" for row in rows.rows).encode())


if __name__ == "__main__":
    main()
