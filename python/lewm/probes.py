"""`lewm.probe`: what of the physics latents hold, and how straight they move (the paper's Tables 1, 3, 4, and App. H).

The encoder stays as it is; small maps are fitted from latents to the recorded states, a linear one and an MLP, and
tested on episodes that they have not seen. What a linear map reads, a planner's squared distance sees too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lewm import diagnostics, envs, latents
from lewm.checks import integer
from lewm.data import Dataset
from lewm.model import Model
from lewm.model_file import write_atomically
from lewm.records import read_record, typed

__all__ = ["ProbeResult", "Property", "Score", "probe"]

_PENALTIES = 10.0 ** np.arange(-8, 1)  # of the ridge, per row and standardised latent
_PER_EPISODE = 2  # frames of an episode to fit on, at least; what lies still in an episode asks for many episodes
_TEST_SHARE = 0.2  # of the episodes, where the model does not say which it has not learnt from
_HIDDEN, _BATCH, _LEARNING_RATE, _EPOCHS, _PATIENCE = 256, 256, 3e-3, 100, 20


@dataclass(frozen=True)
class Score:
    """How well one kind of probe reads one property.

    Attributes:
        mse: Mean squared error on standardised targets, averaged over the property's numbers, then over the frames of
            an episode, then over the test episodes: 1 is what the mean of the fit frames would get.
        mse_std: Its standard deviation over the test episodes; None of a single one.
        r: Pearson correlation of probe and truth over all test frames, of each number; their mean.
        r_std: Its standard error over the test episodes, by the jackknife; None of a single one.
        r2: Share of the variance over all test frames that is explained, of each number; their mean.
    """

    mse: float
    mse_std: float | None
    r: float
    r_std: float | None
    r2: float


@dataclass(frozen=True)
class Property:
    """One physical quantity.

    Attributes:
        dims: Numbers that it has: an angle two, sine and cosine.
        linear: Of ridge regression.
        mlp: Of an MLP with two hidden layers; None without torch.
    """

    dims: int
    linear: Score
    mlp: Score | None


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found; `print` shows it as a table of the paper's shape, `load` reads the JSON again.

    Attributes:
        properties: By name.
        straightness: Temporal straightness S of the test episodes (paper App. H), from -1 to 1: their mean; None if
            none has three frames `block` apart that differ.
        straightness_std: Its standard deviation over the test episodes; None of a single one.
        effective_rank: Of the latents of the test frames (`lewm.diagnostics.effective_rank`), from 1 to `width`.
        width: Of a latent, D.
        block: Raw steps between the frames of a test episode.
        split: Which episodes are tested: "held out" by the model's training, drawn by the "seed", or "given".
        fit_frames, fit_episodes, test_frames, test_episodes: How many there were.
        seed: Of everything random.
        data: Fingerprint of the data set.
        model_hash: Of the model's weights; None of another encoder.
        notes: What was left out, and why.
    """

    properties: dict[str, Property]
    straightness: float | None
    straightness_std: float | None
    effective_rank: float
    width: int
    block: int
    split: str
    fit_frames: int
    fit_episodes: int
    test_frames: int
    test_episodes: int
    seed: int
    data: str
    model_hash: str | None
    notes: list[str]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeResult:
        """Reads what `save` wrote; the file may be from anywhere.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not one that this release wrote; the text says what is wrong.
        """
        return read_record(path, "probes", "result of lewm probe", lambda value: typed("the file", value, cls))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON atomically: the file is the whole result or not there."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2).encode())

    def __str__(self) -> str:
        rows = [("property", "lin MSE", "lin r", "MLP MSE", "MLP r"), ("---",) * 5]
        rows += [(name, *_cells(each.linear), *_cells(each.mlp)) for name, each in self.properties.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
        which = {"held out": "that the model has not learnt from", "seed": f"drawn by seed {self.seed}"}
        straight = _pair(self.straightness, self.straightness_std)
        return "\n".join(
            [
                *lines,
                f"straightness {straight} in steps of {self.block}, effective rank {self.effective_rank:.1f} of "
                f"{self.width}",
                f"tested on {self.test_frames:,} frames of {self.test_episodes:,} episodes "
                f"{which.get(self.split, 'that were asked for')}, fitted on {self.fit_frames:,} of "
                f"{self.fit_episodes:,} others",
                *(f"note: {note}" for note in self.notes),
            ]
        )


def probe(
    model: Model | Callable[[np.ndarray], np.ndarray],
    data: Dataset | str | os.PathLike[str],
    *,
    episodes: ArrayLike | None = None,
    columns: Sequence[str] | None = None,
    frames: int = 4096,
    block: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ProbeResult:
    """Linear and MLP probes of every physical quantity that a data set records, and the straightness of its latents.

    The paper's Tables 1, 3 and 4, and its appendix H. Targets are standardised by mean and standard deviation of
    the fit frames, so errors compare across quantities and data. Probes never see the test episodes: the ridge's
    strength and the MLP's last epoch are chosen on a third of the fit episodes.

    Args:
        model: A model, or any encoder: a function from frames (N, H, W, 3) uint8, as stored, to latents (N, D).
        data: Episodes with recorded states, or the path of a store.
        episodes: Numbers of the episodes to test on (n,); the probes are fitted on others. By default those that the
            model has not learnt from; if `data` is not what it learnt from, a fifth of the episodes, drawn by `seed`.
        columns: Names of the columns to read. By default `state` where the environment is one of lewm's, otherwise all.
            Of lewm's environments `state` is taken apart into what it means, with angles as sine and cosine; any other
            column is one quantity.
        frames: How many to fit on, at most, and how many to test on, about.
        block: Raw steps between the frames of a test episode, which straightness depends on; a model's own action block
            by default. Another encoder has none, and needs it.
        seed: Of everything random.
        out: JSON file to write as well.
        progress: Called with how many frames are encoded, and of how many.

    Raises:
        TypeError: `model` cannot encode.
        IndexError: There is no such episode.
        ValueError: No such column, states that are not finite or do not vary, latents that are not (N, D), not finite
            or all the same, or fewer than 2 episodes to fit on and 1 to test on.
    """
    data = data if isinstance(data, Dataset) else Dataset(data)
    frames, seed = integer("frames", frames, 16), integer("seed", seed, 0, 2**32)
    encode, block = _function(model, block)
    names = _names(data, columns)
    fit, test, split = _split(model, data, episodes, seed)
    per_episode = max(_PER_EPISODE, -(-frames // len(fit)))
    order = np.random.default_rng((seed, 1)).permutation(test)
    steps = np.ceil(data.lengths[order] / block).astype(int)
    test = order[: 1 + np.searchsorted(steps.cumsum(), frames)]
    tracks = [np.arange(0, data.lengths[episode], block) for episode in test]
    total = min(frames, int(np.minimum(data.lengths[fit], per_episode).sum())) + sum(map(len, tracks))

    y_test = _quantities(data, names, test.tolist(), tracks)
    encoder = _Encoder(encode, total, progress)
    paths = [latents.encode(encoder, data, int(e), track) for e, track in zip(test, tracks, strict=True)]
    z_fit, which, where = latents.scattered(encoder, data, fit, frames=frames, per_episode=per_episode, seed=seed)
    z_test = np.concatenate(paths)
    # Ranges are exact; the standard deviation of equal float32 numbers is not 0.
    if np.ptp(z_fit, axis=0).max() <= 1e-5 * (1 + np.abs(z_fit).max()):
        raise ValueError(
            f"the latents of {len(z_fit)} frames of {data.path} are all the same: the frames do not vary, or the "
            "encoder has collapsed"
        )
    drawn = list(dict.fromkeys(which.tolist()))
    y_fit = _quantities(data, names, drawn, [where[which == episode] for episode in drawn])
    targets, notes = _standardised(y_fit, y_test)

    learn = ~np.isin(which, drawn[: -(-len(drawn) // 3)])
    starts = np.cumsum([0, *map(len, tracks[:-1])])
    linear = _linear(z_fit, {name: fit for name, (fit, _) in targets.items()}, z_test, learn)
    properties = {}
    for name, (y, truth) in targets.items():
        mlp = _mlp(z_fit, y, z_test, learn, seed) if find_spec("torch") else None
        scores = [None if each is None else _score(each, truth, starts) for each in (linear[name], mlp)]
        properties[name] = Property(y.shape[1], *scores)
    if not find_spec("torch"):
        notes.append('MLP probes need torch, which is not installed: pip install "lewm-fast[train]"')
    straight = [s for path in paths if math.isfinite(s := diagnostics.straightness(path))]
    if not straight:
        notes.append(f"no straightness: no test episode has three different frames, {block} steps apart")
    result = ProbeResult(
        properties=properties,
        straightness=float(np.mean(straight)) if straight else None,
        straightness_std=float(np.std(straight)) if len(straight) > 1 else None,
        effective_rank=diagnostics.effective_rank(z_test),
        width=z_fit.shape[1],
        block=block,
        split=split,
        fit_frames=len(z_fit),
        fit_episodes=len(drawn),
        test_frames=len(z_test),
        test_episodes=len(test),
        seed=seed,
        data=data.fingerprint(),
        model_hash=model.hash() if isinstance(model, Model) else None,
        notes=notes,
    )
    if out is not None:
        result.save(out)
    return result


# ----------------------------------------------------------------------------------------------------- what is probed


class _Encoder:
    """Any encoder, with what it gives checked."""

    def __init__(self, encode: Any, total: int, progress: Callable[[int, int], object] | None) -> None:
        self._encode, self._total, self._progress = encode, total, progress
        self._done = 0

    def encode(self, frames: np.ndarray) -> np.ndarray:
        z = np.asarray(self._encode(frames))
        if z.ndim != 2 or len(z) != len(frames) or z.dtype.kind != "f":
            raise ValueError(
                f"model must give latents (N, D) of floats, got {z.dtype} {z.shape} for {len(frames)} frames"
            )
        if not np.isfinite(z).all():
            raise ValueError("model must give finite latents, got NaN or infinity")
        self._done += len(frames)
        if self._progress:
            self._progress(self._done, self._total)
        return z


def _function(model: Any, block: int | None) -> tuple[Callable[[np.ndarray], Any], int]:
    """What encodes, and the raw steps between frames."""
    if hasattr(model, "config") and hasattr(model, "encode"):
        return model.encode, integer("block", model.config.action_block if block is None else block, 1)
    if not callable(model):
        raise TypeError(f"model must be a lewm.Model or a function from frames to latents, got {model!r}")
    if block is None:
        raise ValueError("block must be given with an encoder that is no lewm.Model: raw steps between frames, as 5")
    return model, integer("block", block, 1)


def _names(data: Dataset, columns: Sequence[str] | None) -> list[str]:
    """The columns to read."""
    there = list(data.columns)
    if columns is None:
        columns = ["state"] if "state" in there and envs.known(data.metadata.get("env_id")) else there
    names = list(dict.fromkeys([columns] if isinstance(columns, str) else columns))
    if not names or not set(names) <= set(there):
        found = ", ".join(there) or "none"
        raise ValueError(f"columns must be state columns of {data.path}, which has {found}; got {names}")
    return names


def _split(model: Any, data: Dataset, episodes: ArrayLike | None, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Episodes to fit on and to test on, and what made the difference."""
    if episodes is not None:
        test, split = np.unique(data._chosen(episodes)), "given"
    else:
        test, split = latents.held_out(model, data) if hasattr(model, "meta") else np.arange(len(data)), "held out"
        if len(test) == len(data) > 1:
            test, split = data.split(_TEST_SHARE, seed)[1], "seed"
    fit = np.setdiff1d(np.arange(len(data)), test)
    if len(fit) < 2 or len(test) < 1:
        raise ValueError(
            f"data must have at least 2 episodes to fit probes on and 1 to test them on, got {len(fit)} and "
            f"{len(test)} of {data.path}"
        )
    return fit, test, split


def _quantities(
    data: Dataset, names: Sequence[str], episodes: Sequence[int], rows: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What the columns say of some rows of episodes, one after the other: (N, C) by name."""
    found: dict[str, np.ndarray] = {}
    for name in names:
        parts = [data.column(name, episode) for episode in episodes]
        for episode, part in zip(episodes, parts, strict=True):
            if not np.isfinite(part).all():
                row = int(np.flatnonzero(~np.isfinite(part).all(1))[0])
                raise ValueError(
                    f"column {name!r} of episode {episode} of {data.path} is not finite at row {row}: leave the column "
                    "out with columns=, or repair the data"
                )
        states = np.concatenate([part[index] for part, index in zip(parts, rows, strict=True)])
        found |= envs.factors(data.metadata.get("env_id"), states) if name == "state" else {name: states}
    return found


def _standardised(
    fit: dict[str, np.ndarray], test: dict[str, np.ndarray]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Targets of fit and test by name, by the fit's mean and standard deviation, and what was left out as constant."""
    targets, notes = {}, []
    for name, y in fit.items():
        varies = np.minimum(np.ptp(y, axis=0), np.ptp(test[name], axis=0)) > 1e-9 * (1 + np.abs(y).max(0))
        if not varies.all():
            which = f" {', '.join(map(str, np.flatnonzero(~varies)))}" if varies.any() else ""
            notes.append(f"left out, for it is constant: {name}{which}")
        if varies.any():
            mean, std = y[:, varies].mean(0), y[:, varies].std(0)
            targets[name] = (y[:, varies] - mean) / std, (test[name][:, varies] - mean) / std
    if not targets:
        raise ValueError(f"states must vary to be probed, but {', '.join(fit)} are constant in fit or test frames")
    return targets, notes


# ----------------------------------------------------------------------------------------------------------- probes


def _linear(
    z: np.ndarray, targets: dict[str, np.ndarray], z_test: np.ndarray, learn: np.ndarray
) -> dict[str, np.ndarray]:
    """Ridge regression of each target; its strength is the one that does best on rows outside `learn`."""
    y = np.concatenate(list(targets.values()), axis=1)
    trials = (ridge(z[learn], y[learn], z[~learn]) - y[~learn]) ** 2
    final = ridge(z, y, z_test)
    found, first = {}, 0
    for name, target in targets.items():
        own = slice(first, first := first + target.shape[1])
        found[name] = final[trials[..., own].mean((1, 2)).argmin()][:, own]
    return found


def ridge(z_fit: np.ndarray, y_fit: np.ndarray, z_test: np.ndarray) -> np.ndarray:
    """Ridge regression in float64 from standardised latents (N, D) to (N, C), for each of the penalties.

    In closed form, `(Z'Z + p N I)^-1 Z'y = Z' (ZZ' + p N I)^-1 y`, of which the smaller matrix is decomposed once.

    Returns:
        (penalties, M, C) float64, for z_test (M, D).
    """
    mean, std = z_fit.mean(0, dtype=np.float64), z_fit.std(0, dtype=np.float64)
    std[std == 0] = 1
    fit, test, centre = (z_fit - mean) / std, (z_test - mean) / std, y_fit.mean(0)
    if fit.shape[1] <= len(fit):
        values, vectors = np.linalg.eigh(fit.T @ fit)
        left, right = test @ vectors, vectors.T @ (fit.T @ (y_fit - centre))
    else:
        values, vectors = np.linalg.eigh(fit @ fit.T)
        left, right = test @ fit.T @ vectors, vectors.T @ (y_fit - centre)
    scales = np.clip(values, 0, None) + len(fit) * _PENALTIES[:, None]  # (penalties, eigenvalues)
    return left @ (right / scales[..., None]) + centre


def _mlp(z: np.ndarray, y: np.ndarray, z_test: np.ndarray, learn: np.ndarray, seed: int) -> np.ndarray:
    """An MLP with two hidden layers, of the epoch that does best on rows outside `learn`."""
    import torch
    from torch import nn

    mean, std = z.mean(0), z.std(0)
    std[std == 0] = 1
    inputs, test = (torch.from_numpy(((part - mean) / std).astype(np.float32)) for part in (z, z_test))
    truth = torch.from_numpy(y.astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(z.shape[1], _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(),
            nn.Linear(_HIDDEN, y.shape[1]),
        )  # fmt: skip
        optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS)
        rows = torch.from_numpy(np.flatnonzero(learn))
        batch = min(_BATCH, max(16, len(rows) // 16))
        stop = torch.from_numpy(~learn)
        best, since, predicted = math.inf, 0, truth[:0]
        for _ in range(_EPOCHS):
            for some in rows[torch.randperm(len(rows))].split(batch):
                optimiser.zero_grad()
                (network(inputs[some]) - truth[some]).square().mean().backward()
                optimiser.step()
            schedule.step()
            with torch.no_grad():
                loss = (network(inputs[stop]) - truth[stop]).square().mean().item()
                if loss < best:
                    best, since, predicted = loss, 0, network(test)
                elif (since := since + 1) == _PATIENCE:
                    break
    return predicted.numpy().astype(np.float64)


# ----------------------------------------------------------------------------------------------------------- scores


def _score(predicted: np.ndarray, truth: np.ndarray, starts: np.ndarray) -> Score:
    """Of predictions (M, C) of the frames of episodes that begin at `starts`, one after the other."""
    squares = (predicted - truth) ** 2
    counts = np.diff([*starts, len(truth)])
    each = np.add.reduceat(squares.mean(1), starts) / counts
    # Sums (episodes, 6, C) that correlations are made of, also of all episodes but one.
    terms = [np.ones_like(truth), predicted, truth, predicted**2, truth**2, predicted * truth]
    sums = np.add.reduceat(np.stack(terms, axis=1), starts)
    r, n = _pearson(sums.sum(0)).mean(), len(starts)
    without = _pearson(sums.sum(0) - sums).mean(-1) if n > 1 else None
    return Score(
        mse=float(each.mean()),
        mse_std=float(each.std()) if n > 1 else None,
        r=float(r),
        r_std=None if without is None else float(np.sqrt((n - 1) * without.var())),
        r2=float((1 - squares.mean(0) / truth.var(0)).mean()),
    )


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlations (..., C) from sums (..., 6, C) of 1, x, y, xx, yy, xy; 0 where x or y does not vary."""
    means = sums / sums[..., :1, :]
    x, y, xx, yy, xy = np.moveaxis(means[..., 1:, :], -2, 0)
    scale = np.sqrt(np.clip(xx - x * x, 0, None) * np.clip(yy - y * y, 0, None))
    return np.where(scale > 1e-12, (xy - x * y) / np.where(scale > 1e-12, scale, 1), 0.0)


def _pair(value: float | None, std: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if std is None else f"{value:.3f} ± {std:.3f}"


def _cells(score: Score | None) -> tuple[str, str]:
    return ("-", "-") if score is None else (_pair(score.mse, score.mse_std), _pair(score.r, score.r_std))
