"""The `cpu` back end: the Rust engine behind the array interface of `lewm.Model`. torch is never imported."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lewm._core import Engine, Objective, noise
from lewm.cache import remembered
from lewm.config import ModelConfig
from lewm.model_file import check_weights

_PRECISIONS = ("float32", "bfloat16", "int8")
# What a precision must reach against float32 on first-iteration candidates to be taken by itself.
SPEARMAN, OVERLAP = 0.999, 0.95
# How wide a predictor must be for int8 to be taken by itself: on Zen 5 it is 1.4 times as fast as bfloat16 with 192
# (preset paper), 1.25 times with 128 and 1.13 times with 96, which is not worth its errors.
INT8_WIDTH = 128


class CpuBackend:
    """Weights folded and packed for this processor, and the four things planning asks of them.

    Frames are encoded in float32. The rollout is in `precision`: `bfloat16` rounds the factors of matrix products and
    sums them in float32; `int8` rounds those of most products to 8 bits and the rest to bfloat16. "auto" takes the
    fastest on this processor (`fastest_first`) in which the model ranks candidates as in float32 (`agreement`), int8
    for wide predictors only (`INT8_WIDTH`).
    """

    name = "cpu"

    def __init__(self, config: ModelConfig, weights: dict[str, Any], precision: str, cpu: str | None = None) -> None:
        if precision not in ("auto", *_PRECISIONS):
            known = ", ".join(_PRECISIONS)
            raise ValueError(f'precision must be auto or one of {known} with backend "cpu", got {precision!r}')
        self.config = config
        self._weights = {name: to_numpy(value) for name, value in weights.items()}
        check_weights(config, self._weights)
        self._engine = self._made("float32" if precision == "auto" else precision, cpu)
        if precision == "auto":
            for faster in fastest_first(lambda name: self._made(name, cpu)):
                if faster == "int8" and config.predictor_dim < INT8_WIDTH:
                    continue
                fast = self._made(faster, cpu)
                spearman, overlap = agreement(self._engine, fast, config)
                if spearman >= SPEARMAN and overlap >= OVERLAP:
                    self._engine = fast
                    break

    def _made(self, precision: str, cpu: str | None) -> Engine:
        floats = {name: value for name, value in self._weights.items() if value.dtype == np.float32}
        return Engine(engine_config(self.config), floats, precision=precision, cpu=cpu)

    @property
    def precision(self) -> str:
        """What the rollout computes in."""
        return self._engine.precision

    @property
    def engine(self) -> Engine:
        """The Rust engine."""
        return self._engine

    def weights(self) -> dict[str, np.ndarray]:
        """The state dict, float32, in NumPy."""
        return dict(self._weights)

    def encode(self, frames: Any) -> np.ndarray:
        """(..., size, size, 3) uint8 -> (..., D)."""
        frames = to_numpy(frames)
        flat = np.ascontiguousarray(frames.reshape(-1, *frames.shape[-3:]))
        return self._engine.encode(flat).reshape(*frames.shape[:-3], -1)

    def rollout(self, z: Any, candidates: Any, past_actions: Any | None) -> np.ndarray:
        """(E, T, D), (E, S, H, A), (E, T - 1, A) -> (E, S, T + H, D)."""
        past = None if past_actions is None else _floats(past_actions)
        return self._engine.rollout(_floats(z), _floats(candidates), past)

    def costs(self, z: Any, goal: Any, candidates: Any, past_actions: Any | None, cost: str = "latent") -> np.ndarray:
        """Terminal costs (E, S) of candidates, without keeping the trajectories; `cost` is "latent" or "distance"."""
        past = None if past_actions is None else _floats(past_actions)
        return self._engine.costs(_floats(z), _floats(goal), _floats(candidates), past, cost)

    def objective(self, z: Any, goal: Any, past_actions: Any | None, cost: str = "latent") -> Objective:
        """The costs of candidates as the Rust planner calls them."""
        past = None if past_actions is None else _floats(past_actions)
        return self._engine.objective(_floats(z), _floats(goal), past, cost)

    def distance(self, z: Any, goal: Any) -> np.ndarray:
        """The distance head's estimates (...) for latents (..., D) and goals that broadcast to them."""
        apart = self._head("distance_head", z) - self._head("distance_head", goal)
        return np.linalg.norm(apart, axis=-1)

    def prior(self, z: Any, goal: Any) -> np.ndarray:
        """The action prior's blocks (E, P, A), normalised, for latents and goals (E, D)."""
        found = self._head("action_prior", np.concatenate([_floats(z), _floats(goal)], axis=-1))
        return found.reshape(len(found), -1, self.config.block_dim)

    def _head(self, name: str, rows: Any) -> np.ndarray:
        rows = _floats(rows)
        return self._engine.head(name, rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:-1], -1)


def to_numpy(value: Any) -> np.ndarray:
    """An array of an array or a tensor on any device; floats become float32."""
    array = value.detach().float().cpu().numpy() if _is_float_tensor(value) else np.asarray(value)
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def engine_config(config: ModelConfig) -> dict[str, int]:
    """The numbers and flags that the Rust engine needs of a configuration."""
    numbers = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: value for name, value in numbers.items() if isinstance(value, int)} | {"block_dim": config.block_dim}


def agreement(exact: Engine, fast: Engine, config: ModelConfig) -> tuple[float, float]:
    """How alike two engines rank first-iteration candidates: Spearman's rho and the overlap of the best tenth.

    300 candidates from N(0, 1) after each of two latents from N(0, 1), which is what SIGReg makes latents be; the mean
    of both. A function of the two models alone.
    """
    rows, samples, horizon = 2, 300, 5
    latents = noise(0, np.arange(rows), 0, 0, 2, config.embed_dim)
    blocks = noise(1, np.arange(rows), 0, 0, samples, horizon * config.block_dim)
    blocks = blocks.reshape(rows, samples, horizon, config.block_dim)
    z, goal = np.ascontiguousarray(latents[:, :1]), np.ascontiguousarray(latents[:, 1])
    ranks = [np.argsort(np.argsort(engine.costs(z, goal, blocks), axis=1), axis=1) for engine in (exact, fast)]
    best = [ranks[0] < samples // 10, ranks[1] < samples // 10]
    spearman = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
    overlap = (best[0] & best[1]).sum(1) / (samples // 10)
    return float(np.mean(spearman)), float(np.mean(overlap))


def fastest_first(made: Callable[[str], Engine]) -> list[str]:
    """The precisions that this processor multiplies faster than float32, each faster than those behind it."""
    ladder = ["float32"]
    for name in _PRECISIONS[1:]:
        if is_faster(name, ladder[-1], made):
            ladder.append(name)
    return ladder[:0:-1]


def is_faster(precision: str, than: str, made: Callable[[str], Engine]) -> bool:
    """Whether this processor multiplies in one precision faster than in another: measured once and remembered.

    bfloat16 is faster than float32 by a factor of 2 on some processors and slower by as much on others. What was
    measured is kept in the user's cache folder, so that the same model file plans alike in every process.
    """
    sets = [Engine.instruction_sets(name) for name in (precision, than)]
    if not all(sets):
        return False
    name = f"{_processor()} {precision} {sets[0][0]} {than} {sets[1][0]}"
    return bool(remembered("faster.json", name, lambda: made(precision).peak() > 1.2 * made(than).peak()))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
        return " ".join(facts.get(key, "") for key in ("model name", "cpu family\t", "model\t\t", "stepping")).strip()
    except OSError:
        return platform.processor()


def _floats(value: Any) -> np.ndarray:
    return np.ascontiguousarray(to_numpy(value), dtype=np.float32)


def _is_float_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and value.is_floating_point()
