"""What a simulated task has to offer, and the gymnasium environments that are made of any task.

A `Task` moves, draws and judges; `TaskEnv` is one of it behind gymnasium's interface, `TaskVectorEnv` (vector.py) many,
in worker processes. All of them use the same words: a state is everything that the simulator needs to go on from there,
a goal is a state too, of which only what `success` looks at counts.
"""

from __future__ import annotations

import abc
import importlib
import sys
import time
from types import ModuleType
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from lewm.checks import integer


class Task(abc.ABC):
    """One simulated task. Subclasses are made without arguments, or with keyword arguments that JSON can hold.

    Attributes:
        name: In messages.
        unit: Of `distance`.
        state_dim: Width S of a state.
        action_low, action_high: (A,) float32 bounds of an action; what is beyond them is clipped.
        seconds: Of simulated time in a step.
        sizes: Smallest and largest side of a picture.
        recoloured: Whether pictures show one object, which the class names, in another colour; to be set at any time.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    state_dim: ClassVar[int]
    action_low: ClassVar[np.ndarray]
    action_high: ClassVar[np.ndarray]
    seconds: ClassVar[float]
    sizes: ClassVar[tuple[int, int]] = (8, 1024)
    recoloured: bool = False

    @abc.abstractmethod
    def draw_state(self, rng: np.random.Generator) -> np.ndarray:
        """A state (S,) to start an episode from."""

    @abc.abstractmethod
    def draw_goal(self, rng: np.random.Generator, state: np.ndarray) -> np.ndarray:
        """A goal (S,) for an episode that starts from `state`."""

    @abc.abstractmethod
    def check_state(self, state: np.ndarray) -> str | None:
        """What is wrong with a finite state (S,), None if the simulator can take it."""

    @abc.abstractmethod
    def set_state(self, state: np.ndarray) -> None:
        """Puts the simulator there, as if it had never been elsewhere."""

    @abc.abstractmethod
    def get_state(self) -> np.ndarray:
        """(S,) float64 where the simulator is; what `set_state` took, if there was no step since."""

    @abc.abstractmethod
    def step(self, action: np.ndarray) -> None:
        """Moves on by one step with an action (A,) float64 within the bounds."""

    @abc.abstractmethod
    def render(self, size: int) -> np.ndarray:
        """The picture (size, size, 3) uint8 of where the simulator is. It does not show the goal."""

    @abc.abstractmethod
    def distance(self, state: np.ndarray, goal: np.ndarray) -> float:
        """How far a state is from a goal, in `unit`; the part of it that `success` looks at."""

    @abc.abstractmethod
    def success(self, state: np.ndarray, goal: np.ndarray) -> bool:
        """Whether a state counts as the goal."""

    def teleported(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A state (S,) like `state`, but with what the class names at a random place."""
        raise NotImplementedError(f"{self.name} has nothing that can be teleported")

    @classmethod
    def factors(cls, states: np.ndarray) -> dict[str, np.ndarray]:
        """What a model should know of states (N, S), for probes: (N, C) by name, angles as sine and cosine."""
        return {"state": states}

    def close(self) -> None:  # noqa: B027 (most tasks have nothing to close)
        """Frees what the garbage collector does not."""


class TaskEnv(gymnasium.Env):
    """One environment of a task.

    Action: Box(low, high, (A,), float32); values beyond are clipped.
    Observation: `obs_type="state"` gives state and goal in one, Box of (2 S,) float64; `obs_type="pixels"` gives
    Box(0, 255, (size, size, 3), uint8).
    Reward: always 0. An episode terminates with success.
    Info: `state` and `goal_state` (S,) float64, `success` bool, `distance` float in the task's unit.

    `reset(options={"state": (S,), "goal": (S,)})` starts from and aims at any state; what is not given is drawn.

    Args:
        render_mode: "rgb_array" makes `render` give a (size, size, 3) uint8 picture; "human" draws each step as
            coloured text on standard output, which needs no window; None draws nothing.
        size: Side of the picture in pixels.
        obs_type: "state" or "pixels".
        **settings: Of the task.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "human"], "render_fps": 10}
    task_type: ClassVar[type[Task]]

    def __init__(
        self, render_mode: str | None = None, size: int = 224, obs_type: str = "state", **settings: Any
    ) -> None:
        self.render_mode = choice("render_mode", render_mode, (None, "rgb_array", "human"))
        self.size = checked_size(self.task_type, size)
        self.obs_type = choice("obs_type", obs_type, ("state", "pixels"))
        self.task = self.task_type(**settings)
        self.observation_space, self.action_space = spaces_of(self.task_type, self.size, obs_type)
        self.goal: np.ndarray | None = None
        self._drawn = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; see the class for `options`.

        Raises:
            ValueError: An unknown option, or a state or goal that the simulator cannot take.
        """
        super().reset(seed=seed)
        self.goal = begin(self.task, self.np_random, *placed(self.task, options, ()))
        return self._outcome()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves on; gives observation, reward 0.0, terminated (success), truncated (False) and info.

        Raises:
            ValueError: An action of another shape, or one that is not finite.
            gymnasium.error.ResetNeeded: There was no `reset` yet.
        """
        self.task.step(clipped(self._started(), action, self.action_space.shape))
        observation, info = self._outcome()
        return observation, 0.0, info["success"], False, info

    def render(self) -> np.ndarray | None:
        """The picture (size, size, 3) uint8 in mode "rgb_array"; in mode "human" draws it and gives None."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() does nothing without a render_mode: make(..., render_mode="rgb_array")')
            return None
        if self.render_mode == "rgb_array":
            return self._started().render(self.size)
        self._draw()
        return None

    def close(self) -> None:
        """Frees the simulator."""
        self.task.close()

    def _started(self) -> Task:
        if self.goal is None:
            raise gymnasium.error.ResetNeeded(f"{self.task.name} was stepped or drawn before its first reset()")
        return self.task

    def _outcome(self) -> tuple[np.ndarray, dict[str, Any]]:
        if self.render_mode == "human":
            self._draw()
        info = judged(self.task, self.goal)
        if self.obs_type == "pixels":
            return self.task.render(self.size), info
        return np.concatenate([info["state"], info["goal_state"]]), info

    def _draw(self) -> None:
        # A live terminal shows one picture that moves, anything else gets one after the other.
        live = sys.stdout.isatty()
        picture = half_blocks(self._started().render(max(self.task.sizes[0], TERMINAL_SIZE)))
        up = f"\x1b[{picture.count(chr(10)) + 1}A" if live and self._drawn else ""
        print(f"{up}{picture}", flush=True)
        self._drawn = True
        if live:
            time.sleep(1 / self.metadata["render_fps"])


# -------------------------------------------------------------------------------------- shared with the vector form

TERMINAL_SIZE = 32  # side of the picture in a terminal, in half blocks


def spaces_of(task: type[Task], size: int, obs_type: str) -> tuple[spaces.Box, spaces.Box]:
    """Observation and action space of one environment."""
    action = spaces.Box(task.action_low, task.action_high, dtype=np.float32)
    if obs_type == "pixels":
        return spaces.Box(0, 255, (size, size, 3), np.uint8), action
    # Hardly a number of a state has a bound: pushers go through walls, joints turn on, limits are soft. Any finite one
    # lies within these, which gymnasium takes without a warning and can sample between; wider ones it cannot.
    most = np.finfo(np.float64).max / 2
    return spaces.Box(-most, most, (2 * task.state_dim,), np.float64), action


def begin(task: Task, rng: np.random.Generator, state: np.ndarray | None, goal: np.ndarray | None) -> np.ndarray:
    """Starts an episode from what is given, else from what is drawn; gives the goal."""
    state = task.draw_state(rng) if state is None else state
    goal = task.draw_goal(rng, state) if goal is None else goal
    task.set_state(state)
    return goal


def judged(task: Task, goal: np.ndarray) -> dict[str, Any]:
    """The info of an environment."""
    state = task.get_state()
    success, distance = bool(task.success(state, goal)), float(task.distance(state, goal))
    return {"state": state, "goal_state": goal.copy(), "success": success, "distance": distance}


def placed(
    task: Task, options: dict[str, Any] | None, lead: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """State and goal of reset options as (*lead, S) float64, None for one that is not there.

    Raises:
        ValueError: An unknown option, or a state or goal that the simulator cannot take.
    """
    options = options or {}
    unknown = sorted(set(options) - {"state", "goal"})
    if unknown:
        raise ValueError(f"options must be among 'state' and 'goal', got {unknown[0]!r}")
    found: list[np.ndarray | None] = []
    for key in ("state", "goal"):
        place = options.get(key)
        if place is not None:
            place = np.array(place, dtype=np.float64)
            if place.shape != (*lead, task.state_dim):
                raise ValueError(f"options[{key!r}] must be of shape {(*lead, task.state_dim)}, got {place.shape}")
            for row in place.reshape(-1, task.state_dim):
                wrong = task.check_state(row) if np.isfinite(row).all() else "it is not finite"
                if wrong:
                    raise ValueError(f"options[{key!r}] must be a state of {task.name}, got {row.tolist()}: {wrong}")
        found.append(place)
    return found[0], found[1]


def clipped(task: Task, action: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """An action, or one for each environment, as float64 within the bounds.

    It goes through float32 as the action space and the trajectory store have it, so that stored actions replay.

    Raises:
        ValueError: It has another shape or is not finite.
    """
    action = np.asarray(action, dtype=np.float32)
    if action.shape != shape:
        raise ValueError(f"action must be of shape {shape}, got {action.shape}")
    if not np.isfinite(action).all():
        raise ValueError("action must be finite, got NaN or infinity")
    return np.clip(action, task.action_low, task.action_high).astype(np.float64)


def checked_size(task: type[Task], size: int) -> int:
    """`size` as a side that the task can draw."""
    low, high = task.sizes
    return integer("size", size, low, high + 1)


def package(name: str, needed_by: str) -> ModuleType:
    """Imports a package of the extra `envs`.

    Raises:
        ModuleNotFoundError: It is not there; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{needed_by} needs {error.name}, which is not installed: pip install "lewm-fast[envs]"', name=error.name
        ) from None


def choice(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    """`value`, one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
    return value


def half_blocks(picture: np.ndarray) -> str:
    """A picture (H, W, 3) as H / 2 lines of coloured half blocks, for a terminal that knows 24-bit colours."""
    lines = []
    for upper, lower in zip(picture[::2].tolist(), picture[1::2].tolist(), strict=True):
        cells = [f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower, strict=True)]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
