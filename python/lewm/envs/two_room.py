"""TwoRoom: a dot that has to reach a goal, often through the one door of a wall.

The environment of the LeWorldModel paper, with the dynamics and the picture of stable-worldmodel's `swm/TwoRoom-v1`
in its default variation, written anew on NumPy alone. One set of functions moves and draws N agents at once;
`TwoRoomEnv` uses it with N = 1 and `TwoRoomVectorEnv` with N environments, so both do the same to the last bit.

Positions are (x, y) in units of the 224-pixel picture, x to the right and y down, whatever size is drawn.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.lib.stride_tricks import sliding_window_view

from lewm.envs.task import TERMINAL_SIZE, half_blocks

EXTENT = 224  # the picture's side, in units
SPEED = 5.0  # units per step and axis at action 1
SUCCESS_DISTANCE = 16.0
DOOR = np.array([112.0, 49.0])  # its centre; the wall is the line x = 112
GOAL_RULES = ("other-room", "anywhere")

_FREE = (14.0, 210.0)  # between the border lines
_START = (14.0, 209.0)  # what a reset draws from
_REACH = (21.0, 203.0)  # where a step can end: the dot's radius of 7 away from the border lines
_WALL = (100.0, 124.0)  # the wall (107 to 117) and the dot's radius on either side
_DOOR_SPAN = (33.25, 64.75)  # the y at which the wall lets the dot pass
_MIN_PATH = 25 * SPEED  # "other-room": at least 25 steps through the door's centre
_DOT_STD = 7.0
_DOT_RADIUS = 42.0  # beyond it the dot's opacity is less than half a unit in the last place of a float32 1
_CHUNK = 32  # pictures blended at a time: few enough that the work stays in the cache
_FRAME_SECONDS = 0.1  # a live terminal shows 10 steps a second


# ---------------------------------------------------------------------------------------------------------- dynamics


def step_states(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Moves N agents by one step.

    The step is `5 * clip(action, -1, 1)`; then the border holds the dot, and then the wall, which is decided by the
    side that the agent comes from (x < 112 is left) and by the y it arrives at.

    Args:
        states: (N, 2) float64, positions.
        actions: (N, 2), taken as float32, as the action space and the trajectory store have them.

    Returns:
        (N, 2) float64, the new positions; `states` is left as it is.
    """
    moves = np.clip(np.asarray(actions, dtype=np.float32), -1.0, 1.0).astype(np.float64)
    after = np.clip(states + SPEED * moves, *_REACH)
    x = after[:, 0]
    closed = ~_in_door(after)
    left = states[:, 0] < DOOR[0]
    x[closed & left & (x > _WALL[0])] = _WALL[0] - 0.5
    x[closed & ~left & (x < _WALL[1])] = _WALL[1] + 0.5
    return after


def _in_door(states: np.ndarray) -> np.ndarray:
    return (states[..., 1] >= _DOOR_SPAN[0]) & (states[..., 1] <= _DOOR_SPAN[1])


def _near_wall(state: np.ndarray) -> bool:
    return _WALL[0] <= state[0] <= _WALL[1]


def _draw_state(rng: np.random.Generator) -> np.ndarray:
    while _near_wall(state := rng.uniform(*_START, size=2)):
        pass
    return state


def _draw_goal(rng: np.random.Generator, state: np.ndarray, rule: str) -> np.ndarray:
    while True:
        goal = rng.uniform(*_START, size=2)
        if rule == "anywhere":
            return goal
        other = (goal[0] < DOOR[0]) != (state[0] < DOOR[0]) and not _near_wall(goal)
        if other and math.dist(state, DOOR) + math.dist(DOOR, goal) >= _MIN_PATH:
            return goal


def _distance(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    return np.hypot(states[:, 0] - goals[:, 0], states[:, 1] - goals[:, 1])


# ----------------------------------------------------------------------------------------------------------- picture


def render_states(states: np.ndarray, size: int = EXTENT, recoloured: bool = False) -> np.ndarray:
    """Draws N pictures at once: white rooms, black walls, the agent as a red Gaussian dot; the goal is not drawn.

    At 224 pixels this is the official picture, rounding aside. At any other size walls and dot are averaged over
    the area that each pixel covers, which is the official picture area-resized (but for the few pixels in which
    the dot touches a wall). A picture does not depend on the others drawn with it.

    Args:
        states: (N, 2), positions between 0 and 224.
        size: side of the pictures in pixels, at least 8.
        recoloured: draw the agent in blue.

    Returns:
        (N, size, size, 3) uint8.

    Raises:
        ValueError: `states` has another shape or lies outside the picture, or `size` is too small.
    """
    size = _whole(size, "size", 8)
    states = np.asarray(states, dtype=np.float64)
    if states.ndim != 2 or states.shape[1] != 2:
        raise ValueError(f"states has shape {states.shape}, but render_states wants (N, 2)")
    if not ((states >= 0) & (states <= EXTENT)).all():  # also false for NaN
        raise ValueError(f"states must lie between 0 and {EXTENT}, but one of them does not")

    canvas = _canvas(size)
    frames = np.empty((len(states), size, size, 3), dtype=np.uint8)
    frames[:] = canvas.rgb
    side, (dot, *others) = canvas.patch, (2, 0, 1) if recoloured else (0, 1, 2)
    patches = sliding_window_view(frames, (side, side, 3), axis=(1, 2, 3), writeable=True)
    background = sliding_window_view(canvas.grey, (side, side))
    for first in range(0, len(states), _CHUNK):
        rows = np.arange(first, min(first + _CHUNK, len(states)))
        x, opacity_x = _profile(states[rows, 0], size, side)
        y, opacity_y = _profile(states[rows, 1], size, side)
        opacity = opacity_y[:, :, None] * opacity_x[:, None, :]
        rest = background[y, x] * (1 - opacity)
        patch = np.empty((*rest.shape, 3), dtype=np.uint8)
        patch[..., dot] = rest + 255 * opacity  # float to uint8 rounds down, as the official code does
        patch[..., others[0]] = patch[..., others[1]] = rest
        patches[rows, y, x, 0] = patch
    return frames


def frame(state: np.ndarray, size: int = EXTENT) -> np.ndarray:
    """Draws one picture, for example of a goal: `render_states` for one state (2,); gives (size, size, 3) uint8."""
    return render_states(np.asarray(state, dtype=np.float64)[None], size)[0]


class _Canvas(NamedTuple):
    grey: np.ndarray  # (size, size) float32, 0 to 255: the picture without the agent
    rgb: np.ndarray  # (size, size, 3) uint8, the same
    patch: int  # side of the square, in pixels, that holds the dot wherever it is


@functools.lru_cache(maxsize=16)
def _canvas(size: int) -> _Canvas:
    black = np.zeros((EXTENT, EXTENT))
    black[:, 107:118] = 1  # official pixels: coordinates 107 to 117, both ends included
    black[35:64, 107:118] = 0
    for line in (slice(10, 14), slice(210, 214)):
        black[line] = black[:, line] = 1
    covered = _area_average(_area_average(black, size).T, size).T
    grey = np.rint(255 * (1 - covered))
    rgb = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    return _Canvas(grey.astype(np.float32), rgb, min(size, math.ceil(2 * _DOT_RADIUS * size / EXTENT) + 3))


def _area_average(rows: np.ndarray, size: int) -> np.ndarray:
    """Averages (N, 224) rows over the stretch that each of `size` pixels covers."""
    # Differences of a running sum, not a matrix product: BLAS may round a row differently in another batch.
    edges = np.linspace(0, EXTENT, size + 1)
    whole = edges.astype(np.intp)
    padded = np.pad(rows, ((0, 0), (0, 1)))
    before = np.pad(np.cumsum(rows, axis=1), ((0, 0), (1, 0)))
    return np.diff(before[:, whole] + (edges - whole) * padded[:, whole]) * (size / EXTENT)


def _profile(centres: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One axis of the dot: the first pixel (N,) of each patch, and its opacity there (N, side) float32."""
    offset = np.arange(EXTENT) - centres[:, None]
    profile = np.exp(offset**2 * (-0.5 / _DOT_STD**2))
    profile /= profile.max(axis=1, keepdims=True)  # as the official code: the brightest pixel at 224 is fully red
    first = np.clip((((centres + 0.5) * size / EXTENT).astype(np.intp) - side // 2), 0, size - side)
    opacity = _area_average(profile, size).astype(np.float32)
    return first, sliding_window_view(opacity, side, axis=1)[np.arange(len(centres)), first]


class TwoRoom:
    """One TwoRoom with the methods of `lewm.envs.task.Task` that move and draw; a state is (2,).

    Attributes:
        recoloured: Whether pictures show the agent in blue.
    """

    recoloured = False

    def set_state(self, state: np.ndarray) -> None:
        """Puts the agent there."""
        self._states = np.array(state, dtype=np.float64)[None]

    def get_state(self) -> np.ndarray:
        """(2,) float64 where the agent is."""
        return self._states[0].copy()

    def step(self, action: np.ndarray) -> None:
        """Moves on by one step with an action (2,)."""
        self._states = step_states(self._states, np.asarray(action)[None])

    def render(self, size: int) -> np.ndarray:
        """The picture (size, size, 3) uint8."""
        return render_states(self._states, size, self.recoloured)[0]

    def teleported(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random place (2,) where an episode could start."""
        return _draw_state(rng)

    def close(self) -> None:
        """There is nothing to free."""


# ------------------------------------------------------------------------------------------------------ environments


class TwoRoomEnv(gymnasium.Env):
    """One TwoRoom environment, registered as `lewm/TwoRoom-v0`.

    Action: Box(-1, 1, (2,), float32), the step along x and y in multiples of 5 units; values beyond are clipped.
    Observation: `obs_type="state"` gives Box(0, 224, (10,), float32): agent, goal and three door centres, x and y
    each (there is one door; the other two are 0). `obs_type="pixels"` gives Box(0, 255, (size, size, 3), uint8).
    Reward: always 0. An episode terminates with success, when a step ends less than 16 units from the goal.
    Info: `state` and `goal_state` (2,) float64, `success` bool, `distance` float, in units.

    `reset(options={"state": (2,), "goal": (2,)})` starts from and aims at any place; what is not given is drawn.
    A state must be one that the agent can be in: between the border lines, and not in the wall outside its door.

    Args:
        render_mode: "rgb_array" makes `render` give a (size, size, 3) uint8 picture; "human" draws each step as
            coloured text on standard output, which needs no window; None draws nothing.
        size: side of the picture in pixels.
        obs_type: "state" or "pixels".
        goal_rule: how a reset draws a goal. "other-room": in the other room and at least 25 steps away through the
            door, which gives the mean episode length that the paper reports for its data (92). "anywhere": uniform
            in the picture, as the released stable-worldmodel does, where the rule above is commented out.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": round(1 / _FRAME_SECONDS)}  # noqa: RUF012 (gymnasium's convention)

    def __init__(
        self,
        render_mode: str | None = None,
        size: int = EXTENT,
        obs_type: str = "state",
        goal_rule: str = "other-room",
    ) -> None:
        self.render_mode = _choice(render_mode, "render_mode", (None, "rgb_array", "human"))
        self.size = _whole(size, "size", 8)
        self.obs_type = _choice(obs_type, "obs_type", ("state", "pixels"))
        self.goal_rule = _choice(goal_rule, "goal_rule", GOAL_RULES)
        self.observation_space, self.action_space = _spaces(self.size, obs_type)
        self._states = self._goals = np.empty((0, 2))
        self._drawn = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; see the class for `options`.

        Raises:
            ValueError: an unknown option, or a state or goal that is no such place.
        """
        super().reset(seed=seed)
        state, goal = _placed(options, (2,))
        state = _draw_state(self.np_random) if state is None else state
        goal = _draw_goal(self.np_random, state, self.goal_rule) if goal is None else goal
        self._states, self._goals = state[None], goal[None]
        return self._outcome()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves the agent; gives observation, reward 0.0, terminated (success), truncated (False) and info.

        Raises:
            ValueError: an action of another shape, or one that is not finite.
            gymnasium.error.ResetNeeded: there was no `reset` yet.
        """
        self._states = _moved(self._states, action, self.action_space.shape)
        observation, info = self._outcome()
        return observation, 0.0, info["success"], False, info

    def render(self) -> np.ndarray | None:
        """The picture (size, size, 3) uint8 in mode "rgb_array"; in mode "human" draws it and gives None."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() does nothing without a render_mode: make(..., render_mode="rgb_array")')
            return None
        if self.render_mode == "rgb_array":
            return render_states(_started(self._states), self.size)[0]
        self._draw()
        return None

    def _outcome(self) -> tuple[np.ndarray, dict[str, Any]]:
        if self.render_mode == "human":
            self._draw()
        info = {key: values[0] for key, values in _info(self._states, self._goals).items()}
        info |= {"success": bool(info["success"]), "distance": float(info["distance"])}
        return _observe(self._states, self._goals, self.size, self.obs_type)[0], info

    def _draw(self) -> None:
        (x, y), (goal_x, goal_y) = _started(self._states)[0], self._goals[0]
        picture = half_blocks(render_states(self._states, TERMINAL_SIZE)[0])
        # A live terminal shows one picture that moves, anything else gets one after the other.
        live = sys.stdout.isatty()
        up = f"\x1b[{TERMINAL_SIZE // 2 + 1}A" if live and self._drawn else ""
        print(f"{up}{picture}\nagent {x:5.1f} {y:5.1f}   goal {goal_x:5.1f} {goal_y:5.1f}", flush=True)
        self._drawn = True
        if live:
            time.sleep(_FRAME_SECONDS)


class TwoRoomVectorEnv(VectorEnv):
    """N TwoRoom environments moved and drawn together: the vector form of `lewm/TwoRoom-v0`.

    Environment i does what a `TwoRoomEnv` reset with `seed + i` does, bit for bit. Actions are (N, 2), observations
    (N, size, size, 3) uint8 or (N, 10) float32, info holds `state` and `goal_state` (N, 2) float64, `success` (N,)
    bool and `distance` (N,) float64.

    Args:
        num_envs: N.
        size: side of the pictures in pixels.
        obs_type: "pixels" or "state".
        goal_rule: as in `TwoRoomEnv`.
        max_episode_steps: truncates an episode after so many steps; None never does.
        autoreset_mode: `NEXT_STEP`: the step after an episode's last one starts the next episode and ignores the
            action. `DISABLED`: there are no resets but one's own, and an agent goes on moving after success.
        render_mode: "rgb_array" makes `render` give a tuple of N pictures.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 64,
        obs_type: str = "pixels",
        goal_rule: str = "other-room",
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = _whole(num_envs, "num_envs", 1)
        self.size = _whole(size, "size", 8)
        self.obs_type = _choice(obs_type, "obs_type", ("pixels", "state"))
        self.goal_rule = _choice(goal_rule, "goal_rule", GOAL_RULES)
        self.max_episode_steps = max_episode_steps
        if max_episode_steps is not None:
            _whole(max_episode_steps, "max_episode_steps", 1)
        self.render_mode = _choice(render_mode, "render_mode", (None, "rgb_array"))
        mode = _choice(autoreset_mode, "autoreset_mode", (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED))
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = _spaces(self.size, obs_type)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []
        self._states = self._goals = np.empty((0, 2))

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every environment.

        Args:
            seed: environment i is seeded with `seed + i`, or with `seed[i]`; None goes on with what is there.
            options: "state" and "goal", (N, 2) each; what is not given is drawn.

        Raises:
            ValueError: an unknown option, a state or goal that is no such place, or seeds of another number than N.
        """
        state, goal = _placed(options, (self.num_envs, 2))
        if seed is not None or not self._rngs:
            if isinstance(seed, int | np.integer):
                seed = [int(seed) + i for i in range(self.num_envs)]
            seeds: list[int | None] = [None] * self.num_envs if seed is None else list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"seed has {len(seeds)} entries, but there are {self.num_envs} environments")
            self._rngs = [seeding.np_random(each)[0] for each in seeds]
        self._states = np.stack([_draw_state(rng) for rng in self._rngs]) if state is None else state
        self._goals = self._draw_goals(range(self.num_envs)) if goal is None else goal
        self._steps = np.zeros(self.num_envs, dtype=np.int64)
        self._over = np.zeros(self.num_envs, dtype=bool)
        return self._observation(), _info(self._states, self._goals)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Moves every agent; gives observations, rewards (N,) of 0.0, terminated (N,), truncated (N,) and info.

        Raises:
            ValueError: actions of another shape, or not finite.
            gymnasium.error.ResetNeeded: there was no `reset` yet.
        """
        self._states = _moved(self._states, actions, self.action_space.shape)
        self._steps += 1
        fresh = np.zeros(self.num_envs, dtype=bool)
        if self.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP and self._over.any():
            fresh = self._over
            rows = np.flatnonzero(fresh)
            self._states[rows] = [_draw_state(self._rngs[i]) for i in rows]
            self._goals = self._goals.copy()
            self._goals[rows] = self._draw_goals(rows)
            self._steps[rows] = 0
        info = _info(self._states, self._goals)
        terminated = info["success"] & ~fresh
        truncated = np.zeros(self.num_envs, dtype=bool)
        if self.max_episode_steps is not None:
            truncated = self._steps >= self.max_episode_steps
        self._over = terminated | truncated
        return self._observation(), np.zeros(self.num_envs), terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """N pictures (size, size, 3) uint8 in mode "rgb_array", else None."""
        return tuple(render_states(_started(self._states), self.size)) if self.render_mode == "rgb_array" else None

    def expert_policy(self) -> ExpertPolicy:
        """The behaviour policy that `lewm.collect(..., policy="expert")` uses."""
        return ExpertPolicy()

    def _draw_goals(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.stack([_draw_goal(self._rngs[i], self._states[i], self.goal_rule) for i in rows])

    def _observation(self) -> np.ndarray:
        return _observe(self._states, self._goals, self.size, self.obs_type)


class ExpertPolicy:
    """The noisy heuristic behind the paper's TwoRoom data: straight to the door, then straight to the goal.

    While the goal is in the other room and the door's centre is more than 10.5 units away, an action is the unit
    vector to the door's centre, else the unit vector to the goal; to it is added N(0, action_noise^2) per axis, and
    the sum is clipped to [-1, 1].

    Args:
        action_noise: standard deviation of the noise; the data's is 2.
        seed: of the policy's own generator, used by calls that bring none.
    """

    def __init__(self, action_noise: float = 2.0, seed: int = 0) -> None:
        if not (math.isfinite(action_noise) and action_noise >= 0):
            raise ValueError(f"action_noise is {action_noise}, but must be a number of at least 0")
        self.action_noise = action_noise
        self._rng = np.random.default_rng(seed)

    def __call__(
        self, states: np.ndarray, goals: np.ndarray, rngs: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """Chooses N actions.

        Args:
            states: (N, 2), where the agents are.
            goals: (N, 2), where they are going.
            rngs: N generators, one for each row, if a row must not depend on the others; else the policy's own.

        Returns:
            (N, 2) float32 within [-1, 1].
        """
        states, goals = np.asarray(states, dtype=np.float64), np.asarray(goals, dtype=np.float64)
        apart = (states[:, 0] > DOOR[0]) != (goals[:, 0] > DOOR[0])
        detour = apart & (_distance(states, np.broadcast_to(DOOR, states.shape)) > 10.5)
        way = np.where(detour[:, None], DOOR, goals) - states
        length = np.hypot(way[:, :1], way[:, 1:])
        way = np.divide(way, length, out=np.zeros_like(way), where=length > 1e-8)
        if rngs is None:
            noise = self._rng.standard_normal(way.shape)
        else:
            noise = np.stack([rng.standard_normal(2) for rng in rngs])
        return np.clip(way + self.action_noise * noise, -1.0, 1.0).astype(np.float32)


# -------------------------------------------------------------------------------------------------- shared by the two


def _spaces(size: int, obs_type: str) -> tuple[spaces.Box, spaces.Box]:
    action = spaces.Box(-1.0, 1.0, (2,), np.float32)
    if obs_type == "pixels":
        return spaces.Box(0, 255, (size, size, 3), np.uint8), action
    return spaces.Box(0.0, float(EXTENT), (10,), np.float32), action


def _observe(states: np.ndarray, goals: np.ndarray, size: int, obs_type: str) -> np.ndarray:
    if obs_type == "pixels":
        return render_states(states, size)
    observation = np.zeros((len(states), 10), dtype=np.float32)
    observation[:, :6] = np.hstack([states, goals, np.broadcast_to(DOOR, states.shape)])
    return observation


def _info(states: np.ndarray, goals: np.ndarray) -> dict[str, np.ndarray]:
    distance = _distance(states, goals)
    success = distance < SUCCESS_DISTANCE
    return {"state": states.copy(), "goal_state": goals.copy(), "success": success, "distance": distance}


def _started(states: np.ndarray) -> np.ndarray:
    if len(states) == 0:
        raise gymnasium.error.ResetNeeded("TwoRoom was stepped or drawn before its first reset()")
    return states


def _moved(states: np.ndarray, actions: Any, shape: tuple[int, ...]) -> np.ndarray:
    states = _started(states)
    actions = np.asarray(actions, dtype=np.float32)
    if actions.shape != shape:
        raise ValueError(f"the action has shape {actions.shape}, but must have {shape}")
    if not np.isfinite(actions).all():
        raise ValueError("the action holds NaN or infinity, but must be finite")
    return step_states(states, actions.reshape(-1, 2))


def _placed(options: dict[str, Any] | None, shape: tuple[int, ...]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Checks reset options; gives state and goal as float64 of `shape`, None for one that is not there."""
    options = options or {}
    unknown = sorted(set(options) - {"state", "goal"})
    if unknown:
        raise ValueError(f"options has the unknown key {unknown[0]!r}; reset knows 'state' and 'goal'")
    places = []
    for key in ("state", "goal"):
        place = options.get(key)
        if place is not None:
            place = np.array(place, dtype=np.float64)
            if place.shape != shape:
                raise ValueError(f"options[{key!r}] has shape {place.shape}, but must have {shape}")
            if not ((place >= _FREE[0]) & (place <= _FREE[1])).all():  # also false for NaN
                raise ValueError(
                    f"options[{key!r}] is {place.tolist()}, but x and y must lie between {_FREE[0]} and {_FREE[1]}"
                )
        places.append(place)
    state, goal = places
    # A goal may lie in the wall (goal_rule "anywhere" draws such): it can be met from beside it. An agent may not.
    if state is not None and ((state[..., 0] > _WALL[0]) & (state[..., 0] < _WALL[1]) & ~_in_door(state)).any():
        raise ValueError(
            f"options['state'] is {state.tolist()}: in the wall, where x between {_WALL[0]} and {_WALL[1]} is "
            f"open only for y between {_DOOR_SPAN[0]} and {_DOOR_SPAN[1]}"
        )
    return state, goal


def _whole(value: int, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    return int(value)


def _choice(value: Any, name: str, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(str, known))}")
    return value
