"""Planning problems, and what stable-worldmodel's CEMSolver made of them: `swm_cem.npz`.

    PEER_PYTHON tests/golden/swm_cem.py NAME     records under NAME ("0.1.1", "main") what the library in use there does

20 problems with small models whose weights are made by rule, in float64: horizon 1 to 8, 1 to 4 environments, history 1
to 3. Of each are kept the elites of every iteration (indices, ascending) and the final actions; models, pictures, and
the noise, which is `torch.Generator`'s, are made again. The release has no context of several frames, nor has it costs
for several environments at once, so its problems are those of one frame, environment by environment.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "parity")]
import rule

from lewm.config import ModelConfig, configure
from lewm.model_file import tensor_shapes
from lewm.pixels import MEAN, STD

FILE = Path(__file__).with_suffix(".npz")
COUNT, SAMPLES, ITERATIONS, ELITES = 20, 64, 10, 8
ARCHITECTURE = {
    "image_size": 16,
    "patch_size": 8,
    "encoder_dim": 16,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "encoder_mlp": 32,
    "embed_dim": 8,
    "projector_hidden": 32,
    "predictor_dim": 16,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "predictor_head_dim": 8,
    "predictor_mlp": 32,
    "action_block": 2,
    "action_smoothed": 4,
    "action_hidden": 16,
}


@dataclass
class Problem:
    """One of them; arrays are NumPy, pictures as a policy passes them."""

    config: ModelConfig
    weights: dict[str, np.ndarray]
    horizon: int
    environments: int
    batch_size: int
    seed: int
    info: dict[str, np.ndarray]
    init: np.ndarray | None


def problem(number: int, name: str) -> Problem:
    """Problem 0 to 19; `name` is that of what solves it."""
    rng = np.random.default_rng(number)
    history, environments, horizon = 1 + number % 3, 1 + number // 2 % 4, 1 + number % 8
    config, _ = configure("tiny", 2, ARCHITECTURE | {"history": history})
    made = {key: np.asarray(rule._tensor(number, key, shape)) for key, shape in tensor_shapes(config).items()}
    weights = {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in made.items()}
    frames = history if name == "main" else 1
    info = {
        "pixels": normalised(pictures(rng, environments, frames)),
        "goal": normalised(pictures(rng, environments, 1)),
        "action": np.zeros((environments, 1, config.action_dim)),
    }
    if frames > 1:
        info["action_history"] = rng.normal(size=(environments, frames - 1, config.block_dim))
    init = rng.normal(size=(environments, rng.integers(1, horizon + 1), config.block_dim)) if number % 2 else None
    batch_size = int(rng.integers(1, environments + 1)) if name == "main" else 1
    return Problem(config, weights, horizon, environments, batch_size, 100 + number, info, init)


def pictures(rng: np.random.Generator, environments: int, frames: int) -> np.ndarray:
    """(E, T, 16, 16, 3) uint8, coarse."""
    return rng.integers(0, 256, (environments, frames, 4, 4, 3), dtype=np.uint8).repeat(4, 2).repeat(4, 3)


def normalised(frames: np.ndarray) -> np.ndarray:
    """(E, T, H, W, 3) uint8 -> (E, T, 3, H, W) float32, as torchvision's ToDtype and Normalize make them."""
    scaled = frames.astype(np.float32) / np.float32(255)
    return np.moveaxis((scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32), -1, 2).copy()


def theirs(case: Problem, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Their model and solver for a problem, configured, and its dict, all in float64."""
    import gymnasium
    import torch
    from benches.peer_cem import build, in_float64, solver_of
    from stable_worldmodel import PlanConfig

    c = case.config
    model = in_float64(build({**vars(c), "block_dim": c.block_dim}, case.weights))
    solver = solver_of(
        model,
        batch_size=case.batch_size,
        num_samples=SAMPLES,
        n_steps=ITERATIONS,
        topk=ELITES,
        seed=case.seed,
        **options,
    )
    space = gymnasium.spaces.Box(-1, 1, (case.environments, c.action_dim))
    settings = PlanConfig(horizon=case.horizon, receding_horizon=case.horizon, action_block=c.action_block)
    solver.configure(action_space=space, n_envs=case.environments, config=settings)
    return model, solver, {key: torch.from_numpy(value) for key, value in case.info.items()}


def main(name: str) -> None:
    import torch
    from benches.peer_cem import Elites

    kept = dict(np.load(FILE)) if FILE.exists() else {}
    for number in range(COUNT):
        case, elites = problem(number, name), Elites()
        _, solver, info = theirs(case, callbacks=[elites])
        found = solver.solve(info, None if case.init is None else torch.from_numpy(case.init.copy()))
        kept[f"{name} {number} elites"] = elites.found.astype(np.uint8)
        kept[f"{name} {number} actions"] = found["actions"].double().numpy()
    np.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    main(sys.argv[1])
