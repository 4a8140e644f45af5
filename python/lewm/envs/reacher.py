"""Reacher: an arm with two joints in the plane that has to take a posture.

The model, the dynamics and (with `look="official"`) the picture are those of dm_control's suite, `reacher`, on MuJoCo
alone; the goal is stable-worldmodel's `qpos_match`: both joints within 0.05 rad. Nothing in the picture shows the goal.

A state is (shoulder, wrist, their velocities), in rad and rad/s. The shoulder turns freely and is not wrapped: a goal
of 0 is not reached at 2 pi. The wrist has limits, soft ones, at 160 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lewm.envs.rendering import Engine, EngineTask
from lewm.envs.task import TaskEnv
from lewm.envs.vector import TaskVectorEnv

SUCCESS_ANGLE = 0.05
WRIST_LIMIT = math.radians(160)
_WRIST_OVERSHOOT = 0.5  # how far a fast arm may push the soft limit; 0.16 was seen
_SPEED_LIMIT = 50.0  # rad/s that a state may have; full torque reaches 6
_UPPER_ARM, _FOREARM = 0.12, 0.12  # m; the forearm ends at the finger
_SUBSTEPS = 2
# The expert's. Of 108 settings tried these reached drawn goals soonest, in 20 steps as the median.
_STIFFNESS, _DAMPING = np.array([2.0, 1.0]), np.array([0.1, 0.0])
_TRIES = 40


class _ReacherEngine(Engine):
    @classmethod
    def make(cls, look: str) -> Engine:
        import mujoco

        file = Path(__file__).parent / "assets" / "reacher.xml"
        return cls(mujoco.MjModel.from_xml_path(str(file)), "fixed", look)


class Reacher(EngineTask):
    """The reacher. Action: torques of shoulder and wrist, in multiples of 0.05 Nm; a step is 0.04 s.

    Recoloured is the forearm; teleported are both joints, velocities stay.

    Args:
        look: "official" draws dm_control's picture; "light" the same without shadows and reflections.
    """

    name = "lewm/Reacher-v0"
    unit = "rad"
    state_dim = 4
    action_low = np.full(2, -1, dtype=np.float32)
    action_high = np.full(2, 1, dtype=np.float32)
    seconds = 0.04
    engine_type: ClassVar[type[Engine]] = _ReacherEngine
    repaint = ("hand", (0.2, 0.75, 0.3, 1.0))

    def draw_state(self, rng: np.random.Generator) -> np.ndarray:
        """As the suite draws one: shoulder and wrist uniform, at rest."""
        return np.array([rng.uniform(-np.pi, np.pi), rng.uniform(-WRIST_LIMIT, WRIST_LIMIT), 0.0, 0.0])

    def draw_goal(self, rng: np.random.Generator, state: np.ndarray) -> np.ndarray:
        """Any posture at rest, wherever the start is; only the posture counts."""
        return self.draw_state(rng)

    def check_state(self, state: np.ndarray) -> str | None:
        """What is wrong with a finite state (4,), None if the simulator can take it."""
        if abs(state[1]) > WRIST_LIMIT + _WRIST_OVERSHOOT:
            return f"the wrist must be within {WRIST_LIMIT + _WRIST_OVERSHOOT:.2f} rad of 0"
        if max(abs(state[2:])) > _SPEED_LIMIT:
            return f"velocities must be within {_SPEED_LIMIT:g} rad/s"
        return None

    def step(self, action: np.ndarray) -> None:
        """Moves on by two substeps of 0.02 s under torques (2,)."""
        import mujoco

        engine = self._engine
        model, data = engine.model, engine.data
        mujoco.mj_resetData(model, data)  # `place` without mj_forward, which mj_step does by itself
        data.qpos[:], data.qvel[:], data.ctrl[:] = self._state[:2], self._state[2:], action
        mujoco.mj_step(model, data, _SUBSTEPS)
        self._state = engine.state()[:4]

    def distance(self, state: np.ndarray, goal: np.ndarray) -> float:
        """The larger of the two joints' differences."""
        return float(max(abs(state[:2] - goal[:2])))

    def success(self, state: np.ndarray, goal: np.ndarray) -> bool:
        """Whether both joints are less than 0.05 rad from the goal's."""
        return self.distance(state, goal) < SUCCESS_ANGLE

    @classmethod
    def factors(cls, states: np.ndarray) -> dict[str, np.ndarray]:
        """Joints as sine and cosine, the finger's place in metres, velocities."""
        shoulder, wrist = states[:, 0], states[:, 1]
        both = shoulder + wrist
        x = _UPPER_ARM * np.cos(shoulder) + _FOREARM * np.cos(both)
        y = _UPPER_ARM * np.sin(shoulder) + _FOREARM * np.sin(both)
        return {
            "shoulder": np.stack([np.sin(shoulder), np.cos(shoulder)], axis=1),
            "wrist": np.stack([np.sin(wrist), np.cos(wrist)], axis=1),
            "finger": np.stack([x, y], axis=1),
            "velocity": states[:, 2:],
        }

    def teleported(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`state` with joints as an episode's start has them."""
        return np.concatenate([self.draw_state(rng)[:2], state[2:]])

    def _place(self) -> None:
        self._engine.place(np.concatenate([self._state, np.zeros(2)]))


class ReacherEnv(TaskEnv):
    """One reacher, registered as `lewm/Reacher-v0`; see `TaskEnv` and `Reacher`."""

    metadata: ClassVar[dict[str, Any]] = {**TaskEnv.metadata, "render_fps": round(1 / Reacher.seconds)}
    task_type = Reacher


class ReacherVectorEnv(TaskVectorEnv):
    """N reachers: the vector form of `lewm/Reacher-v0`; see `TaskVectorEnv` and `Reacher`."""

    metadata: ClassVar[dict[str, Any]] = {**TaskVectorEnv.metadata, "render_fps": ReacherEnv.metadata["render_fps"]}
    task_type = Reacher

    def expert_policy(self) -> ExpertPolicy:
        """The behaviour policy that `lewm.collect(..., policy="expert")` uses."""
        return ExpertPolicy()


class ExpertPolicy:
    """Moves to the goal, and then from posture to posture, with noise.

    A torque is a spring and a damper towards a target posture, plus N(0, xi^2) with xi drawn from U(0, action_noise)
    for each episode, clipped. The first target is the goal; once both joints are within 0.05 rad of a target, or after
    40 steps, the next one is drawn as the task draws a start. So an episode that goes on after success never rests,
    and its 25 steps reach further than those of random torques, which mostly cancel out.

    Args:
        action_noise: Largest standard deviation of the noise.
        seed: Of the policy's own generator, used by calls that bring none.
    """

    def __init__(self, action_noise: float = 0.6, seed: int = 0) -> None:
        if not action_noise >= 0:
            raise ValueError(f"action_noise must be at least 0, got {action_noise}")
        self.action_noise = action_noise
        self._rng = np.random.default_rng(seed)
        self.begin(0)

    def begin(self, n: int) -> None:
        """Forgets the episodes so far; n new ones begin."""
        self._targets = np.full((n, 2), np.nan)
        self._noise = np.zeros(n)
        self._tries = np.zeros(n, dtype=np.int64)

    def __call__(
        self, states: np.ndarray, goals: np.ndarray, rngs: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """Actions (N, 2) float32 for states and goals (N, 4); row i draws from `rngs[i]`."""
        rngs = [self._rng] * len(states) if rngs is None else rngs
        if len(states) != len(self._targets):
            self.begin(len(states))
        noise = np.empty((len(states), 2))
        for i, rng in enumerate(rngs):
            if np.isnan(self._targets[i, 0]):
                self._targets[i], self._noise[i], self._tries[i] = goals[i, :2], rng.uniform(0, self.action_noise), 0
            self._tries[i] += 1
            if self._tries[i] > _TRIES or max(abs(states[i, :2] - self._targets[i])) < SUCCESS_ANGLE:
                target = rng.uniform([-np.pi, -WRIST_LIMIT], [np.pi, WRIST_LIMIT])
                self._targets[i], self._tries[i] = target, 0
            noise[i] = rng.normal(size=2)
        torques = _STIFFNESS * (self._targets - states[:, :2]) - _DAMPING * states[:, 2:]
        return np.clip(torques + self._noise[:, None] * noise, -1, 1).astype(np.float32)
