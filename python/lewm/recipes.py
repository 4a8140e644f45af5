"""Recipes: from nothing to an evaluated model of one of the paper's tasks, and what to expect of it.

A recipe is plain data, at `paper` size for a GPU (the official hyper-parameters and amounts of data) or at a smaller
one for a CPU. `lewm train --recipe pusht` follows it; in Python:

    recipe = lewm.recipe("pusht")
    model = recipe.train(recipe.collect())
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lewm.collector import collect
from lewm.config import configure
from lewm.data import Dataset
from lewm.evaluation import PLANNERS, PROTOCOLS, command_of
from lewm.planner import Planner

__all__ = ["RECIPES", "Expected", "Recipe", "Trial", "recipe"]


@dataclass(frozen=True)
class Expected:
    """What a trial gave where it was measured, one training seed for each file.

    Attributes:
        solved: Lowest and highest share of the pairs.
        seconds: Longest training, heads not counted.
        machine: Where.
        results: Files in the repository's `results/` that say so.
    """

    solved: tuple[float, float]
    seconds: float
    machine: str
    results: tuple[str, ...]

    def __str__(self) -> str:
        low, high = (f"{share:.1%}" for share in self.solved)
        rate, seeds = low if low == high else f"{low} to {high}", len(self.results)
        return (
            f"{rate} solved ({seeds} training seed{'s' * (seeds > 1)}), up to {self.seconds:,.0f} s of "
            f"training on {self.machine}"
        )


@dataclass(frozen=True)
class Trial:
    """One way to evaluate the model.

    Attributes:
        protocol: A name in `lewm.PROTOCOLS`.
        planner: Who searches.
        execute: Blocks of each plan to execute.
        shrink: Whether each search looks ahead only as far as the plan before it still goes.
        pairs: How many.
        expected: None until it was measured.
    """

    protocol: str
    planner: Planner
    execute: int = 5
    shrink: bool = False
    pairs: int = 200
    expected: Expected | None = None

    def __str__(self) -> str:
        search = f"{type(self.planner).__name__} {self.planner.samples} x {self.planner.iterations}"
        return f"{self.pairs} pairs, {search}: {self.expected or 'not measured yet'}"

    def command(self, run: str | os.PathLike[str]) -> str:
        """What evaluates the model of a run folder so, and writes the result beside it."""
        words = command_of(PROTOCOLS[self.protocol], self.pairs, self.planner, self.execute, 0, False, self.shrink)
        out = shlex.join(["--out", str(Path(run, f"{self.protocol}.json"))])
        return f"{words.replace('MODEL', shlex.quote(os.fspath(run)), 1)} {out}"


@dataclass(frozen=True)
class Recipe:
    """How a model of one task is made; all of it is the same for every training seed, the data too.

    Attributes:
        name: The task.
        size: Preset.
        env_id: Environment.
        episodes: To collect, in pictures of the size that the preset takes.
        trials: How to evaluate it.
        overrides: Settings of model and training that are not the preset's.
        policy: Who acts.
        env_kwargs: Further arguments for the environment.
        max_steps: Longest episode; None for the environment's limit.
    """

    name: str
    size: str
    env_id: str
    episodes: int
    trials: tuple[Trial, ...]
    overrides: dict[str, Any] = field(default_factory=dict)
    policy: str = "expert"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None

    @property
    def folder(self) -> Path:
        """Where everything goes by default."""
        return Path("runs", f"{self.name}-{self.size}")

    @property
    def store(self) -> Path:
        """Where the data go by default."""
        return self.folder / "data.lewm"

    @property
    def pixels(self) -> int:
        """Side of a picture."""
        return configure(self.size, 1, self.overrides)[0].image_size

    def run(self, seed: int) -> Path:
        """Where a training goes by default."""
        return self.folder / f"seed-{seed}"

    def collect(self, path: str | os.PathLike[str] | None = None, **settings: Any) -> Dataset:
        """Collects the data, or those that are missing, as `lewm.collect` does.

        Args:
            path: Of the store; `store` by default.
            **settings: Further arguments of `lewm.collect`.
        """
        return collect(
            self.env_id,
            path or self.store,
            **{
                "episodes": self.episodes,
                "size": self.pixels,
                "policy": self.policy,
                "env_kwargs": self.env_kwargs,
                "max_steps": self.max_steps,
                **settings,
            },
        )

    def train(self, data: Dataset | str | os.PathLike[str], *, seed: int = 0, out: Any = None, **settings: Any) -> Any:
        """Trains as `lewm.train` does, and returns what that returns.

        Args:
            data: The data collected, or others of the same environment.
            seed: Of everything random.
            out: Run folder; `run(seed)` by default.
            **settings: Further arguments of `lewm.train`.

        Raises:
            ValueError: The data are of another environment; and as `lewm.train` does.
        """
        from lewm.trainer import train

        data = data if isinstance(data, Dataset) else Dataset(data)
        env_id = data.metadata.get("env_id", self.env_id)
        if env_id != self.env_id:
            raise ValueError(f"data must be of {self.env_id}, as the recipe {self.name}, got {env_id}")
        return train(data, preset=self.size, seed=seed, out=out or self.run(seed), **{**self.overrides, **settings})

    def __str__(self) -> str:
        def listed(settings: dict[str, Any]) -> str:
            return "".join(f", {name}={json.dumps(value)}" for name, value in settings.items())

        rows = {
            "data": f"{self.episodes:,} episodes of {self.env_id}, {self.pixels} px, policy {self.policy}"
            f"{listed(self.env_kwargs)}{f', {self.max_steps} steps' if self.max_steps else ''}",
            "training": f"preset {self.size}{listed(self.overrides)}",
            **{trial.protocol: str(trial) for trial in self.trials},
        }
        width = max(map(len, rows))
        lines = (f"  {name:{width}}  {text}" for name, text in rows.items())
        return "\n".join([f"--recipe {self.name} --size {self.size}", *lines])


def _paper(name: str, env_id: str, episodes: int, *protocols: str, **settings: Any) -> Recipe:
    """The paper's recipe (appendices D to F): the preset's numbers, whose planner is the official code's."""
    return Recipe(name, "paper", env_id, episodes, tuple(Trial(p, PLANNERS["paper"]) for p in protocols), **settings)


def _seeds(name: str) -> tuple[str, ...]:
    return tuple(f"{name}-{seed}.json" for seed in range(3))


_ON_A_CPU = "two cores of an AMD EPYC"
_ON_A_BUSY_CPU = "one core of an AMD EPYC that others were using"
# Shadows and reflections cost a CPU many times what the rest of the picture does.
_LIGHT = {"look": "light"}
# Where the block begins anywhere, it tells episodes apart while it lies still, and a small model never sees the pusher
# (benches/README.md).
_PLAY: dict[str, Any] = {"policy": "play", "env_kwargs": {"start_rule": "mark"}}
_PUSHES = Trial("pusht-25-50-strict", replace(PLANNERS["icem"], samples=300), execute=1, shrink=True, pairs=400)

# By task; the size for a GPU first, then the one for a CPU. At paper size there are as many episodes as the paper has;
# its PushT data are others' (DINO-WM), its reacher's by a policy that was trained (SAC).
RECIPES: dict[str, dict[str, Recipe]] = {
    "two-room": {
        # A history of 1 is what the paper says; the released checkpoint has 3.
        "paper": _paper(
            "two-room", "lewm/TwoRoom-v0", 10_000, "two-room-25-50", "two-room-100-150", overrides={"history": 1}
        ),
        "tiny": Recipe(
            "two-room",
            "tiny",
            "lewm/TwoRoom-v0",
            300,
            (
                Trial(
                    "two-room-25-50",
                    PLANNERS["tiny"],
                    pairs=400,
                    expected=Expected((0.9975, 0.9975), 108.5, _ON_A_CPU, _seeds("two-room-25-50-tiny-heads")),
                ),
                Trial(
                    "two-room-100-150",
                    PLANNERS["tiny"],
                    pairs=400,
                    expected=Expected((0.965, 0.9925), 108.5, _ON_A_CPU, _seeds("two-room-100-150-tiny-heads")),
                ),
            ),
            overrides={"distance_head": True, "action_prior": True},
        ),
    },
    "pusht": {
        "paper": _paper("pusht", "lewm/PushT-v0", 20_000, "pusht-25-50", **_PLAY),
        "small": Recipe(
            "pusht",
            "small",
            "lewm/PushT-v0",
            4_000,
            (
                replace(
                    _PUSHES,
                    expected=Expected((0.5475, 0.575), 862.4, _ON_A_CPU, _seeds("pusht-25-50-strict-small")),
                ),
            ),
            overrides={"steps": 5600},
            **_PLAY,
        ),
    },
    # With what the paper does without: a third loss term, and the prior that searches start from.
    "pusht-terms": {
        "small": Recipe(
            "pusht-terms",
            "small",
            "lewm/PushT-v0",
            3_000,
            (
                replace(
                    _PUSHES,
                    expected=Expected((0.595, 0.625), 832.8, _ON_A_CPU, _seeds("pusht-25-50-strict-small-terms")),
                ),
            ),
            overrides={"inverse_dynamics": 0.3, "sigreg_weight": 0.09, "action_prior": True},
            # The longer the episodes, the farther does the block come: two terms alone then find the pusher too late.
            max_steps=200,
            **_PLAY,
        ),
    },
    "reacher": {
        "paper": _paper("reacher", "lewm/Reacher-v0", 10_000, "reacher-25-50", env_kwargs=_LIGHT),
        "tiny": Recipe(
            "reacher",
            "tiny",
            "lewm/Reacher-v0",
            300,
            (
                Trial(
                    "reacher-25-50",
                    replace(PLANNERS["small"], horizon=3),
                    execute=3,
                    expected=Expected((0.52, 0.52), 381.0, _ON_A_BUSY_CPU, ("reacher-25-50-tiny-0.json",)),
                ),
            ),
            # One frame does not show how fast the arm turns; with a small lambda only the shoulder is learnt.
            overrides={
                "history": 3,
                "embed_dim": 96,
                "sigreg_weight": 0.3,
                "steps": 4000,
                "action_prior": True,
            },
            env_kwargs=_LIGHT,
        ),
    },
    "cube": {
        "paper": _paper("cube", "lewm/Cube-v0", 10_000, "cube-25-50", env_kwargs=_LIGHT),
        "tiny": Recipe(
            "cube",
            "tiny",
            "lewm/Cube-v0",
            400,
            (
                Trial(
                    "cube-25-50-strict",
                    replace(PLANNERS["tiny"], horizon=3),
                    execute=3,
                    pairs=100,
                    expected=Expected((0.26, 0.26), 2603.9, _ON_A_BUSY_CPU, ("cube-25-50-strict-tiny-0.json",)),
                ),
                Trial(
                    "cube-25-50",
                    replace(PLANNERS["tiny"], horizon=3),
                    execute=3,
                    pairs=100,
                    expected=Expected((0.48, 0.48), 2603.9, _ON_A_BUSY_CPU, ("cube-25-50-tiny-0.json",)),
                ),
            ),
            # With larger patches neither the cube nor the gripper's opening is learnt.
            overrides={
                "patch_size": 4,
                "embed_dim": 64,
                "sigreg_weight": 0.5,
                "steps": 2000,
                "distance_head": True,
                "action_prior": True,
            },
            env_kwargs=_LIGHT,
        ),
    },
}


def recipe(name: str, size: str | None = None, *, device: str | None = None) -> Recipe:
    """The recipe of a task.

    Args:
        name: A task in `RECIPES`.
        size: One of its sizes; "paper" for a CUDA device by default, if there is that, else the one for a CPU.
        device: What it is for; by default CUDA where there is one.

    Raises:
        ValueError: There is no such recipe, or not of that size.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    sizes = RECIPES[name]
    if size is None:
        import torch

        gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
        size = list(sizes)[0 if gpu else -1]
    if size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)} for the recipe {name}, got {size!r}")
    return sizes[size]
