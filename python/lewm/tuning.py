"""Lambda, the weight of SIGReg and the one hyper-parameter of the loss: a bisection in its logarithm.

The paper speaks of a "simple bisection search" in O(log n) and says no more (figure 16 is its ablation). Here
each step is a short run, which is judged by two tests that need no environment and no labels:

    too low     the latents have not spread out: SIGReg per sample is above `SIGREG_MOST` (0.402 is a single point, a
                Gaussian gives about 1 / batch), their effective rank below 1.2, or the trainer warned of a collapse,
                which ends the run at once
    too high    the predictor does not follow them: the R2 of its next latent, on held-out episodes, is below `R2_LEAST`

SIGReg pulls the latents towards a Gaussian of full rank, whatever is in the picture. With more weight they spread out
more, and into directions that the actions say nothing about: both numbers fall as lambda rises. Between the two bounds
lies the plateau.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lewm import diagnostics
from lewm.checks import integer
from lewm.config import configure
from lewm.data import Dataset
from lewm.evaluation import PROTOCOLS, evaluate
from lewm.latents import held_out, tracks
from lewm.model import Model, load
from lewm.model_file import brief, write_atomically
from lewm.records import read_record, typed

__all__ = ["Criterion", "LambdaRun", "Tuning", "sweep_lambda", "tune_lambda"]

FILE, RUN_FILE, PICTURE = "tuning.json", "run.json", "tuning.png"
VERDICTS = ("too low", "inside", "too high")
SIGREG_MOST, R2_LEAST = diagnostics.COLLAPSED_SIGREG_PER_SAMPLE / 3, 0.9
_RANK_LEAST = 1.2  # below it the trainer warns of a collapse
_TRANSITIONS = 4000  # held-out steps that a prediction is judged by, at most
_FINEST = 1.5  # factor below which a gap is not divided further


@dataclass(frozen=True)
class Criterion:
    """What makes a run too low or too high.

    Attributes:
        sigreg: Largest SIGReg per sample, above 0; 0.402 is a latent collapsed to a point.
        r2: Least R2 of the predicted latents, below 1.
    """

    sigreg: float = SIGREG_MOST
    r2: float = R2_LEAST

    def __post_init__(self) -> None:
        for name, holds, wish in (
            ("sigreg", lambda x: 0 < x < math.inf, "positive and finite"),
            ("r2", lambda x: -math.inf < x < 1, "finite and below 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
                raise ValueError(f"{name} must be {wish}, got {value!r}")

    def judge(self, numbers: dict[str, float], collapsed_at: int | None = None) -> tuple[str, str]:
        """Verdict and reason. A run that is both is too low: what has not spread out is easy or idle to predict."""
        sigreg, r2 = numbers["sigreg_per_sample"], numbers.get("prediction_r2", -math.inf)
        if collapsed_at is not None:
            return "too low", f"collapsing at step {collapsed_at}, SIGReg per sample {sigreg:.3f}"
        if sigreg > self.sigreg:
            return "too low", f"SIGReg per sample {sigreg:.3f}, above {self.sigreg:.3g}"
        if (rank := numbers.get("effective_rank", math.inf)) < _RANK_LEAST:
            return "too low", f"effective rank {rank:.2f}, below {_RANK_LEAST}"
        if r2 < self.r2:
            return "too high", f"R2 of the prediction {r2:.3f}, below {self.r2:.3g}"
        return "inside", f"SIGReg per sample {sigreg:.3f}, R2 of the prediction {r2:.3f}"


@dataclass(frozen=True)
class LambdaRun:
    """One short run.

    Attributes:
        value: Its lambda.
        verdict: "too low", "inside" or "too high".
        reason: Why, in words.
        numbers: `sigreg_per_sample`, `embedding_std`, `effective_rank` as the trainer logged them last; of a run that
            was not ended by a collapse also `prediction_r2` and, which the verdict does not look at, `skill`
            (`prediction_scores`), `validation_prediction`, and with states `probe_r2`.
        steps: Optimiser steps made.
        seconds: Of training.
        folder: The run folder, in that of the search.
        success: `rate`, `low`, `high` (its 95 % interval), `floor` (random actions) and `pairs`, if it was measured.
    """

    value: float
    verdict: str
    reason: str
    numbers: dict[str, float]
    steps: int
    seconds: float
    folder: str
    success: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS or not 0 < self.value < math.inf:
            raise ValueError(f"a run must have a positive value and a verdict, got {self.value!r}, {self.verdict!r}")
        if "sigreg_per_sample" not in self.numbers:
            raise ValueError("numbers must have sigreg_per_sample")


@dataclass(frozen=True)
class Tuning:
    """What a search or a sweep found; `to_dict` is its `tuning.json`, `load` reads one.

    Attributes:
        settings: All that makes the runs what they are: data fingerprint, preset, seed, steps, bounds, criterion, ...
        runs: In the order in which they were made.
    """

    settings: dict[str, Any]
    runs: list[LambdaRun]

    @property
    def plateau(self) -> tuple[float, float] | None:
        """Lowest and highest lambda that were found inside without another verdict between them; None if none was.

        Of several such stretches the widest, then the first.
        """
        stretches: list[list[float]] = [[]]
        for run in sorted(self.runs, key=lambda run: run.value):
            if run.verdict == "inside":
                stretches[-1].append(run.value)
            else:
                stretches.append([])
        best = max(stretches, key=lambda found: math.log(found[-1] / found[0]) if found else -1.0)
        return (best[0], best[-1]) if best else None

    @property
    def bracket(self) -> tuple[float, float]:
        """What the plateau, or where it would be, is between: values that were refused, or the bounds, never tried."""
        low, high = self.settings["low"], self.settings["high"]
        if inside := self.plateau:
            below = [run.value for run in self.runs if run.value < inside[0]]
            above = [run.value for run in self.runs if run.value > inside[1]]
        else:
            below = [run.value for run in self.runs if run.verdict == "too low"]
            above = [run.value for run in self.runs if run.verdict == "too high"]
        return max(below, default=low), min(above, default=high)

    @property
    def value(self) -> float | None:
        """The lambda to take: the run inside nearest to the geometric middle of the plateau; None without one."""
        if (inside := self.plateau) is None:
            return None
        middle = math.sqrt(inside[0] * inside[1])
        tried = (run.value for run in self.runs if inside[0] <= run.value <= inside[1])
        return min(tried, key=lambda value: round(abs(math.log(value / middle)), 9))

    def next(self, refine: bool = True) -> float | None:
        """The lambda that a search would try now; None if it is over.

        Until a run is inside, the geometric middle of the bracket; then that of the wider of the two gaps, below and
        above the plateau, as long as it is wider than a factor of 1.5.
        """
        low, high = self.bracket
        inside = self.plateau
        if inside and not refine:
            return None
        gaps = [(low, inside[0]), (inside[1], high)] if inside else [(low, high)]
        low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
        return math.sqrt(low * high) if high / low > _FINEST else None

    def judged(self, criterion: Criterion) -> Tuning:
        """The same runs, judged by another criterion."""

        def anew(run: LambdaRun) -> LambdaRun:
            collapsed_at = run.steps if run.steps < self.settings["steps"] else None
            verdict, reason = criterion.judge(run.numbers, collapsed_at)
            return replace(run, verdict=verdict, reason=reason)

        return Tuning({**self.settings, "criterion": asdict(criterion)}, [anew(run) for run in self.runs])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuning:
        """Reads a `tuning.json` or the folder that has one.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not one that this release wrote.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        return read_record(path, "tuning", f"{FILE} of lewm tune-lambda", cls._of)

    @classmethod
    def _of(cls, read: dict[str, Any]) -> Tuning:
        found = cls(typed("settings", read["settings"], dict[str, Any]), typed("runs", read["runs"], list[LambdaRun]))
        if not 0 < found.settings["low"] < found.settings["high"] < math.inf:
            raise ValueError("its bounds are not in order")
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON, what follows from the runs included."""
        return {"value": self.value, "plateau": self.plateau, "bracket": self.bracket, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON atomically."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1).encode())

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Writes a PNG: what the criterion looks at against lambda, success where it was measured, and run by run the
        bracket."""
        import io

        from matplotlib.backends.backend_agg import FigureCanvasAgg

        picture = io.BytesIO()
        FigureCanvasAgg(_figure(self)).print_png(picture)
        write_atomically(path, picture.getvalue())

    def __str__(self) -> str:
        lines = []
        for run in self.runs:
            solved = f"  {run.success['rate']:6.1%} solved" if run.success else ""
            lines.append(f"lambda {run.value:<10.4g} {run.verdict:<9}{solved}  {run.reason}")
        (low, high), inside = self.bracket, self.plateau
        if inside is None:
            text = f"between {low:.4g} and {high:.4g} nothing inside was found yet"
            if low == self.settings["low"]:
                text += f"; below {low:.4g} was not looked"
            if high == self.settings["high"]:
                text += f"; above {high:.4g} was not looked"
            return "\n".join([*lines, text])
        lines.append(
            f"inside from {inside[0]:.4g} to {inside[1]:.4g}; its edges are in {low:.4g} to {inside[0]:.4g} and"
        )
        lines[-1] += f" {inside[1]:.4g} to {high:.4g}"
        return "\n".join([*lines, f"sigreg_weight={self.value:.4g}"])


def tune_lambda(
    data: Dataset | str | os.PathLike[str],
    *,
    preset: str = "tiny",
    low: float = 1e-4,
    high: float = 10.0,
    runs: int = 8,
    steps: int | None = None,
    refine: bool = True,
    pairs: int = 0,
    seed: int = 0,
    criterion: Criterion | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], object] | None = None,
    **overrides: Any,
) -> Tuning:
    """Searches lambda, the weight of SIGReg, by bisection in its logarithm: O(log n) short runs (paper, figure 16).

    Each run is judged by `criterion`, without environment or labels. The first is at the geometric middle of the
    bounds, which are never tried themselves: a run that is too low becomes the lower bound, one that is too high the
    upper. Once a run is inside, the rest of the budget narrows down both edges of the plateau, the wider gap first,
    down to a factor of 1.5; the answer is the run nearest to the middle of the plateau.

    `out` gets `tuning.json` and `tuning.png`, anew after each run, and a run folder for each lambda. The same call goes
    on where it was stopped, also within a run, and with more `runs` further. With another `criterion` the runs that are
    there are judged anew.

    Args:
        data: A store or its path.
        preset: As in `lewm.train`.
        low, high: Bounds.
        runs: How many, at most, earlier ones in `out` counted.
        steps: Optimiser steps of each run, with a whole schedule of the learning rate; by default a fifth of the
            preset's.
        refine: Whether to go on when a run is inside.
        pairs: Also measure success, by the protocol of the store's environment, on this many pairs. The search does not
            look at it. Runs that collapse are then not cut short.
        seed: Of every run.
        criterion: Bounds of the two tests; `Criterion()` by default.
        out: Folder; `runs/lambda-<preset>-<seed>` when not given.
        device: As in `lewm.train`.
        progress: Called after every optimiser step with (steps done, steps in all, which run it is).
        **overrides: Any other setting of model or training, as in `lewm.train`.

    Returns:
        The search; `value` is the lambda to train with, None if no run was inside.

    Raises:
        ValueError, TypeError: An argument or data that cannot be trained on, or `out` holds something else or a search
            with other settings, which are named.
        KeyboardInterrupt: After the checkpoint of the run is written.
    """
    search = _Search(data, preset, low, high, steps, pairs, seed, criterion, out, device, overrides)
    integer("runs", runs, 1)
    if not isinstance(refine, bool):
        raise ValueError(f"refine must be True or False, got {refine!r}")
    found = search.open()
    while len(found.runs) < runs and (value := found.next(refine)) is not None:
        note = f"run {len(found.runs) + 1} of at most {runs}, lambda {value:.4g}"
        found = search.add(found, _trial(search.config(value), _noted(progress, note)))
    return found


def sweep_lambda(
    data: Dataset | str | os.PathLike[str],
    *,
    points: int = 12,
    preset: str = "tiny",
    low: float = 1e-4,
    high: float = 10.0,
    steps: int | None = None,
    pairs: int | None = None,
    ray: bool = False,
    seed: int = 0,
    criterion: Criterion | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], object] | None = None,
    **overrides: Any,
) -> Tuning:
    """Makes the runs of `tune_lambda` on a logarithmic grid from `low` to `high`: shows the plateau that it looks for.

    Args:
        data, preset, low, high, steps, seed, criterion, device, progress, **overrides: As in `tune_lambda`.
        points: Of the grid, both bounds included; at least 2.
        pairs: As in `tune_lambda`; by default the protocol's, none if the store's environment has no protocol.
        ray: Make the runs with Ray Tune, as many at once as its cluster has CPUs or, on CUDA, GPUs. `data` and `out`
            must be there under the same path on every machine. `progress` is not called.
        out: Folder; `runs/lambda-sweep-<preset>-<seed>` when not given. The same call makes the runs that are missing.

    Raises:
        ModuleNotFoundError: `ray` without Ray Tune.
        ValueError, TypeError, KeyboardInterrupt: As in `tune_lambda`.
        RuntimeError: A run failed on the cluster; the others are kept.
    """
    integer("points", points, 2)
    if ray:
        _ray_tune()
    out = out or f"runs/lambda-sweep-{preset}-{seed}"
    search = _Search(data, preset, low, high, steps, pairs, seed, criterion, out, device, overrides, points=points)
    found = search.open()
    there = {run.value for run in found.runs}
    missing = [value for value in map(float, np.geomspace(low, high, points)) if value not in there]
    if ray and missing:
        for run in _in_parallel([search.config(value) for value in missing], gpu=search.on_cuda):
            found = search.add(found, run)
        return found
    for value in missing:
        note = f"run {len(found.runs) + 1} of {points}, lambda {value:.4g}"
        found = search.add(found, _trial(search.config(value), _noted(progress, note)))
    return found


class _Search:
    """The settings of a search or a sweep, checked, and its folder."""

    def __init__(
        self,
        data: Dataset | str | os.PathLike[str],
        preset: str,
        low: float,
        high: float,
        steps: int | None,
        pairs: int | None,
        seed: int,
        criterion: Criterion | None,
        out: str | os.PathLike[str] | None,
        device: str | None,
        overrides: dict[str, Any],
        **grid: int,
    ) -> None:
        from lewm.trainer import _Run

        for name, value in (("low", low), ("high", high)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if low >= high:
            raise ValueError(f"low must be below high, got {low:g} and {high:g}")
        if "sigreg_weight" in overrides:
            raise ValueError("sigreg_weight is what is searched, from low to high; got it as a setting")
        if steps is not None:
            overrides = {**overrides, "steps": integer("steps", steps, 1)}
        criterion = Criterion() if criterion is None else criterion
        if not isinstance(criterion, Criterion):
            raise TypeError(f"criterion must be a Criterion, got {criterion!r}")
        data = data if isinstance(data, Dataset) else Dataset(data)
        protocol = _protocol(data)
        pairs = (PROTOCOLS[protocol].pairs if protocol else 0) if pairs is None else integer("pairs", pairs, 0)
        if pairs and protocol is None:
            raise ValueError(
                f"pairs must be 0: {data.metadata.get('env_id')!r} has no protocol to measure by, got {pairs}"
            )
        run = _Run(data, preset, *configure(preset, data.action_dim, overrides), seed, device, False)
        overrides = {name: value for name, value in overrides.items() if name not in ("steps", "epochs")}
        longest = int(data.lengths[run.validation_episodes].max())
        least = run.model_config.history * run.model_config.action_block + 1
        if longest < least:
            raise ValueError(
                f"data must hold a longer episode out: judging takes {least} frames, the longest has {longest}"
            )
        self.out = Path(out or f"runs/lambda-{preset}-{seed}").absolute()
        self.on_cuda = run.device.type == "cuda"
        self._device, self._data = device, data
        self._criterion, self._overrides = criterion, overrides
        self.settings = {
            "fingerprint": data.fingerprint(),
            "preset": preset,
            "low": float(low),
            "high": float(high),
            "steps": max(1, run.steps // 5) if steps is None else steps,
            "pairs": pairs,
            "seed": seed,
            "criterion": asdict(criterion),
            "overrides": json.loads(json.dumps(overrides)),
            **grid,
        }

    def open(self) -> Tuning:
        """What the folder holds of this search so far."""
        started = any(self.out.glob("lambda-*")) if self.out.is_dir() else False
        if (self.out / FILE).exists():
            found = Tuning.load(self.out)
            names = {**found.settings, **self.settings}
            differing = [
                f"{name} {found.settings.get(name)!r}, not {self.settings.get(name)!r}"
                for name in names
                if name != "criterion" and found.settings.get(name) != self.settings.get(name)
            ]
            if not differing:
                return found if found.settings == self.settings else self._written(found.judged(self._criterion))
            if started:
                raise ValueError(f"{self.out} was made with {'; '.join(differing)}; use another folder")
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise ValueError(f"out must be a new or empty folder, or one of an earlier search; {self.out} holds files")
        found = Tuning(self.settings, [])
        found.save(self.out / FILE)
        return found

    def config(self, value: float) -> dict[str, Any]:
        """All that `_trial` needs, plain data: it may run in another process or on another machine."""
        return {
            "data": str(self._data.path),
            "preset": self.settings["preset"],
            "folder": str(self.out / f"lambda-{value:.6g}"),
            "seed": self.settings["seed"],
            "device": self._device,
            "pairs": self.settings["pairs"],
            "criterion": self.settings["criterion"],
            "train": {**self._overrides, "steps": self.settings["steps"], "sigreg_weight": value},
        }

    def add(self, found: Tuning, run: dict[str, Any]) -> Tuning:
        """With one run more, written."""
        return self._written(replace(found, runs=[*found.runs, LambdaRun(**run)]).judged(self._criterion))

    def _written(self, found: Tuning) -> Tuning:
        found.save(self.out / FILE)
        found.draw(self.out / PICTURE)
        return found


def _trial(config: dict[str, Any], progress: Callable[[int, int, Any], object] | None = None) -> dict[str, Any]:
    """One short run, from the beginning or from where it was left: the fields of a `LambdaRun`."""
    from lewm.trainer import CollapseWarning, train

    folder, settings = Path(config["folder"]), config["train"]
    if (folder / RUN_FILE).exists():  # made, and not yet in the search's file
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    data, collapsed_at = Dataset(config["data"]), None
    resume = (folder / "checkpoint.safetensors").exists()
    if not resume:  # if it is there, it was stopped before there was anything to resume
        shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        # A collapse ends a run that nothing more is asked of.
        warnings.simplefilter("ignore" if config["pairs"] else "error", CollapseWarning)
        try:
            model = train(
                data,
                preset=config["preset"],
                out=folder,
                seed=config["seed"],
                resume=resume,
                device=config["device"],
                progress=progress,
                **settings,
            )
        except CollapseWarning:
            model = None
    with (folder / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    names = ["sigreg_per_sample", "embedding_std", "effective_rank", "validation_prediction", "probe_r2"]
    numbers = {name: float(last[name]) for name in names if last.get(name)}
    success = None
    if model is None:
        collapsed_at = int(last["step"])
    else:
        numbers |= prediction_scores(model, data)
        if config["pairs"]:
            success = _success(folder / "model.safetensors", data, config["pairs"])
    numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
    verdict, reason = Criterion(**config["criterion"]).judge(numbers, collapsed_at)
    run = LambdaRun(
        settings["sigreg_weight"],
        verdict,
        reason,
        numbers,
        int(last["step"]),
        float(last["seconds"]),
        folder.name,
        success,
    )
    write_atomically(folder / RUN_FILE, json.dumps(asdict(run)).encode())
    return asdict(run)


def prediction_scores(model: Model, data: Dataset) -> dict[str, float]:
    """How well the next latent is predicted, on held-out episodes; each prediction sees `history` frames.

    Returns:
        `prediction_r2`, 1 - |prediction - z'|^2 / |z' - mean z'|^2, and `skill`, 1 - |prediction - z'|^2 / |z' - z|^2,
        which is 0 for "nothing moves". Sums are over steps and dimensions. Minus infinity where a denominator is 0.

    Raises:
        ValueError: No held-out episode is long enough for one prediction.
    """
    history, now, then, error, count = model.config.history, [], [], 0.0, 0
    for track in tracks(model, data, held_out(model, data), least=history + 1):
        windows = np.arange(len(track.z) - history)[:, None] + np.arange(history)
        blocks = track.blocks[windows]
        past = blocks[:, :-1] if history > 1 else None
        predicted = np.asarray(model.rollout(track.z[windows], blocks[:, -1][:, None, None], past))[:, 0, -1]
        now.append(track.z[history - 1 : -1].astype(np.float64))
        then.append(track.z[history:].astype(np.float64))
        error += float(np.square(predicted - then[-1]).sum())
        count += len(windows)
        if count >= _TRANSITIONS:
            break
    if not count:
        raise ValueError(
            f"data must hold a held-out episode of more than {history} steps of {model.config.action_block}"
        )
    z, target = np.concatenate(now), np.concatenate(then)
    spreads = {"prediction_r2": target - target.mean(0), "skill": target - z}
    sums = {name: float(np.square(values).sum()) for name, values in spreads.items()}
    return {name: 1 - error / total if total > 0 else -math.inf for name, total in sums.items()}


def _protocol(data: Dataset) -> str | None:
    """The name of the first protocol of the store's environment."""
    env_id = data.metadata.get("env_id")
    return next((name for name, protocol in PROTOCOLS.items() if protocol.env_id == env_id), None)


def _success(path: Path, data: Dataset, pairs: int) -> dict[str, float]:
    result = evaluate(load(path), _protocol(data), pairs=pairs)
    low, high = result.interval
    return {"rate": result.success_rate, "low": low, "high": high, "floor": result.random_floor, "pairs": float(pairs)}


def _noted(progress: Callable[[int, int, str], object] | None, note: str) -> Callable[[int, int, Any], object] | None:
    return None if progress is None else lambda done, total, _: progress(done, total, note)


def _ray_tune() -> Any:
    try:
        from ray import tune
    except ImportError as error:
        text = f'ray=True needs {error.name or "ray[tune]"}, which is not installed: pip install "lewm-fast[cluster]"'
        raise ModuleNotFoundError(text, name=error.name) from error
    return tune


def _in_parallel(configs: list[dict[str, Any]], gpu: bool) -> Iterator[dict[str, Any]]:
    """`_trial` of each, by Ray Tune, which has as many at work as it has CPUs or GPUs."""
    tune = _ray_tune()
    trainable = tune.with_resources(lambda config: _trial(config["trial"]), {"gpu": 1} if gpu else {"cpu": 1})
    results = tune.Tuner(trainable, param_space={"trial": tune.grid_search(configs)}).fit()
    for result in results:
        if result.error is None:
            yield json.loads((Path(result.config["trial"]["folder"]) / RUN_FILE).read_text(encoding="utf-8"))
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {len(configs)} runs failed: {brief(results.errors[0])}")


def _figure(found: Tuning) -> Any:
    from matplotlib.figure import Figure

    settings, colours = found.settings, dict(zip(VERDICTS, ("#2b6ca3", "#3a8f4d", "#c8402f"), strict=True))
    search = "points" not in settings
    figure = Figure(figsize=(7.5, 6.2 if search else 3.8), layout="constrained")
    axes = figure.subplots(1 + search, 1, sharex=True, squeeze=False)[:, 0]
    curves, shares = axes[0], axes[0].twinx()
    runs = sorted(found.runs, key=lambda run: run.value)
    for panel, name, colour, label in (
        (curves, "sigreg_per_sample", colours["too low"], "SIGReg per sample"),
        (shares, "prediction_r2", colours["too high"], "R2 of the prediction"),
    ):
        points = [(run.value, run.numbers[name]) for run in runs if name in run.numbers]
        panel.plot(*np.transpose(points or [(math.nan, math.nan)]), "o-", color=colour, ms=3, lw=1.2, label=label)
        bound = settings["criterion"]["sigreg" if panel is curves else "r2"]
        panel.axhline(bound, color=colour, ls="--", lw=0.8)
        panel.set_ylabel(label, color=colour)
    solved = [(run.value, run.success) for run in runs if run.success]
    if solved:
        rates = np.array([[s["rate"], s["rate"] - s["low"], s["high"] - s["rate"]] for _, s in solved]).T
        what = f"success, {solved[0][1]['pairs']:.0f} pairs"
        shares.errorbar([value for value, _ in solved], rates[0], rates[1:], fmt="ks-", ms=3, lw=1.2, label=what)
        shares.axhline(solved[0][1]["floor"], color="k", ls=":", lw=0.8, label="random actions")
        shares.set_ylabel("R2 of the prediction; success")
    curves.set(xscale="log", xlim=(settings["low"] / 1.3, settings["high"] * 1.3), ylim=(0, 0.45))
    shares.set_ylim(0, 1.02)
    lines = [line for panel in (curves, shares) for line in panel.get_legend_handles_labels()[0]]
    figure.legend(handles=lines, fontsize=7, frameon=False, loc="outside upper center", ncols=len(lines))
    if inside := found.plateau:
        for panel in axes:
            panel.axvspan(*inside, color=colours["inside"], alpha=0.12, lw=0)
    chosen = "" if found.value is None else f", lambda {found.value:.3g}"
    curves.set_title(
        f"{settings['preset']}, {settings['steps']} steps a run, seed {settings['seed']}{chosen}", fontsize=10
    )
    if search:
        order = axes[1]
        for number, run in enumerate(found.runs, 1):
            order.plot(
                Tuning(settings, found.runs[: number - 1]).bracket, [number] * 2, color="#999999", lw=3, alpha=0.5
            )
            order.plot(run.value, number, "o", color=colours[run.verdict])
        for verdict, colour in colours.items():
            order.plot([], [], "o", color=colour, label=verdict)
        order.set(ylim=(len(found.runs) + 0.6, 0.4), ylabel="run; grey: the bracket before it")
        order.legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel("lambda (sigreg_weight)")
    return figure
