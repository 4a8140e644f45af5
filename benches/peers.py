"""Ours and stable-worldmodel on the same weights and frames, on this machine, in one run.

    python -m benches.peers [--out benches/results/peers-NAME.json] [--only PART ...] [--quick]
    python -m benches.peers --tables       the table of the newest results into the pages that have a place for it

Needs the extra `peers` beside `train`; `make peers` makes such an environment. Parts: `plans`, our Solver and their
CEMSolver given the same pictures as their policy passes them; `agreement`, the costs and elites of both on the same
noise; `loading`, training batches of the same frames; `collection`, acting at random to disk. What is compared runs in
turn. Nothing is timed where both do not compute the same. `--quick` only checks that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from benches import collecting
from benches.common import cpu, precisions
from benches.cpu_plan import ROOT, STATS, THREADS, Peer, first_candidates, frames, in_turn, timed, weights_of

import lewm
import lewm.swm
from lewm.config import PRESETS
from lewm.model_file import write_atomically
from lewm.pixels import MEAN, STD

RESULTS = ROOT / "benches" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "stable-worldmodel.md"]
PLACE = re.compile(r"(<!-- peers: [^\n]*-->\n)(.*?)(<!-- /peers -->)", re.S)
PACKAGES = ("torch", "numpy", "stable-worldmodel", "transformers", "pylance", "h5py")
BATCH, FRAMES, STRIDE = 128, 4, 5


def info_of(obs: np.ndarray, goal: np.ndarray) -> dict[str, Any]:
    """What their policy passes for pictures (S, S, 3) uint8 of one environment."""
    import torch

    pictures = (np.moveaxis((picture / 255 - MEAN) / STD, -1, 0).astype(np.float32) for picture in (obs, goal))
    return {
        name: torch.from_numpy(values)[None, None] for name, values in zip(("pixels", "goal"), pictures, strict=True)
    }


def configured(model: lewm.Model, planner: lewm.CEM, **options: Any) -> lewm.swm.Solver:
    """Our solver for one environment."""
    budget = {name: getattr(planner, name) for name in ("samples", "iterations", "elites")}
    solver, c = lewm.swm.Solver(model, **budget, **options), model.config
    settings = SimpleNamespace(horizon=planner.horizon, action_block=c.action_block)
    solver.configure(action_space=gymnasium.spaces.Box(-1, 1, (1, c.action_dim)), n_envs=1, config=settings)
    return solver


def budget_of(planner: lewm.CEM) -> dict[str, int]:
    return {name: getattr(planner, name) for name in ("samples", "iterations", "elites", "horizon")}


def plans(quick: bool, wanted: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Parts `plans` and `agreement`, for which one process of theirs is asked."""
    found: dict[str, list[dict[str, Any]]] = {"plans": [], "agreement": []}
    for preset in ("tiny", "paper"):
        planner = lewm.CEM(**PRESETS[preset].planner)
        if quick:
            planner = lewm.CEM(samples=20, iterations=3, elites=4)
        _, weights = weights_of(preset)
        models = {
            p: lewm.Model.from_state_dict(weights, preset=preset, stats=STATS, backend="cpu", precision=p)
            for p in precisions()
        }
        exact = models["float32"]
        obs, goal = (pictures[0] for pictures in frames(exact.config.image_size, 1, False))
        candidates = first_candidates(exact, planner, 1)
        peer = Peer(sys.executable, exact, obs, goal, candidates)
        try:
            same = agreement(preset, weights, exact, planner, peer, obs, goal, candidates)
            if same["relative_error_of_costs"] > 1e-4:
                raise SystemExit(f"the peer computes another model ({same}): nothing is timed")
            found["agreement"].append(said(same))
            if "plans" in wanted:
                rounds = 1 if quick else 5 if preset == "paper" else 15
                found["plans"] += latencies(preset, models, planner, peer, info_of(obs, goal), rounds)
        finally:
            peer.close()
    return {part: rows for part, rows in found.items() if part in wanted}


def agreement(
    preset: str,
    weights: dict[str, np.ndarray],
    exact: lewm.Model,
    planner: lewm.CEM,
    peer: Peer,
    obs: np.ndarray,
    goal: np.ndarray,
    candidates: np.ndarray,
) -> dict[str, Any]:
    """How alike both are: costs of the same candidates; elites and plan of a whole search on the same noise.

    In float64 `tiny` alone: a search of the paper's model takes minutes there.
    """
    ours = exact.costs(exact.encode(obs[None])[None], exact.encode(goal[None]), candidates)[0]
    theirs = np.array(peer.ask("costs"))
    row: dict[str, Any] = {
        "preset": preset,
        "budget": f"{planner.samples}x{planner.iterations}",
        "relative_error_of_costs": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }
    searches = {"float32": exact}
    if preset == "tiny":
        kind = {"backend": "torch", "precision": "float64"}
        searches["float64"] = lewm.Model.from_state_dict(weights, preset=preset, stats=STATS, **kind)
    for precision, model in searches.items():
        want = peer.ask("elites", **budget_of(planner), seed=3, float64=precision == "float64")
        noted = noting_elites(model, planner.elites)
        found = configured(model, planner, reference=True, seed=3).solve(info_of(obs, goal))
        del model.objective  # the instance's; the class's is back
        same = [len(set(a) & set(b)) / planner.elites for a, b in zip(noted, want["elites"], strict=True)]
        row[precision] = {
            "iterations_with_the_same_elites": sum(share == 1 for share in same),
            "iterations_before_the_first_other": next((i for i, s in enumerate(same) if s < 1), len(same)),
            "least_share_of_elites": min(same),
            "actions_differ_by": float(np.abs(found["actions"][0].numpy() - want["actions"]).max()),
        }
    return row


def noting_elites(model: lewm.Model, count: int) -> list[list[int]]:
    """A list that gets the elites of every iteration of the next search on `model`."""
    noted: list[list[int]] = []

    def objective(z: np.ndarray, goal: np.ndarray, past: np.ndarray | None, cost: str) -> Callable[..., np.ndarray]:
        def costs(candidates: np.ndarray) -> np.ndarray:
            found = np.asarray(model.costs(z, goal, candidates, past, cost))
            noted.append(np.argsort(found[0], kind="stable")[:count].tolist())
            return found

        return costs

    model.objective = objective
    return noted


def latencies(
    preset: str, models: dict[str, lewm.Model], planner: lewm.CEM, peer: Peer, info: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    """Seconds of one solve from two pictures: ours in every precision, ours as reference, theirs, theirs autocast."""
    cases: dict[Any, tuple[Callable[[], float], int]] = {}
    for precision, model in models.items():
        solver = configured(model, planner)
        cases["ours", precision] = (lambda solver=solver: timed(lambda: solver.solve(info)), rounds)
    same = configured(models["float32"], planner, reference=True)
    cases["ours, reference", "float32"] = (lambda: timed(lambda: same.solve(info)), rounds)
    for precision, bfloat16 in (("float32", False), ("autocast bfloat16", True)):
        ask = {**budget_of(planner), "bfloat16": bfloat16}
        cases["theirs", precision] = (lambda ask=ask: peer.ask("plan", **ask), min(rounds, 5))
    for run, _ in cases.values():
        run()  # memory is allocated by the first call
    times = in_turn(cases)
    median = {case: statistics.median(values) for case, values in times.items()}
    return [
        said(
            {
                "preset": preset,
                "budget": f"{planner.samples}x{planner.iterations}",
                "solver": solver,
                "precision": precision,
                "seconds": seconds,
                "times_theirs_float32": median["theirs", "float32"] / seconds,
                "all_seconds": [round(t, 5) for t in times[solver, precision]],
            }
        )
        for (solver, precision), seconds in median.items()
    ]


def loading(quick: bool) -> list[dict[str, Any]]:
    """Shuffled windows a second from files in the page cache: our store, their HDF5 and their Lance (JPEG).

    Theirs go through torch's DataLoader, with the better of no and two workers.
    """
    import torch
    from stable_worldmodel.data import HDF5Dataset, LanceDataset
    from stable_worldmodel.data.format import get_format

    rows = []
    for size in (64, 224):
        with tempfile.TemporaryDirectory() as name:
            folder, episodes = Path(name), 6 if quick else 60
            data = lewm.collect("lewm/TwoRoom-v0", folder / "ours.lewm", episodes=episodes, size=size, seed=0)
            for form in ("hdf5", "lance"):
                with get_format(form).open_writer(folder / f"theirs.{form}") as writer:
                    writer.write_episodes(step_lists(data))
            knobs = {"frameskip": STRIDE, "num_steps": FRAMES, "keys_to_load": ["pixels", "action"]}
            readers = {
                "HDF5": HDF5Dataset(path=folder / "theirs.hdf5", **knobs),
                "Lance, JPEG": LanceDataset(path=folder / "theirs.lance", **knobs),
            }
            window = data.batch(np.array([[1, 2]]), FRAMES, STRIDE)
            theirs = readers["HDF5"][readers["HDF5"].clip_indices.index((1, 2))]
            if not np.array_equal(np.moveaxis(theirs["pixels"].numpy(), 1, -1), np.asarray(window.frames)[0]):
                raise SystemExit("the readers give other frames for the same window: nothing is timed")
            batch, batches = (8, 2) if quick else (BATCH, 12)
            streams: dict[Any, Iterator[Any]] = {("ours", 0): endless(data.loader(batch, FRAMES, STRIDE))}
            for reader, workers in itertools.product(readers, (0, THREADS)):
                start = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
                order = torch.utils.data.RandomSampler(readers[reader], num_samples=100 * batch * batches)
                streams[reader, workers] = iter(
                    torch.utils.data.DataLoader(readers[reader], batch, sampler=order, num_workers=workers, **start)
                )
            cases = {}
            for case, stream in streams.items():
                count = 4 * batches if case[0] == "ours" else batches
                cases[case] = (lambda s=stream, n=count, b=batch: b * n / seconds_of(s, n, quick), 3)
                cases[case][0]()  # files are read and workers are up
            rates = {case: statistics.median(each) for case, each in in_turn(cases).items()}
            streams.clear()
            mine = rates.pop(("ours", 0))
            for reader in readers:
                workers, best = max(((w, rate) for (r, w), rate in rates.items() if r == reader), key=lambda x: x[1])
                rows.append(
                    said(
                        {
                            "size": size,
                            "window": f"{FRAMES} frames, stride {STRIDE}",
                            "theirs": reader,
                            "their_workers": workers,
                            "ours_samples_per_s": mine,
                            "theirs_samples_per_s": best,
                            "ratio": mine / best,
                        }
                    )
                )
    return rows


def step_lists(data: lewm.Dataset) -> Iterator[dict[str, list[np.ndarray]]]:
    """Episodes as their writers take them: a list of steps for each column, the last action NaN."""
    for episode in data:
        last = np.full((1, data.action_dim), np.nan, np.float32)
        yield {"pixels": list(episode.frames), "action": list(np.concatenate([episode.actions, last]))}


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def seconds_of(stream: Iterator[Any], count: int, quick: bool) -> float:
    """Of `count` batches, beyond those that were made ready while others had their turn, and once others rest."""
    time.sleep(0 if quick else 2)
    for _ in range(2 * THREADS + 1):
        next(stream)
    return timed(lambda: [next(stream) for _ in range(count)])


def collection(quick: bool) -> list[dict[str, Any]]:
    """Frames a second of collecting with random actions; see `benches.collecting`."""
    rows = []
    for name, (own, other) in collecting.TASKS.items():
        sizes = (64,) if quick else (64, 224)
        for size in sizes:
            rounds, episodes, counts = (1, (4, 4), (4,)) if quick else (2, (192, 16), (4, 8))
            mine, peer = [], []
            for _ in range(rounds):
                mine.append(collecting.ours(own, size, episodes[0]))
                peer += [collecting.theirs(sys.executable, other, size, episodes[1], n, "hdf5") for n in counts]
            best = max(row["frames_per_s"] for row in peer)
            ours = statistics.median(mine)
            rows.append(
                said(
                    {
                        "task": name,
                        "size": size,
                        "ours_frames_per_s": ours,
                        "theirs_frames_per_s": best,
                        "ratio": ours / best,
                    }
                )
            )
    return rows


def said(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a row to five digits, printed."""
    row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(row), flush=True)
    return row


def table(results: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    rows = [["", "ours", "stable-worldmodel", "ours is faster by"], ["---"] * 4]
    for preset in dict.fromkeys(row["preset"] for row in results.get("plans", ())):
        at = {(r["solver"], r["precision"]): r for r in results["plans"] if r["preset"] == preset}
        theirs, cast = at["theirs", "float32"], at["theirs", "autocast bfloat16"]
        for (solver, precision), row in at.items():
            if solver == "theirs":
                continue
            other, kind = (theirs, "float32") if precision == "float32" else (cast, "autocast")
            mode = " in reference mode" if solver != "ours" else ""
            rows.append(
                [
                    f"a plan{mode}, `{preset}`, {row['budget']}, {precision}",
                    seconds(row["seconds"]),
                    f"{seconds(other['seconds'])} ({kind})",
                    f"{other['seconds'] / row['seconds']:.1f}x",
                ]
            )
    for row in results.get("loading", ()):
        what = f"training windows of {row['window']}, {row['size']} px, from {row['theirs']}"
        pair = (f"{row[f'{who}_samples_per_s']:,.0f} a second" for who in ("ours", "theirs"))
        rows.append([what, *pair, f"{row['ratio']:.1f}x"])
    for row in results.get("collection", ()):
        pair = (f"{row[f'{who}_frames_per_s']:,.0f} frames a second" for who in ("ours", "theirs"))
        rows.append([f"collecting {row['task']}, {row['size']} px", *pair, f"{row['ratio']:.1f}x"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for row in results.get("agreement", ()):
        apart = row["relative_error_of_costs"]
        costs = f"`{row['preset']}`: costs of the same candidates differ by {apart:.1g}, relatively"
        for precision in ("float32", "float64"):
            if precision in row:
                found, total = row[precision], row["budget"].partition("x")[2]
                same, least = found["iterations_with_the_same_elites"], found["least_share_of_elites"]
                others = "" if same == int(total) else f", the others at least {least:.0%} of them"
                costs += (
                    f"; on the same noise in {precision} {same} of {total} iterations have the same elites{others}, and"
                    f" actions differ by {found['actions_differ_by']:.1g}"
                )
        lines += ["", costs + "."]
    for part in results.get("runs_of_their_own", ()):  # put together by hand; what is compared still ran in turn
        lines += ["", f"The rows of {part} are of a run of their own (`--only {part}`), on the same machine."]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    place = (
        f"{results['device']}, {results['threads']} threads, {results['date']}; {versions}; `python -m benches.peers`."
    )
    return "\n".join([*lines, "", place]) + "\n"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def newest() -> Path | None:
    """The results that the tables are made of: the last by date, then by name."""
    files = sorted(RESULTS.glob("peers-*.json"), key=lambda path: (json.loads(path.read_text())["date"], path.name))
    return files[-1] if files else None


def with_table(page: str, text: str) -> str:
    """A page with the table in its place, if it has one."""
    return PLACE.sub(lambda found: found[1] + text + found[3], page)


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts and writes the results."""
    parts: dict[str, Callable[[bool], Any]] = {"loading": loading, "collection": collection}
    names = ["plans", "agreement", *parts]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the table of what was measured")
    options = parser.parse_args(arguments)
    if options.tables:
        path = newest()
        if path is None:
            raise SystemExit(f"there are no results: no {RESULTS}/peers-*.json")
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            page.write_text(with_table(text, table(json.loads(path.read_text()))), encoding="utf-8")
        return
    try:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed here: make peers, or pip install 'lewm-fast[train,peers]'"
        ) from None
    os.environ["LEWM_NUM_THREADS"] = str(THREADS)
    started = time.time()
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": cpu(),
        "threads": THREADS,
        "load_at_start": round(os.getloadavg()[0], 2),
        "quick": options.quick,
        "versions": {"lewm": lewm.__version__, "python": platform.python_version(), **versions},
    }

    def keep(found: dict[str, Any]) -> None:
        """After each part: a run that is stopped has measured something."""
        results.update(found, minutes=round((time.time() - started) / 60, 1))
        if options.out:
            write_atomically(options.out, f"{json.dumps(results, indent=1)}\n".encode())

    if {"plans", "agreement"} & set(options.only):
        keep(plans(options.quick, set(options.only)))
    for name, part in parts.items():
        if name in options.only:
            keep({name: part(options.quick)})
    print(table(results))


if __name__ == "__main__":
    main()
