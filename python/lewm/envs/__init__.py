"""Environments. Importing this package is cheap; importing `lewm` registers them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

# By id: module and class, and the longest episode in steps, which is that of the published data.
_ENVIRONMENTS = {
    "lewm/TwoRoom-v0": ("two_room", "TwoRoom", 100),
    "lewm/PushT-v0": ("push_t", "PushT", 100),
    "lewm/Reacher-v0": ("reacher", "Reacher", 200),
    "lewm/Cube-v0": ("cube", "Cube", 200),
}


def known(env_id: str | None) -> bool:
    """Whether an environment is one of these."""
    return env_id in _ENVIRONMENTS


def factors(env_id: str | None, states: np.ndarray) -> dict[str, np.ndarray]:
    """What a model of an environment should know of its states (N, S): (N, C) by name, angles as sine and cosine.

    {"state": states} where the environment is not one of these.

    Raises:
        ValueError: The environment has states of another width.
    """
    if not known(env_id):
        return {"state": states}
    module, name, _ = _ENVIRONMENTS[env_id or ""]
    if name == "TwoRoom":
        return {"agent": states}
    task = getattr(importlib.import_module(f"lewm.envs.{module}"), name)
    if states.shape[1] != task.state_dim:
        raise ValueError(f"states of {env_id} must be (N, {task.state_dim}), got {states.shape}")
    return task.factors(states)


def simulator(env_id: str, **settings: Any) -> Any:
    """What moves and draws one environment, without a goal: a `lewm.envs.task.Task`, or `two_room.TwoRoom`.

    Raises:
        ValueError: The environment is not one of these.
    """
    if env_id not in _ENVIRONMENTS:
        raise ValueError(f"env_id must be one of {', '.join(_ENVIRONMENTS)}, got {env_id!r}")
    module, name, _ = _ENVIRONMENTS[env_id]
    return getattr(importlib.import_module(f"lewm.envs.{module}"), name)(**settings)


def register() -> None:
    """Registers `lewm/...` with gymnasium; calling it again does nothing.

    What an environment needs is imported when it is made.
    """
    from gymnasium.envs import registration

    for env_id, (module, name, steps) in _ENVIRONMENTS.items():
        if env_id not in registration.registry:
            registration.register(
                env_id,
                entry_point=f"lewm.envs.{module}:{name}Env",
                vector_entry_point=f"lewm.envs.{module}:{name}VectorEnv",
                max_episode_steps=steps,
            )
