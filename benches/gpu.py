"""One CUDA machine in a few minutes: does it agree with the official numbers, and how fast is it?

    python -m benches.gpu [--out benches/results/NAME.jsonl] [--peer PYTHON] [--quick]

Checks parity and the gates of each precision, then times SIGReg beside its reference, whole plans (the loop on the
device, the Rust loop with the same kernels, the `torch` back end, and with `--peer`, a Python that has it,
stable-worldmodel's CEMSolver with the same weights) and training steps. Writes one JSON row per measurement, with
device, driver and versions. It needs no network and ends within 9 minutes. `--quick` shrinks everything to a check that
the script runs (on a CPU too, where the kernels run in Triton's interpreter if TRITON_INTERPRET is 1).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lewm
from lewm.config import configure
from lewm.kernels import code
from lewm.losses import Directions, sigreg, sigreg_directions
from lewm.network import LeWM
from lewm.planner import core_of

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "parity"), str(ROOT / "benches")]
import rule  # noqa: E402
from bench_sigreg import official  # noqa: E402
from cpu_plan import Peer  # noqa: E402

PRECISIONS = ("float32", "tf32", "bfloat16")
QUICK = lewm.CEM(samples=8, iterations=2, elites=2, horizon=2)
SMALL = {"predictor_dim": 48, "embed_dim": 48, "predictor_mlp": 96, "projector_hidden": 64, "predictor_depth": 1}
STATS = {"mean": [0.0, 0.0], "std": [0.5, 0.5], "low": [-1.0, -1.0], "high": [1.0, 1.0]}


class Rows:
    """The rows measured so far, printed as they come."""

    def __init__(self, device: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.device = device
        self.common = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "driver": _driver() if device == "cuda" else None,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "lewm": lewm.__version__,
        }

    def add(self, name: str, **values: Any) -> None:
        self.rows.append({"name": name, **values, **self.common})
        print(json.dumps({"name": name, **values}), flush=True)

    def timed(self, run: Callable[[], Any], rounds: int) -> dict[str, float]:
        """p50 and p95 in milliseconds of wall time, the device idle before and after."""
        run()
        run()
        times = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return {"p50_ms": round(statistics.median(times), 3), "p95_ms": round(float(np.percentile(times, 95)), 3)}

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def peak(self, row: dict[str, Any]) -> Any:
        """Adds the peak of device memory above what was held before, in MB."""
        if self.device == "cuda":
            self.wait()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device == "cuda":
            self.wait()
            row["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def model_of(preset: str, backend: str, precision: str, device: str, quick: bool = False) -> lewm.Model:
    """The rule-made weights at preset `paper`, random ones else."""
    if preset == "paper":
        weights = rule.weights(1)
        return lewm.Model.from_state_dict(weights, stats=STATS, backend=backend, precision=precision, device=device)
    config, _ = configure(preset, 2, SMALL if quick else {})
    torch.manual_seed(0)
    network = LeWM(config)
    for parameter in network.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # else no action would have an effect
    state = network.state_dict()
    return lewm.Model(config, state, stats=STATS, backend=backend, precision=precision, device=device)


def compile_kernels(rows: Rows) -> None:
    """Compiles what will be launched on all processors at once; one after the other it takes minutes."""
    started = time.perf_counter()
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    jobs = [(module, target, "", i) for module in code.modules() for i in range(len(code.forms(module, target)))]
    with code.compilers(os.cpu_count() or 1) as pool:
        list(pool.map(code.compiled, *zip(*jobs, strict=True)))
    rows.add("compile kernels", forms=len(jobs), seconds=round(time.perf_counter() - started, 1))


def parity(rows: Rows) -> None:
    """Encoder, predictor and rollout of both back ends against the committed case."""
    x, want = rule.inputs(1), np.load(ROOT / "tests" / "parity" / "expected_seed1.npz")
    for backend, precision in (("torch", "float32"), ("torch", "bfloat16"), ("cuda", "float32"), ("cuda", "bfloat16")):
        model = model_of("paper", backend, precision, rows.device)
        z = model.encode(x["obs"])
        rollout = model.rollout(z, x["candidates"])
        costs = model.costs(z, model.encode(x["goal"])[:, 0], x["candidates"])
        errors = {
            name: float(np.linalg.norm(got - want[name]) / np.linalg.norm(want[name]))
            for name, got in (("eval_emb", model.encode(x["pixels"])), ("rollout", rollout), ("costs", costs))
        }
        rank = np.argsort(np.argsort(costs[0])), np.argsort(np.argsort(want["costs"][0]))
        errors["spearman"] = float(np.corrcoef(*rank)[0, 1])
        rows.add(f"parity {backend} {precision}", **{k: float(f"{v:.6g}") for k, v in errors.items()})
        if precision == "float32" and max(errors["eval_emb"] / 1e-5, errors["rollout"] / 1e-4) > 1:
            raise SystemExit(f"parity fails on this device, nothing is timed: {errors}")


def gates(rows: Rows, quick: bool) -> None:
    """What may be offered: float32 keeps the reference's elites, the others rank first candidates as it does."""
    preset, planner = ("tiny", QUICK) if quick else ("paper", lewm.CEM())
    exact = model_of(preset, "torch", "float32", rows.device, quick)
    draw = np.random.default_rng(1)
    width, sets = exact.config.embed_dim, 1 if quick else 10
    z, goal = (draw.standard_normal((sets, *shape), np.float32) for shape in ((1, width), (width,)))
    samples, best = planner.samples, planner.elites

    cuda = model_of(preset, "cuda", "float32", rows.device, quick)
    moved = close = iterations = 0

    def reference(candidates: np.ndarray) -> np.ndarray:
        nonlocal moved, close, iterations
        want, got = exact.costs(z[:1], goal[:1], candidates)[0], cuda.costs(z[:1], goal[:1], candidates)[0]
        if len(want) < best:
            return want[None]  # the final mean
        cut = np.sort(want)[best - 1]
        other = np.setxor1d(np.argsort(want, kind="stable")[:best], np.argsort(got, kind="stable")[:best])
        ties = np.abs(want[other] - cut) <= 1e-5 * abs(cut)
        close, moved, iterations = close + int(ties.sum()), moved + int((~ties).sum()), iterations + 1
        return want[None]

    shape = (1, planner.horizon, exact.config.block_dim)
    bounds = {"low": -np.ones(shape[2]), "high": np.ones(shape[2])}
    core_of(planner, np.dtype(np.float32)).solve(reference, np.zeros(shape), **bounds)
    rows.add("elites float32", moved=moved, ties=close, iterations=iterations, samples=samples)

    candidates = lewm._core.noise(0, np.arange(sets), 0, 0, samples, planner.horizon * shape[2])
    candidates = candidates.reshape(sets, samples, *shape[1:])
    ranks = np.argsort(np.argsort(exact.costs(z, goal, candidates)))
    for precision in PRECISIONS:
        model = model_of(preset, "cuda", precision, rows.device, quick)
        found = np.argsort(np.argsort(model.costs(z, goal, candidates)))
        spearman = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(ranks, found, strict=True)])
        overlap = ((ranks < best) & (found < best)).sum(1).mean() / best
        rows.add(f"agreement {preset}", precision=precision, sets=sets, spearman=float(f"{spearman:.6g}"),
                 overlap=float(f"{overlap:.4g}"))  # fmt: skip


def gemm_floor(rows: Rows) -> None:
    """The four dependent matrix products of one predictor layer with library kernels, eagerly and in a CUDA graph.

    A paper-size plan is 900 such layers on 300 or 900 rows: no planner made of library kernels is faster than this.
    """
    dim, inner, hidden = 192, 1024, 2048
    for precision, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        shapes = ((dim, 3 * inner), (inner, dim), (dim, hidden), (hidden, dim))
        qkv, out, up, down = (0.02 * torch.randn(*shape, device="cuda", dtype=dtype) for shape in shapes)
        for m in (300, 900, 15000, 45000):
            x = torch.randn(m, dim, device="cuda", dtype=dtype)

            def layers(count, y=x, qkv=qkv, out=out, up=up, down=down):
                for _ in range(count):
                    y = torch.nn.functional.gelu((y @ qkv)[:, :inner] @ out @ up) @ down
                return y

            eager = rows.timed(lambda run=layers: run(10), 20)["p50_ms"] / 10
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers(10)
            replay = rows.timed(graph.replay, 50)["p50_ms"] / 10
            rows.add(
                "gemm floor",
                precision=precision,
                rows=m,
                eager_us_per_layer=round(1e3 * eager, 1),
                graph_us_per_layer=round(1e3 * replay, 1),
                tflop_per_s=round(2e-9 * m * sum(a * b for a, b in shapes) / replay, 1),
            )
    torch.backends.cuda.matmul.allow_tf32 = False


def regulariser(rows: Rows, quick: bool) -> None:
    """SIGReg forward and backward, fused against the official formula in eager PyTorch."""
    steps, batch, dim, count = (2, 8, 16, 32) if quick else (4, 128, 192, 1024)
    torch.manual_seed(0)
    z = torch.randn(steps, batch, dim, device=rows.device, requires_grad=True)
    directions = sigreg_directions(dim, count, seed=0, step=0, device=rows.device)

    def run(statistic: Callable[..., Any], along: Any = directions, values: Any = z) -> Any:
        values.grad = None
        statistic(values, along).backward()
        return values.grad

    exact = z.detach().double().requires_grad_()
    want = run(_official_on_device, directions.double(), exact)
    cases = (
        ("fused", sigreg, directions),
        ("fused, directions from a key", sigreg, Directions(count, seed=0, step=0)),
        ("official eager", _official_on_device, directions),
    )
    for name, *case in cases:
        row: dict[str, Any] = {"shape": f"T{steps} B{batch} D{dim} P{count} K17"}
        row["gradient_error"] = float(f"{((run(*case) - want).norm() / want.norm()).item():.3g}")
        z.grad = None
        with rows.peak(row):
            run(*case)
        times = rows.timed(lambda case=case: run(*case), 5 if quick else 50)
        rows.add(f"sigreg forward+backward, {name}", **row, **times)


def _official_on_device(z: Any, directions: Any) -> Any:
    with torch.device(z.device):
        return official(z, directions.to(z.dtype)) if z.dtype == torch.float32 else _official_double(z, directions)


def _official_double(z: Any, directions: Any) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return official(z, directions)
    finally:
        torch.set_default_dtype(before)


def plans(rows: Rows, quick: bool, python: str | None) -> None:
    """Whole plans, encode included and the goal given as latents, in turn within one process."""
    budgets = (("tiny", QUICK),) if quick else (("paper", lewm.CEM()), ("tiny", lewm.CEM(100, 10, 10)))
    for preset, planner in budgets:
        first = model_of(preset, "torch", "float32", rows.device, quick)
        size = first.config.image_size
        frames = np.random.default_rng(0).integers(0, 256, (50, size, size, 3), np.uint8)
        goals = first.encode(frames[::-1].copy())
        reference = {}
        for environments in (1,) if quick else (1, 50):
            obs = frames[:environments] if environments > 1 else frames[0]
            goal = goals[:environments] if environments > 1 else goals[0]
            cases = [("torch", "float32", ""), ("torch", "bfloat16", "")]
            if kernels_run(rows.device):
                cases += [("cuda", p, "device") for p in (PRECISIONS if environments == 1 else ("bfloat16",))]
                cases += [("cuda", "bfloat16", "host")]
            for backend, precision, loop in cases:
                model = model_of(preset, backend, precision, rows.device, quick)
                if loop:
                    model._engine.loop = loop
                rounds = 2 if quick else (100 if loop else 10) // (1 if environments == 1 else 5)
                times = rows.timed(
                    lambda m=model, p=planner, o=obs, g=goal: lewm.plan(o, g, model=m, planner=p), rounds
                )
                per_plan = times["p50_ms"] / environments
                reference.setdefault(environments, per_plan)
                rows.add(
                    f"plan {preset} {planner.samples}x{planner.iterations}",
                    backend=backend,
                    precision=precision,
                    **({"loop": loop} if loop else {}),
                    environments=environments,
                    per_plan_ms=round(per_plan, 3),
                    times_torch=round(reference[environments] / per_plan, 2),
                    **times,
                )
        if python and preset == "paper":
            peer(rows, python, first, frames, planner)


def peer(rows: Rows, python: str, model: lewm.Model, frames: np.ndarray, planner: lewm.CEM) -> None:
    """stable-worldmodel's CEMSolver on the same device with the same weights: as it is, in bfloat16, and compiled."""
    candidates = lewm._core.noise(0, [0], 0, 0, 8, planner.horizon * model.config.block_dim)
    candidates = candidates.reshape(1, 8, planner.horizon, -1)
    other = Peer(python, model, frames[0], frames[1], candidates, device=rows.device)
    budget = {name: getattr(planner, name) for name in ("samples", "iterations", "elites", "horizon")}
    for bfloat16, compiled in ((False, False), (True, False), (True, True)):
        seconds = [other.ask("plan", **budget, bfloat16=bfloat16, compiled=compiled) for _ in range(7)][2:]
        rows.add(
            f"plan paper {planner.samples}x{planner.iterations}",
            backend="stable-worldmodel",
            precision="bfloat16" if bfloat16 else "float32",
            compiled=compiled,
            environments=1,
            p50_ms=round(1e3 * statistics.median(seconds), 3),
            p95_ms=round(1e3 * max(seconds), 3),
            **other.ask("versions"),
        )
    other.close()


def kernels_run(device: str) -> bool:
    """Whether the kernels can run: on a GPU, or interpreted."""
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def steps(rows: Rows, quick: bool) -> None:
    """The trainer's own step with its own loader, as `lewm train --profile` times it."""
    for preset in ("tiny",) if quick else ("paper", "tiny"):
        size = configure(preset, 2, {})[0].image_size
        with tempfile.TemporaryDirectory() as folder:
            data = lewm.collect("lewm/TwoRoom-v0", Path(folder) / "rooms.lewm", episodes=40, size=size)
            for compiled in (False, True) if preset == "paper" else (False,):  # compiling takes minutes
                found = lewm.train(data, preset=preset, device=rows.device, compile=compiled, profile=True).to_dict()
                name = f"training step {found.pop('preset')} {found.pop('precision')}"
                rows.add(name, **{k: v for k, v in found.items() if k != "device"})


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(module: str) -> str | None:
    with contextlib.suppress(ImportError):
        return __import__(module).__version__
    return None


def main(arguments: list[str] | None = None) -> None:
    """Runs every measurement and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    parser.add_argument("--peer", help="a Python that has stable-worldmodel and transformers")
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        parser.error("no CUDA device; --quick runs a small check on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = Rows(device)
    if not options.quick:
        compile_kernels(rows)
        parity(rows)
        gemm_floor(rows)
    if kernels_run(device):
        gates(rows, options.quick)
    regulariser(rows, options.quick)
    plans(rows, options.quick, options.peer)
    steps(rows, options.quick)
    if options.out:
        text = io.StringIO()
        for row in rows.rows:
            text.write(json.dumps(row) + "\n")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text.getvalue())


if __name__ == "__main__":
    main()
