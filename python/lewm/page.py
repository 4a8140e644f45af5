"""`lewm.report`: a run as one HTML page that needs neither a network nor scripts.

A section is a function from the run to HTML, or to None where the run lacks what it shows; `_SECTIONS` lists them. All
that comes from files goes through `_text`: they may be from anywhere.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lewm import StoreError, __version__, diagnostics, envs, latents
from lewm.checks import integer
from lewm.data import Dataset
from lewm.decoder import load_decoder
from lewm.evaluation import PROTOCOLS, Result, make_tasks
from lewm.expectation import VoE
from lewm.imagination import draw_fan
from lewm.losses import characteristic_function, epps_pulley, sigreg_directions
from lewm.model import Model, load
from lewm.model_file import brief, write_atomically
from lewm.monitor import Calibration, calibrate
from lewm.pictures import BLUE, GREY, RED, draw_episode, play, principal, read_metrics, states
from lewm.probes import ProbeResult, Score, probe
from lewm.records import read_record
from lewm.tsne import tsne

_DIRECTIONS = 512
_MAPPED = 500  # points of the t-SNE, whose time grows with their square
_TRACKS = 32  # episodes of which the straightness is measured
_AHEAD = 25  # steps to the goal of the plan whose candidates are shown, as in the protocols
_PAIRS = 16  # of a protocol, from which the one to be steered is taken
_COLOURS = 6  # state numbers that the maps show
_POINTS = 1000  # of one curve
_GIF_BYTES = 4_000_000  # of all from the folder together; the page is to stay below 10 MB
_TEXT = 2000  # characters of one text from a file
# What went wrong in a section is said on the page; the others are made.
_PROBLEMS = (ValueError, TypeError, LookupError, ArithmeticError, OSError, ImportError, RuntimeError, StoreError)


def report(
    run: str | os.PathLike[str],
    *,
    data: Dataset | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    frames: int = 1500,
) -> Path:
    """Writes a run as one self-contained HTML page: no script, no network, pictures and style within it.

    What is there decides what is shown. `metrics.csv` gives the curves, also of a run that goes on or was interrupted;
    `model.safetensors` and the data it learnt from give what is measured on held-out episodes: SIGReg per direction
    (paper, appendix A), effective rank, straightness (appendix H), maps of the latents; results that `lewm evaluate`
    wrote into the folder give the table of success rates (figure 6), and GIFs in it are shown. What is left out, the
    page says. The same files and seed give the same bytes on one machine.

    Args:
        run: Folder of `lewm.train`.
        data: The data it learnt from, or others of the same environment. When not given: the store in or beside the
            run folder that has the fingerprint which the run recorded.
        out: File to write; `report.html` in the run folder when not given.
        seed: Of the directions and of the choice of frames, and of the episode that is steered.
        frames: Held-out frames that are looked at, at most.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: There is no such folder, or no such store.
        ValueError: It is no run, one of its files is damaged, or the data are not of the model's actions.
    """
    integer("seed", seed, 0, 2**32)
    integer("frames", frames, 16)
    folder = Path(os.path.abspath(run))
    if not folder.is_dir():
        raise FileNotFoundError(f"run: no such folder: {run}")
    read = _read(folder, data, seed, frames)
    path = folder / "report.html" if out is None else Path(out)
    write_atomically(path, _page(read).encode())
    return path


@dataclass
class _Run:
    """What a run has left, and what is measured of it, once for all sections.

    Attributes:
        folder: Where it is.
        metrics: Columns of `metrics.csv` as `read_metrics` gives them.
        config: `config.json`.
        model: What was trained; None before the run is done.
        data: What it learnt from, or others; None if not found.
        results: Of `lewm evaluate`, by the names of their files.
        probes: Of `lewm probe`, likewise.
        expectations: Of `lewm voe`, likewise.
        seed, frames: As of `report`.
        notes: What a reader is to know: what is left out, and why.
    """

    folder: Path
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    config: dict[str, Any]
    model: Model | None
    data: Dataset | None
    seed: int
    frames: int
    results: dict[str, Result] = field(default_factory=dict)
    probes: dict[str, ProbeResult] = field(default_factory=dict)
    expectations: dict[str, VoE] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def analysed(self) -> tuple[Model, Dataset] | None:
        """The model and its data, if both are there."""
        return None if self.model is None or self.data is None else (self.model, self.data)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Numbers (n,) of the episodes that are looked at."""
        return latents.held_out(self.model, self.data)

    @cached_property
    def sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latents (N, D) of held-out frames; the episode and the row of each (N,)."""
        each = -(-self.frames // max(1, len(self.held_out)))
        return latents.scattered(
            self.model, self.data, self.held_out, frames=self.frames, per_episode=each, seed=self.seed
        )

    def last(self, name: str) -> float | None:
        """The last number of a column."""
        _, values = self.metrics.get(name, ((), ()))
        return float(values[-1]) if len(values) else None

    def recorded(self, *names: str) -> Any:
        """What the model's file says under these keys, one in the other; None if it does not."""
        value: Any = {} if self.model is None else self.model.meta
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def _read(folder: Path, data: Any, seed: int, frames: int) -> _Run:
    has_log, has_model = ((folder / name).is_file() for name in ("metrics.csv", "model.safetensors"))
    if not (has_log or has_model):
        raise ValueError(
            f"run must be a folder of lewm train, with metrics.csv or model.safetensors; {folder} has neither"
        )
    run = _Run(folder, read_metrics(folder) if has_log else {}, {}, None, None, seed, frames)
    if has_model:
        run.model = load(folder / "model.safetensors", precision="float32")
    else:
        run.notes.append(
            "There is no model.safetensors: the training goes on or was interrupted. What needs a model is left out."
        )
    if not has_log:
        run.notes.append("There is no metrics.csv: curves are left out.")
    for name, path in _files(folder, "json"):
        _read_json(run, name, path)
    learnt = run.recorded("data", "fingerprint") or run.config.get("fingerprint")
    if data is not None:
        run.data = data if isinstance(data, Dataset) else Dataset(data)
        wanted = run.data.action_dim if run.model is None else run.model.config.action_dim
        if run.data.action_dim != wanted:
            raise ValueError(f"data must have actions of width {wanted}, as the model, got {run.data.action_dim}")
        if run.data.fingerprint() != learnt:
            run.notes.append("The data are not those that the model learnt from; all their episodes count as held out.")
    else:
        run.data = _beside(folder, learnt)
    if run.model is not None and run.data is None:
        run.notes.append(
            "No store in or beside the run folder has the fingerprint of the data it learnt from. What needs frames is "
            "left out; lewm report RUN --data STORE adds it."
        )
    return run


def _files(folder: Path, kind: str) -> list[tuple[str, Path]]:
    """Files in the run folder and in the folders within it that are no stores, by their names from there."""
    found = [*folder.glob(f"*.{kind}"), *folder.glob(f"*/*.{kind}")]
    return sorted((path.relative_to(folder).as_posix(), path) for path in found if path.parent.suffix != ".lewm")


def _read_json(run: _Run, name: str, path: Path) -> None:
    """Puts what a file holds where it belongs, or notes that it is nothing for this page."""
    kinds: tuple[tuple[Callable[[Path], Any], dict[str, Any]], ...] = (
        (Result.load, run.results),
        (ProbeResult.load, run.probes),
        (VoE.load, run.expectations),
    )
    try:
        if name == "config.json":
            run.config = read_record(path, "run", "config.json of a run", _object)
            return
        for loaded, found in kinds:
            with contextlib.suppress(ValueError):
                found[name] = loaded(path)
                return
        raise ValueError("It is nothing that lewm evaluate, lewm probe or lewm voe wrote.")
    except (ValueError, OSError) as error:
        run.notes.append(f"{name}: left out. {brief(error)}")


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it must be an object, got {type(value).__name__}")
    return value


def _beside(folder: Path, fingerprint: Any) -> Dataset | None:
    """The store with this fingerprint where recipes and the demo leave theirs."""
    for path in [*sorted(folder.glob("*.lewm")), *sorted(folder.parent.glob("*.lewm"))]:
        try:
            data = Dataset(path)
            if data.fingerprint() == fingerprint:
                return data
        except _PROBLEMS:  # not ours, then
            continue
    return None


# ------------------------------------------------------------------------------------------------------------- sections


def _summary(run: _Run) -> str:
    names = {
        "loss": "loss",
        "prediction": "prediction loss",
        "validation_prediction": "prediction loss, held out",
        "sigreg": "SIGReg",
        "probe_r2": "R² of a linear probe of the state",
        "distance_correlation": "correlation of latent and true distance",
        "effective_rank": "effective rank",
        "straightness": "temporal straightness S",
    }
    found = {title: value for name, title in names.items() if (value := run.last(name)) is not None}
    steps = run.metrics.get("step", ((), ()))[0]
    rows = [("steps", f"{steps[-1]:,}")] if len(steps) else []
    rows += [(title, f"{value:.4g}") for title, value in found.items()]
    rows += [(f"solved, {r.protocol.name}", _rate(r.success_rate, r.interval)) for r in run.results.values()]
    if run.model is not None:
        rows.append(("model", run.model.describe()))
    return f"<p>{_text(_collapse(run))}</p>{_table(('at the end', ''), rows)}"


def _collapse(run: _Run) -> str:
    """Whether what `lewm train` warns of has been the case, by the same limits."""
    settings = run.config.get("train")
    settings = settings if isinstance(settings, dict) else {}
    warmup, steps = settings.get("warmup"), settings.get("steps")
    logged = run.metrics.get("step", (np.empty(0), ()))[0]
    total = steps if isinstance(steps, int) else (logged[-1] if len(logged) else 0)
    grace = diagnostics.collapse_grace(warmup if isinstance(warmup, int | float) else 0, total)
    empty: tuple[Any, Any] = ((), ())
    sigreg, spread, rank = (
        dict(zip(*run.metrics.get(name, empty), strict=True))
        for name in ("sigreg_per_sample", "embedding_std", "effective_rank")
    )
    if settings.get("sigreg_weight") == 0:
        sigreg = {}
    bad = [
        int(step)
        for step in logged[logged >= grace]
        if diagnostics.collapsing(sigreg.get(step), spread.get(step, np.inf), rank.get(step, np.inf))
    ]
    if not len(logged) or logged[-1] < grace:
        return "Too few steps are logged to say whether the latents collapse."
    if not bad:
        return "No collapse: SIGReg, spread and rank of the latents stayed within their limits."
    again = "and at the end still" if max(bad) == logged[-1] else f"last at step {max(bad):,}"
    return f"Collapse: from step {min(bad):,}, {again}, the latents were near a point or a line. Raise sigreg_weight."


def _success(run: _Run) -> str | None:
    if not run.results:
        return None
    weights = None if run.model is None else run.model.hash()
    columns = ("task", "solved", "pairs", "at the start", "random", "blind", "one plan, p50 and p95")
    rows, details = [], ""
    for name, r in run.results.items():
        other = "" if weights in (None, r.model_hash) else " (of OTHER WEIGHTS)"
        blind = "" if r.blind_floor is None else f"{r.blind_floor:.1%}"
        rows.append(
            (
                f"{r.protocol.name}{other}",
                _rate(r.success_rate, r.interval),
                str(r.n),
                str(r.solved_at_start),
                _rate(r.random_floor, r.random_interval),
                blind,
                f"{r.plan_ms['p50']:.1f} and {r.plan_ms['p95']:.1f} ms",
            )
        )
        how = (
            f"{name}: {r.planner['name']}, {r.planner['samples']} samples x {r.planner['iterations']} iterations, "
            f"{r.execute} of {r.planner['horizon']} blocks executed, seed {r.seed}, {r.backend} {r.precision}"
        )
        details += f"<li>{_text(how)}<br><code>{_text(r.command)}</code></li>"
    return (
        f"{_table(columns, rows)}<p>Share of start and goal pairs solved from pictures, with its 95 % Wilson "
        "interval (the paper's figure 6, protocol in appendix F.1). Random: uniform actions on the same pairs, the "
        "floor. Blind: who takes the agent straight to its place in the goal and sees nothing else.</p>"
        f"<details><summary>Planners, and the commands that measure it again</summary><ul>{details}</ul></details>"
    )


def _curves(run: _Run) -> str | None:
    if not len(run.metrics.get("step", ((), ()))[0]):
        return None
    panels: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("loss", ("loss",)),
        ("prediction loss", ("prediction", "validation_prediction")),
        ("SIGReg", ("sigreg",)),
        ("learning rate", ("learning_rate",)),
        ("gradient norm", ("gradient_norm",)),
        ("what predicts planning success", ("probe_r2", "distance_correlation")),
    )
    own = {name for _, names in panels for name in names}
    own |= {"step", "seconds", "sigreg_per_sample", "embedding_std", "effective_rank", "straightness"}
    further = [name for name, (steps, _) in run.metrics.items() if name not in own and len(steps)][:9]
    panels += tuple((name, (name,)) for name in further)
    shown = [(title, names) for title, names in panels if any(run.last(name) is not None for name in names)]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(-(-len(shown) // 3), 3, squeeze=False).ravel()
        for axes, (title, names) in zip(grid, shown, strict=False):
            _plot(axes, run, names)
            axes.set(title=_label(title), xlabel="step")
        _without_empty(figure)

    return _figure(
        draw,
        (10, 2.7 * -(-len(shown) // 3)),
        "Curves over training steps: " + ", ".join(title for title, _ in shown),
        "The two terms over training, and what else was logged. Prediction should fall steadily; SIGReg drops sharply "
        "and then stays (the paper's figures 18 and 19). The losses alone do not say whether plans will succeed: the "
        "probe's R² and the correlation of latent with true distance do better.",
    )


def _plot(axes: Any, run: _Run, names: Sequence[str], colours: Sequence[str] = (RED, BLUE)) -> None:
    """Columns of the log over the step, on a logarithmic scale where they span more than one power of ten."""
    lowest, highest = np.inf, -np.inf
    for name, colour in zip(names, colours, strict=False):
        steps, values = run.metrics.get(name, (np.empty(0), np.empty(0)))
        if not len(steps):
            continue
        few = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int))
        axes.plot(steps[few], values[few], color=colour, label=_label(name), lw=1.2, ms=3, marker="o" * (len(few) < 20))
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
    if 0 < lowest < highest / 10:
        axes.set_yscale("log")
    if len(axes.lines) > 1:
        axes.legend()


def _without_empty(figure: Figure) -> None:
    for axes in figure.axes:
        if not axes.has_data():
            axes.remove()


def _sigreg(run: _Run) -> str | None:
    if run.analysed is None:
        return None
    z, episodes, _ = run.sample
    directions = sigreg_directions(z.shape[1], _DIRECTIONS, seed=run.seed, step=0)
    normal = np.random.default_rng(run.seed).standard_normal(z.shape).astype(np.float32)
    ours, ideal = _per_direction(z, directions), _per_direction(normal, directions)

    def histogram(figure: Figure) -> None:
        axes = figure.subplots()
        ends = np.log10([max(min(ours.min(), ideal.min()), 1e-6), max(ours.max(), ideal.max())])
        bins = np.logspace(ends[0] - 0.01, ends[1] + 0.01, 50)
        axes.hist(ideal, bins, color=GREY, alpha=0.8, label=f"Gaussian sample, mean {ideal.mean():.3g}")
        axes.hist(ours, bins, color=BLUE, alpha=0.8, label=f"latents, mean {ours.mean():.3g}")
        axes.set(xscale="log", xlabel="Epps-Pulley statistic of a direction", ylabel="directions")
        axes.legend()

    order = np.argsort(ours)
    picked = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    ranks = np.unique(np.linspace(0, len(z) - 1, 200).astype(int))
    quantiles = np.array([NormalDist().inv_cdf((rank + 0.5) / len(z)) for rank in ranks])

    def plots(figure: Figure) -> None:
        for axes, (name, which) in zip(figure.subplots(1, 3, sharex=True, sharey=True), picked.items(), strict=True):
            axes.axline((0, 0), slope=1, color=GREY, lw=0.8)
            for values, colour, label in ((normal, GREY, "Gaussian sample"), (z, BLUE, "latents")):
                projected = np.sort(values @ directions[:, which].numpy())[ranks]
                axes.plot(quantiles, projected, ".", color=colour, ms=3, label=label)
            axes.set(title=f"{name}: {ours[which]:.3g}", xlabel="quantile of N(0, 1)")
        figure.axes[0].set_ylabel("quantile of the projections")
        figure.axes[0].legend()

    where = f"{len(z):,} frames of {len(np.unique(episodes))} held-out episodes"
    first = _figure(
        histogram,
        (7, 3),
        f"Histogram of the Epps-Pulley statistic over {_DIRECTIONS} directions, of latents and of a Gaussian sample",
        f"How far the latents of {where} are from a standard normal along each of {_DIRECTIONS} random directions "
        "(the paper's equations 2 and 3 and appendix A; SIGReg is the mean). Grey is what as many independent Gaussian "
        "points give. The further right, the less Gaussian. The statistic grows with the number of frames, up to "
        f"{diagnostics.COLLAPSED_SIGREG_PER_SAMPLE * len(z):,.0f} for a collapse to the origin, and frames of one "
        "episode are alike, so some distance is to be expected.",
    )
    return first + _figure(
        plots,
        (9, 3.3),
        "Normal quantile plots of the latents along the best, the median and the worst direction",
        "The same latents along the best, the median and the worst of these directions: quantiles against those of a "
        "standard normal (not in the paper). On the line it is one; a flatter slope is too little spread, a steeper "
        "one too much, a bend at the ends lighter or heavier tails, steps are clusters.",
    )


def _per_direction(z: np.ndarray, directions: torch.Tensor) -> np.ndarray:
    """Epps-Pulley statistic (P,) of latents (N, D) along unit directions (D, P)."""
    ecf = characteristic_function(torch.from_numpy(np.ascontiguousarray(z, np.float32))[None], directions)
    return epps_pulley(ecf, len(z))[0].numpy().astype(np.float64)


def _rank(run: _Run) -> str | None:
    logged = run.last("effective_rank") is not None
    if run.analysed is None and not logged:
        return None
    z = None if run.analysed is None else run.sample[0]
    share = None if z is None else principal(z)[1]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        if logged:
            _plot(left, run, ("effective_rank", "embedding_std"))
            left.set(title="over training (batches)", xlabel="step")
        if share is not None:
            right.bar(np.arange(1, len(share) + 1), share, color=BLUE)
            right.set(title="held-out frames", xlabel="principal component", ylabel="share of the variance")
        _without_empty(figure)

    value = "" if z is None else f" On held-out frames it is {diagnostics.effective_rank(z):.1f} of {z.shape[1]}."
    return _figure(
        draw,
        (9, 3),
        "Effective rank and spread of latents over training, and the variance of each principal component",
        "Effective rank: the exponential of the entropy of the covariance's spectrum, from 1 (a line) to the width of "
        f"the latent (Roy and Vetterli, 2007; not in the paper).{value} Beside it the standard deviation of a "
        "coordinate, which SIGReg draws to 1. Both near their least is a collapse.",
    )


def _straightness(run: _Run) -> str | None:
    found = np.empty(0)
    if run.analysed is not None:
        chosen = np.random.default_rng(run.seed).permutation(run.held_out)[:_TRACKS]
        tracks = latents.tracks(*run.analysed, chosen, least=3)
        found = np.array([s for track in tracks if np.isfinite(s := diagnostics.straightness(track.z))])
    logged = run.last("straightness") is not None
    if not len(found) and not logged:
        return None

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        if logged:
            _plot(left, run, ("straightness",))
            left.set(title="over training (batches)", xlabel="step", ylabel="S")
        if len(found):
            right.hist(found, np.linspace(-1, 1, 41), color=BLUE)
            right.set(title="held-out episodes", xlabel="S of an episode", ylabel="episodes")
        _without_empty(figure)

    value = f" {len(found)} held-out episodes: {found.mean():.3f} ± {found.std():.3f}." if len(found) else ""
    return _figure(
        draw,
        (9, 3),
        "Temporal straightness over training, and of held-out episodes",
        "S, the mean cosine between latent steps that follow each other, from -1 (back and forth) to 1 (a straight "
        f"line); no term of the loss asks for it (the paper's appendix H and figure 17).{value}",
    )


def _probes(run: _Run) -> str | None:
    if not run.probes and run.analysed is not None and run.analysed[1].columns:
        run.probes[""] = probe(*run.analysed, frames=run.frames, seed=run.seed)
    columns = ("property", "linear MSE", "linear r", "MLP MSE", "MLP r", "linear R²", "MLP R²")
    body = ""
    for name, found in run.probes.items():
        rows = []
        for title, each in found.properties.items():
            cells = [cell for score in (each.linear, each.mlp) for cell in _score(score)]
            rows.append((title, *cells, *("" if s is None else f"{s.r2:.3f}" for s in (each.linear, each.mlp))))
        other = run.model is not None and found.model_hash not in (None, run.model.hash())
        where = f"{name}{' (of OTHER WEIGHTS)' if other else ''}: " if name else ""
        where += f"{found.test_frames:,} frames of {found.test_episodes:,} episodes"
        where += f", fitted on {found.fit_frames:,} of {found.fit_episodes:,} others"
        body += f"<p>{_text(where)}.</p>{_table(columns, rows)}"
        body += "".join(f"<p>{_text(note)}</p>" for note in found.notes)
    if not body:
        return None
    return (
        f"{body}<p>What can be read off a latent by a linear map and by a small MLP: error on standardised targets (± "
        "over episodes; 1 is what guessing the mean gives) and Pearson's r (the paper's tables 1, 3 and 4). What a "
        "linear map reads, a planner's squared distance sees too.</p>"
    )


def _score(score: Score | None) -> tuple[str, str]:
    """Error and correlation."""
    if score is None:
        return "", ""
    pairs = ((score.mse, score.mse_std), (score.r, score.r_std))
    mse, r = (f"{value:.3f}" if std is None else f"{value:.3f} ± {std:.3f}" for value, std in pairs)
    return mse, r


def _surprise(run: _Run) -> str | None:
    normal = None
    if run.recorded("training", "surprise") is not None:
        normal, source = Calibration.of_model(run.model), "held-out episodes, by the model's file"
    elif run.analysed is not None:
        normal, source = calibrate(*run.analysed, seed=run.seed), "held-out episodes, measured for this page"
    body = "" if normal is None else _calibration(normal, source)
    for name, found in run.expectations.items():
        other = run.model is not None and found.model_hash != run.model.hash()
        body += _expectation(f"{name}{' (of OTHER WEIGHTS)' if other else ''}", found)
    return body or None


def _calibration(normal: Calibration, source: str) -> str:
    scores = np.array(normal.quantiles)
    limits = {p: float(np.quantile(scores, 1 - p)) for p in (0.05, 0.01)}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = max(scores.min(), 1e-9), max(scores.max(), 1e-9)
        axes.hist(np.maximum(scores, low), np.geomspace(low * 0.99, high * 1.01, 41), color=BLUE)
        for (p, limit), style in zip(limits.items(), ("--", ":"), strict=True):
            axes.axvline(limit, color=RED, ls=style, lw=1.2, label=f"p = {p:g}: {limit:.3g}")
        axes.set(xscale="log", xlabel="surprise (mean squared latent error)", ylabel="of 256 quantiles, or of all")
        axes.legend()

    return _figure(
        draw,
        (7, 3),
        "Histogram of the surprise of normal steps, with the limits of p = 0.05 and p = 0.01",
        f"How surprising normal data are: the error of a prediction one step ahead, of {normal.count:,} steps of "
        f"{source} (the paper's section 5.2). Of normal steps one in 20 is beyond the first line and one in 100 "
        "beyond the second, which is what the p-value of a controller's monitor means.",
    )


def _expectation(name: str, found: VoE) -> str:
    colours = {"normal": GREY, "visual": BLUE, "physical": RED}
    what = {"normal": "normal", "visual": "colour changed", "physical": "teleported"}
    positive = min(min(row) for rows in found.scores.values() for row in rows) > 0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for kind, curve in found.curves().items():
            colour = colours.get(kind, GREY)
            axes.plot(found.steps, curve["mean"], "o-", color=colour, ms=3, lw=1.3, label=_label(what.get(kind, kind)))
            axes.fill_between(found.steps, curve["low"], curve["high"], color=colour, alpha=0.25, lw=0)
        axes.axvline(found.change, color=GREY, ls=":", lw=1)
        axes.set(xlabel="environment step", ylabel="surprise", yscale="log" if positive else "linear")
        axes.legend()

    columns = ("against normal", "difference", "95 % interval", "t", "p", "clips")
    rows = [
        (
            what.get(kind, kind),
            f"{test.difference:+.4g}",
            f"{test.interval[0]:+.4g} to {test.interval[1]:+.4g}",
            f"{test.t:.2f}",
            f"{test.p:.2g}",
            str(test.n),
        )
        for kind, test in found.tests.items()
    ]
    return _figure(
        draw,
        (7, 3.2),
        "Surprise along normal clips, clips with a changed colour and clips with a teleport",
        f"{name}: mean surprise and 95 % interval over {found.clips} matched clips of {found.env_id}, which differ "
        "from the dotted line on (the paper's section 5.2 and appendix F.3, where the teleport surprises and the "
        "colour less or not). Below, the paired t-tests.",
    ) + _table(columns, rows)


def _maps(run: _Run) -> str | None:
    if run.analysed is None:
        return None
    data = run.analysed[1]
    z, episodes, rows = run.sample
    if "state" in data.columns:
        factors = envs.factors(data.metadata.get("env_id"), states(data, episodes, rows))
        numbered = {f"{name} {i}": column for name, values in factors.items() for i, column in enumerate(values.T)}
        colours = {name: column for name, column in numbered.items() if np.isfinite(column).all() and np.ptp(column)}
        by = "the state"
    else:
        colours, by = {"frame": rows}, "the number of the frame in its episode, as the data have no state"
    if not colours:
        raise ValueError("state must have a column that varies and is finite")
    colours = dict(list(colours.items())[:_COLOURS])
    few = np.sort(np.random.default_rng(run.seed).permutation(len(z))[:_MAPPED])
    scores, share = principal(z)
    if len(share) < 2:
        raise ValueError(f"latents must be at least 2-dimensional, got {z.shape[1]}")
    places = (
        (scores[:, :2], np.arange(len(z)), (f"PC 1 ({share[0]:.0%})", f"PC 2 ({share[1]:.0%})")),
        (tsne(z[few]), few, ("t-SNE 1", "t-SNE 2")),
    )

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(colours), squeeze=False)
        for i, (points, which, labels) in enumerate(places):
            for axes, (name, values) in zip(grid[i], colours.items(), strict=True):
                dots = axes.scatter(*points.T, c=values[which], s=5, cmap="viridis", lw=0, rasterized=True)
                axes.set(xticks=[], yticks=[], xlabel=labels[0], ylabel=labels[1])
                if i == 0:
                    axes.set_title(_label(name))
                    figure.colorbar(dots, ax=axes, location="top", shrink=0.8, aspect=30)

    return _figure(
        draw,
        (max(2.4 * len(colours), 6), 5.6),
        f"Latents of held-out frames by their principal components and by t-SNE, coloured by {by}",
        f"Above {len(z):,} held-out latents on their first two principal components, below {len(few)} of them by exact "
        f"t-SNE, coloured by {by}. Where the colour changes smoothly, neighbours in the world are neighbours in the "
        "latent space (the paper's t-SNE of Push-T); t-SNE keeps neighbours, not distances.",
    )


def _fans(run: _Run) -> str | None:
    if run.analysed is None or run.analysed[0].stats is None:
        return None
    model, data = run.analysed
    episode = int(run.held_out[0])
    ahead = min(_AHEAD, int(data.lengths[episode]) - 1)
    now, goal = data.frames(episode, [0, ahead])
    decoder = run.folder / "decoder.safetensors"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fan.png"
        draw_fan(
            model, now, goal, path, decoder=load_decoder(decoder, model) if decoder.is_file() else None, seed=run.seed
        )
        content = path.read_bytes()
    return _image(
        "png",
        content,
        "Imagined paths of a plan's candidates in its first and in its last iteration, coloured by cost",
        f"What a plan searched through from the first frame of held-out episode {episode} to its frame {ahead}: the "
        "imagined paths of the candidates in the first and in the last iteration, in the plane of their first two "
        "principal components (the paper's section 3.3). Elites are thick, the plan is red.",
    )


def _episodes(run: _Run) -> str | None:
    shown, size = [], 0
    for name, path in _files(run.folder, "gif"):
        content = path.read_bytes()
        size += len(content)
        if size > _GIF_BYTES:
            run.notes.append(f"{name} and what follows it are left out: the page would grow too large.")
            break
        if content[:6] not in (b"GIF87a", b"GIF89a"):
            raise ValueError(f"{name} is no GIF")
        shown.append(_image("gif", content, f"Animation {name}", f"{name}, from the run folder."))
    if not (run.folder / "episode.gif").exists() and (steered := _steered(run)):
        shown.append(steered)
    return "".join(shown) or None


def _steered(run: _Run) -> str | None:
    """One pair of a protocol of the model's environment, steered for the page."""
    # By what is known here, not by what a file says: gymnasium imports the module that an id may name.
    known = [p for p in PROTOCOLS.values() if p.env_id == run.recorded("data", "env_id")]
    if run.model is None or run.model.stats is None or not known:
        return None
    protocol = known[0]
    settings = run.recorded("data", "env_kwargs")
    settings = settings if isinstance(settings, dict) else {}
    kept = {name: value for name, value in settings.items() if name not in ("start_rule", "goal_rule")}
    tasks = make_tasks(protocol, _PAIRS, run.model.config.image_size)
    pair = int(np.linalg.norm(tasks.states - tasks.goals, axis=1).argmax())
    episode = play(
        run.model, protocol.env_id, tasks.states[pair], tasks.goals[pair], tasks.pictures[pair],
        budget=protocol.budget, seed=run.seed, env_kwargs=kept,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        draw_episode(episode, Path(folder) / "episode.gif")
        content = (Path(folder) / "episode.gif").read_bytes()
    outcome = "solved" if episode.success else "not solved"
    return _image(
        "gif",
        content,
        f"Animation of one planned episode beside its goal and the latent distance to it; {outcome}",
        f"Pair {pair} of {protocol.name}, the farthest apart of its first {_PAIRS}, chosen before it was tried; "
        f"{outcome} in {len(episode.frames) - 1} steps. The red line is the squared "
        "latent distance to the goal, the grey ones what each plan imagined of it (open-loop rollouts, the paper's "
        "figure 7): they agree as far as the predictor is right.",
    )


def _environment(run: _Run) -> str:
    record = run.recorded("training")
    record = record if isinstance(record, dict) else {}
    data = run.recorded("data")
    data = data if isinstance(data, dict) else {}
    own = {
        "preset": run.recorded("preset") or run.config.get("preset"),
        "seed": record.get("seed", run.config.get("seed")),
        **{name: record.get(name) for name in ("steps", "seconds", "device", "bfloat16", "compiled")},
    }
    versions = record.get("versions")
    measured = {
        f"{name}: {part}": result.versions[part]
        for name, result in run.results.items()
        for part in ("cpu", "platform")
        if part in result.versions
    }
    here = {
        "lewm": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }
    stored = {"fingerprint": run.config.get("fingerprint"), **data}
    if run.data is not None:
        stored |= {"store of this page": run.data.path.name, "its fingerprint": run.data.fingerprint()}
        stored["its size"] = f"{len(run.data):,} episodes, {run.data.frame_count:,} frames"
    tables = {
        "Training": own,
        "Versions at training": versions if isinstance(versions, dict) else {},
        "Evaluated on": measured,
        "Data": stored,
        "This page was made with": here,
    }
    body = "".join(f"<h3>{_text(title)}</h3>{_settings(rows)}" for title, rows in tables.items() if any(rows.values()))
    parts = {name: run.config.get(name) for name in ("model", "train")}
    return body + "".join(
        f"<details><summary>Configuration: {name}</summary>{_settings(rows)}</details>"
        for name, rows in parts.items()
        if isinstance(rows, dict)
    )


class _Section(NamedTuple):
    """A part of the page.

    Attributes:
        anchor: Its id.
        title: Its heading.
        make: From the run to HTML in which all that came from files is escaped; None if the run lacks what it shows.
    """

    anchor: str
    title: str
    make: Callable[[_Run], str | None]


_SECTIONS = (
    _Section("summary", "Summary", _summary),
    _Section("success", "Success", _success),
    _Section("training", "Training", _curves),
    _Section("sigreg", "SIGReg by direction", _sigreg),
    _Section("rank", "Effective rank", _rank),
    _Section("straightness", "Temporal straightness", _straightness),
    _Section("probes", "Probes", _probes),
    _Section("surprise", "Surprise", _surprise),
    _Section("maps", "Maps of the latent space", _maps),
    _Section("plans", "What a plan searches through", _fans),
    _Section("episodes", "Episodes", _episodes),
    _Section("run", "The run", _environment),
)


# ----------------------------------------------------------------------------------------------------------------- HTML

_INK = "#12345a"  # stands in figures for the colour of the page's text
_FIGURES = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "lewm",
    "text.usetex": False,
}
_ADAPTS = (
    '<style type="text/css">svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#d5dae0}}'  # as _STYLE has it
)
_STYLE = """
:root{--ink:#1f2328;--paper:#fff;--soft:#5c6670;--line:#d5dae0;--shade:#f4f6f8;--link:#1f5f99}
@media(prefers-color-scheme:dark){:root{--ink:#d5dae0;--paper:#15181c;--soft:#9aa4ae;--line:#363c43;--shade:#1e2227;
--link:#7fb8ea}}
body{margin:0 auto;max-width:62rem;padding:1.5rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}
h1{font-size:1.7rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.3rem;margin:2.2rem 0 .6rem;padding-top:.6rem;
border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .3rem}a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:1rem 0}
figure{margin:1rem 0}figure img{display:block;max-width:100%;height:auto}figcaption{color:var(--soft);font-size:.9rem;
margin-top:.4rem;max-width:46rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.25rem 1rem .25rem 0;border-bottom:1px solid var(--line);
white-space:pre-line}tbody th{font-weight:normal;color:var(--soft)}
thead td{border:0;padding:0}
aside{background:var(--shade);border-left:3px solid var(--soft);padding:.5rem 1rem}aside ul{margin:0;padding-left:1rem}
summary{cursor:pointer;margin:.6rem 0}code{overflow-wrap:anywhere;font-size:.9em}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _page(run: _Run) -> str:
    made = []
    for section in _SECTIONS:
        try:
            body = section.make(run)
        except _PROBLEMS as error:
            run.notes.append(f"{section.title}: left out. {brief(error)}")
            continue
        if body is not None:
            made.append((section.anchor, section.title, body))
    links = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title, _ in made)
    notes = "".join(f"<li>{_text(note)}</li>" for note in run.notes)
    sections = "".join(
        f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>\n' for anchor, title, body in made
    )
    name = _text(run.folder.name)
    preset = _text(run.recorded("preset") or run.config.get("preset") or "of no named preset")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="lewm {_text(__version__)}">\n'
        f"<title>Run {name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n<h1>Run {name}</h1>\n"
        f"<p>LeWorldModel, preset {preset}. Made by <code>lewm report</code>.</p>\n</header>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
        + (f'<aside aria-label="Notes"><ul>{notes}</ul></aside>\n' if notes else "")
        + f"<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    """Anything as HTML text or attribute value: escaped, of limited length, without what HTML does not allow.

    Characters that cannot be seen, among them those that turn the direction of writing around, become U+FFFD.
    """
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= _TEXT else f"{text[:_TEXT]}..."
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def _label(name: str) -> str:
    """Text from a file for within a figure, which has no line breaks and few letters."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    text = (text if len(text) <= 40 else f"{text[:40]}...").lstrip("_")  # legends hide what begins with _
    return text.replace("$", r"\$") or "?"  # no formulas


def _settings(rows: dict[str, Any]) -> str:
    """Names and values, the latter as JSON where they are no text; None is left out."""
    values = {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in rows.items()}
    return _table((), [(name, values[name]) for name in rows if rows[name] is not None])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text, the first of each naming it."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}\n<tbody>\n{body}</tbody></table></div>'


def _figure(draw: Callable[[Figure], None], size: tuple[float, float], alt: str, caption: str) -> str:
    """A drawing as SVG, whose ink is light where the reader's screen is dark."""
    with matplotlib.rc_context(_FIGURES):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace('<style type="text/css">', _ADAPTS, 1)
    return _image("svg+xml", svg.encode(), alt, caption)


def _image(kind: str, content: bytes, alt: str, caption: str) -> str:
    source = base64.b64encode(content).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{source}" alt="{_text(alt)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>\n"
    )


def _rate(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"
