"""Whole plans on this CPU: how fast, as a share of what the processor can do, and beside stable-worldmodel.

    python -m benches.cpu_plan [--peer PYTHON] [--tiny MODEL.safetensors] [--out ROWS.jsonl] [--quick]

Everything that is compared runs in turn within one run, on two threads. `--peer` is a Python that has
stable-worldmodel; without one the peer's rows are left out. `--tiny` is a trained model of that preset, by default the
one of `make demo`; without one its weights are made by rule. `--quick` shrinks everything to a check that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from benches.common import cpu, precisions

import lewm
from lewm._core import Planner, noise
from lewm.config import PRESETS, ModelConfig, configure
from lewm.envs.two_room import TwoRoomEnv
from lewm.model_file import tensor_shapes
from lewm.pixels import MEAN, STD

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "parity"))
import rule  # noqa: E402 (a script of the parity cases, not a package)

THREADS = 2
STATS = {"mean": [0.0, 0.0], "std": [0.5, 0.5], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
PEER = "stable-worldmodel"
MISSING = f"going on without {PEER}; to compare with it: python -m pip install stable-worldmodel transformers"


def plan_flop(config: ModelConfig, planner: lewm.CEM) -> float:
    """Floating-point operations of one plan with the least work that gives the official answer.

    Observation and goal are encoded once, an action's modulation is computed once, keys and values are kept while the
    window grows, the last layer computes queries, output and MLP for the newest token only. Matrix products and
    attention; two operations a multiply-add. 1.659e12 for preset paper and 300 x 30.
    """
    c, horizon = config, planner.horizon
    inner, d = c.predictor_heads * c.predictor_head_dim, c.predictor_dim
    windows = [min(step, c.history) for step in range(1, horizon + 1)]
    computed = [1 if step <= c.history else c.history for step in range(1, horizon + 1)]
    seen = [w if n == 1 else w * (w + 1) // 2 for w, n in zip(windows, computed, strict=True)]  # pairs of tokens
    layers, tokens = c.predictor_depth, sum(computed)
    ends = 2 * d * inner + 2 * d * c.predictor_mlp  # queries, output and MLP
    attention = 2 * inner * ((layers - 1) * sum(seen) + sum(windows))
    predictor = tokens * layers * 2 * d * inner + ((layers - 1) * tokens + horizon) * ends + attention
    action = c.block_dim * c.action_smoothed + c.action_smoothed * c.action_hidden + c.action_hidden * c.embed_dim
    each_step = layers * 6 * d * d + c.projector_hidden * 2 * c.embed_dim + action
    if c.embed_dim != d:
        predictor += 2 * tokens * c.embed_dim * d
        each_step += c.embed_dim * d
    patches, e = (c.image_size // c.patch_size) ** 2, c.encoder_dim
    layer = (patches + 1) * (4 * e * e + 2 * e * c.encoder_mlp) + 2 * (patches + 1) ** 2 * e
    encode = patches * 3 * c.patch_size**2 * e + c.encoder_depth * layer
    encode += c.projector_hidden * (e + c.embed_dim)
    return 2.0 * (planner.samples * planner.iterations * (predictor + horizon * each_step) + 2 * encode)


def weights_of(preset: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Weights made by the parity cases' rule, so that actions matter, for any architecture."""
    config, _ = configure(preset, 2, {})
    if preset == "paper":
        return config, rule.weights(1)
    made = {name: np.asarray(rule._tensor(1, name, shape)) for name, shape in tensor_shapes(config).items()}
    return config, {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in made.items()}


def frames(size: int, count: int, trained: bool) -> tuple[np.ndarray, np.ndarray]:
    """Observations and goals (count, S, S, 3) uint8: TwoRoom for a trained model, else coarse random pictures."""
    if not trained:
        coarse = np.random.default_rng(0).integers(0, 256, (2, count, 8, 8, 3), dtype=np.uint8)
        obs, goal = coarse.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
        return obs, goal
    env = TwoRoomEnv(size=size, obs_type="pixels")
    drawn = []
    for seed in range(count):
        obs, info = env.reset(seed=seed)
        drawn.append((obs, env.reset(options={"state": info["goal_state"]})[0]))
    return np.stack([obs for obs, _ in drawn]), np.stack([goal for _, goal in drawn])


def first_candidates(model: lewm.Model, planner: lewm.CEM, environments: int) -> np.ndarray:
    """What the first iteration of CEM scores, (E, S, H, A) float32."""
    width = model.config.block_dim
    drawn = noise(0, np.arange(environments), 0, 0, planner.samples, planner.horizon * width)
    low, high = model.bounds()
    blocks = drawn.reshape(environments, planner.samples, planner.horizon, width)
    return np.clip(planner.init_std * blocks, low, high).astype(np.float32)


class Rows:
    """The rows measured so far, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.common = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "device": cpu(),
            "threads": THREADS,
            "load_at_start": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "lewm": lewm.__version__,
        }

    def add(self, name: str, **values: Any) -> dict[str, Any]:
        values = {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in values.items()}
        self.rows.append({"name": name, **values, **self.common})
        print(json.dumps({"name": name, **values}), flush=True)
        return self.rows[-1]


class Peer:
    """A process of another Python with stable-worldmodel, asked in turn; see `benches/peer_cem.py`."""

    def __init__(
        self,
        python: str,
        model: lewm.Model,
        obs: np.ndarray,
        goal: np.ndarray,
        cases: np.ndarray,
        device: str = "cpu",
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        folder, config = Path(self.folder.name), model.config
        np.savez(folder / "model.npz", **model._engine.weights())
        seen = {name: _as_the_vit_takes(picture) for name, picture in (("obs", obs), ("goal", goal))}
        np.savez(folder / "case.npz", candidates=cases, **seen)
        numbers = {**asdict(config), "block_dim": config.block_dim}
        (folder / "case.json").write_text(json.dumps({"config": numbers, "threads": THREADS, "device": device}))
        environ = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        environ |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [python, str(ROOT / "benches" / "peer_cem.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environ,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> Any:
        """One answer.

        Raises:
            ModuleNotFoundError: That Python has no stable-worldmodel, or not all that it needs.
        """
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"the peer failed:\n{self.log.read()}")
        answer = json.loads(line)
        if "missing" in answer:
            raise ModuleNotFoundError(answer["missing"])
        return answer["answer"]

    def close(self) -> None:
        self.process.communicate()
        self.log.close()
        self.folder.cleanup()


def _as_the_vit_takes(picture: np.ndarray) -> np.ndarray:
    return ((picture / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1).astype(np.float32)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(cases: dict[Any, tuple[Callable[[], float], int]]) -> dict[Any, list[float]]:
    """What every case gives, one after the other, again and again: a machine that drifts drifts for all.

    Args:
        cases: For each a function that gives the seconds of one call (or a rate), and how often it is called.
    """
    times: dict[Any, list[float]] = {name: [] for name in cases}
    for turn in range(max(count for _, count in cases.values())):
        for name, (run, count) in cases.items():
            if turn < count:
                times[name].append(run())
    return times


def measure(
    rows: Rows,
    preset: str,
    models: dict[str, lewm.Model],
    planner: lewm.CEM,
    peer: Peer | None,
    rounds: tuple[int, int],
    batch: int,
    pictures: tuple[np.ndarray, np.ndarray],
) -> None:
    """Plans alone and `batch` in one call in every precision, the peer's, and the loop without a model.

    `rounds` are ours and the peer's. One call of ours is `lewm.plan` from two pictures; the peer's is
    `CEMSolver.solve`, its pictures already normalised.
    """
    obs, goal = pictures
    budget = f"{planner.samples}x{planner.iterations}"
    cases: dict[Any, tuple[Callable[[], float], int]] = {}
    for precision, model in models.items():

        def ours(model=model, environments=1):
            o, g = (obs[0], goal[0]) if environments == 1 else (obs[:environments], goal[:environments])
            return timed(lambda: lewm.plan(o, g, model=model, planner=planner))

        ours()  # its memory is allocated by the first call
        cases[precision, 1] = (ours, rounds[0])
        cases[precision, batch] = (lambda ours=ours: ours(environments=batch), rounds[0])
        if peer and precision != "int8":
            ask = {**_budget(planner), "bfloat16": precision == "bfloat16"}
            peer.ask("plan", **{**ask, "iterations": 1})
            cases[precision, PEER] = (lambda ask=ask: peer.ask("plan", **ask), rounds[1])

    width = models["float32"].config.block_dim
    core = Planner("cem", samples=planner.samples, iterations=planner.iterations, elites=planner.elites)
    free = {count: np.random.default_rng(0).random((1, count)) for count in (1, planner.samples)}
    low, high = models["float32"].bounds()
    start = np.zeros((1, planner.horizon, width))

    def loop():
        core.solve(lambda blocks: free[blocks.shape[1]], start, low=low, high=high)

    cases["loop"] = (lambda: timed(loop), rounds[0])

    for name, model in models.items():  # between the plans, for a clock that drifts
        cases["peak", name] = (model._engine.engine.peak, rounds[0])
    times = in_turn(cases)
    peaks = {name: max(times["peak", name]) for name in models}
    median = {name: statistics.median(values) for name, values in times.items()}
    flop = plan_flop(models["float32"].config, planner)
    for precision, model in models.items():
        theirs = {}
        for kind in ("float32", "bfloat16"):
            if (kind, PEER) in median:
                theirs[f"times_{PEER}_{kind}"] = median[kind, PEER] / median[precision, 1]
        for environments in (1, batch):
            each = [t / environments for t in times[precision, environments]]
            seconds = statistics.median(each)
            rows.add(
                f"plan {preset} {budget}",
                precision=precision,
                environments=environments,
                instructions=model._engine.engine.cpu,
                seconds_per_plan=seconds,
                all_seconds=[round(t, 5) for t in each],
                tflop_per_s=flop / seconds / 1e12,
                peak_tflop_per_s=peaks[precision] / 1e12,
                share_of_peak=flop / seconds / peaks[precision],
                loop_share_at_most=median["loop"] / median[precision, 1],
                **({"times_alone": median[precision, 1] / seconds} if environments > 1 else theirs),
            )
        if (precision, PEER) in median:
            rows.add(
                f"{PEER} {preset} {budget}",
                precision=precision if precision == "float32" else "autocast bfloat16",
                environments=1,
                seconds_per_plan=median[precision, PEER],
                all_seconds=[round(t, 3) for t in times[precision, PEER]],
                **peer.ask("versions"),
            )
    rows.add(f"loop without a model {budget}", seconds_per_plan=median["loop"], note="a Python call per iteration")


def agreement(
    rows: Rows,
    preset: str,
    models: dict[str, lewm.Model],
    planner: lewm.CEM,
    pictures: tuple[np.ndarray, np.ndarray],
    weights: str,
) -> None:
    """How alike the precisions rank first-iteration candidates, for every pair of pictures: mean and worst."""
    exact = models["float32"]
    z, goal = exact.encode(pictures[0])[:, None], exact.encode(pictures[1])
    candidates = first_candidates(exact, planner, len(goal))
    best = max(1, planner.samples // 10)
    ranks = {name: np.argsort(np.argsort(model.costs(z, goal, candidates))) for name, model in models.items()}
    for name, rank in ranks.items():
        if name == "float32":
            continue
        spearman = [np.corrcoef(a, b)[0, 1] for a, b in zip(ranks["float32"], rank, strict=True)]
        overlap = ((ranks["float32"] < best) & (rank < best)).sum(1) / best
        rows.add(
            f"agreement {preset}",
            precision=name,
            weights=weights,
            sets=len(goal),
            candidates=planner.samples,
            spearman=float(np.mean(spearman)),
            spearman_worst=float(np.min(spearman)),
            **{f"top_{best}": float(overlap.mean()), f"top_{best}_worst": float(overlap.min())},
        )


def same_model(rows: Rows, preset: str, model: lewm.Model, peer: Peer, case: Sequence[np.ndarray]) -> None:
    """Stops unless the peer gives the same candidates the same costs."""
    obs, goal, candidates = case
    ours = model.costs(model.encode(obs[None])[None], model.encode(goal[None]), candidates)[0]
    theirs = np.array(peer.ask("costs"))
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    spread = float(theirs.std() / theirs.mean())
    rows.add(f"same costs {preset}", relative_error=error, spread_of_costs=spread, **peer.ask("versions"))
    if error > 1e-4:
        raise SystemExit(f"the peer computes another model (relative error {error:.2g}): nothing is timed")


def _budget(planner: lewm.CEM) -> dict[str, int]:
    return {name: getattr(planner, name) for name in ("samples", "iterations", "elites", "horizon")}


def preset_rows(rows: Rows, preset: str, trained: Path | None, python: str | None, quick: bool) -> None:
    """All rows of one preset."""
    if trained:
        models = {p: lewm.load(trained, backend="cpu", precision=p) for p in precisions()}
    else:
        _, weights = weights_of(preset)
        models = {
            p: lewm.Model.from_state_dict(weights, preset=preset, stats=STATS, backend="cpu", precision=p)
            for p in precisions()
        }
    exact, kind = models["float32"], "trained" if trained else "rule"
    paper = lewm.CEM(samples=20, iterations=2, elites=2) if quick else lewm.CEM()
    planners = [paper] if preset == "paper" or quick else [lewm.CEM(**PRESETS[preset].planner), paper]
    batch, sets = (2, 2) if quick else (8, 10)
    pictures = frames(exact.config.image_size, max(batch, sets), trained is not None)
    agreement(rows, preset, models, paper, tuple(p[:sets] for p in pictures), kind)
    case = (pictures[0][0], pictures[1][0], first_candidates(exact, paper, 1))
    peer = Peer(python, exact, *case) if python else None
    try:
        if peer:
            try:
                same_model(rows, preset, exact, peer, case)
            except ModuleNotFoundError as error:
                peer.close()
                peer = None
                print(f"{python}: {error}; {MISSING}", file=sys.stderr)
        for planner in planners:
            rounds = (2, 1) if quick else (5, 5) if preset == "paper" else (15, 5)
            measure(rows, preset, models, planner, peer, rounds, batch, pictures)
    finally:
        if peer:
            peer.close()


def table(rows: Rows) -> str:
    """What was measured, as Markdown."""
    head = ["plan", "precision", "environments", "s per plan", "TFLOP/s", "peak", "share", "times the peer", "loop"]
    lines = [head, ["---"] * len(head)]
    for row in rows.rows:
        if "seconds_per_plan" not in row or "precision" not in row:
            continue
        ratios = [
            f"{row[f'times_{PEER}_{k}']:.1f} ({k})" for k in ("float32", "bfloat16") if f"times_{PEER}_{k}" in row
        ]
        ours = "tflop_per_s" in row
        lines.append(
            [
                row["name"],
                f"{row['precision']} {row.get('instructions', '')}".strip(),
                str(row["environments"]),
                f"{row['seconds_per_plan']:.4g}",
                f"{row['tflop_per_s']:.3f}" if ours else "",
                f"{row['peak_tflop_per_s']:.3f}" if ours else "",
                f"{row['share_of_peak']:.0%}" if ours else "",
                ", ".join(ratios),
                f"{row['loop_share_at_most']:.2%}" if ours else "",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs every measurement and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    parser.add_argument("--peer", help=f"a Python that has {PEER} and transformers; by default this one if it has")
    parser.add_argument("--tiny", type=Path, default=ROOT / "runs" / "demo" / "model.safetensors")
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    options = parser.parse_args(arguments)
    os.environ["LEWM_NUM_THREADS"] = str(THREADS)
    python = options.peer
    if python is None and importlib.util.find_spec("stable_worldmodel"):
        python = sys.executable
    if python is None:
        print(MISSING, file=sys.stderr)
    rows = Rows()
    for preset, trained in (("paper", None), ("tiny", options.tiny if options.tiny.exists() else None)):
        preset_rows(rows, preset, trained, python, options.quick)
    print(table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows.rows))


if __name__ == "__main__":
    main()
