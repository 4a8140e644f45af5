"""PushT: a round pusher moves a T-shaped block to a pose, on pymunk.

The environment of the LeWorldModel paper, with the dynamics of stable-worldmodel's `swm/PushT-v1` in its default
variation, written anew: the same bodies in the same order give the same numbers. Lengths are in units of the 512-unit
square, x to the right and y down; angles in radians, clockwise in the picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lewm.envs.task import Task, TaskEnv, choice, package
from lewm.envs.vector import TaskVectorEnv

EXTENT = 512.0  # side of the square, in units
REACH = 100.0  # how far off the target of action 1 is, per axis
AGENT_RADIUS = 15.0
POSITION_TOLERANCE, ANGLE_TOLERANCE = 20.0, math.pi / 9

_SCALE = 30.0  # width of the T's bars; it is 4 of them wide and high
_BAR = ((-60.0, 30.0), (60.0, 30.0), (60.0, 0.0), (-60.0, 0.0))
_STEM = ((-15.0, 30.0), (-15.0, 120.0), (15.0, 120.0), (15.0, 30.0))
_WALLS = (5.0, 506.0)
_SUBSTEPS, _DT = 10, 0.01
_KP, _KV = 100.0, 20.0
_GOAL_POSE = (256.0, 256.0, math.pi / 4)  # of the T that is painted on the floor, whatever the goal is

_FLOOR, _PAINT, _WALL = (255, 255, 255), (144, 238, 144), (211, 211, 211)
_BLOCK, _BLOCK_INSIDE = (119, 136, 153), (143, 163, 184)
_RECOLOURED, _RECOLOURED_INSIDE = (190, 90, 20), (235, 120, 40)
_AGENT, _AGENT_INSIDE = (65, 105, 225), (78, 126, 255)
_CANVAS = 512
_SHIFT, _FINE = 3, 8  # coordinates are given in eighths of a canvas pixel


class PushT(Task):
    """State: agent x, y, block x, y (of the T's upper edge's middle), block angle in [0, 2 pi), agent velocity x, y.

    An action is where the pusher is drawn to, relative to where it is, in multiples of 100 units; a PD controller moves
    it there for 0.1 s. The pusher goes through walls, the block does not. Success: agent and block, 4 numbers, are less
    than 20 units from the goal's, and the block's angle less than 20 degrees.

    Recoloured is the block; teleported are agent and block, the angle and velocities stay.

    Args:
        start_rule: Where a reset puts the block: "anywhere", or on the "mark", the T that is painted on the floor, as
            people do who collect data with a real one.
    """

    name, unit, state_dim, seconds = "lewm/PushT-v0", "units", 7, 0.1
    action_low, action_high = np.full(2, -1.0, np.float32), np.full(2, 1.0, np.float32)

    def __init__(self, start_rule: str = "anywhere") -> None:
        self.start_rule = choice("start_rule", start_rule, ("anywhere", "mark"))
        self._pymunk = package("pymunk", self.name)
        package("cv2", self.name)

    def draw_state(self, rng: np.random.Generator) -> np.ndarray:
        state = self.draw_goal(rng, None)
        if self.start_rule == "mark":
            state[2:5] = _GOAL_POSE
        return state

    def draw_goal(self, rng: np.random.Generator, state: np.ndarray | None) -> np.ndarray:
        agent, block = rng.uniform(50, 450, 2), rng.uniform(100, 400, 2)
        return np.array([*agent, *block, rng.uniform(0, 2 * math.pi), 0.0, 0.0])

    def check_state(self, state: np.ndarray) -> str | None:
        if (np.abs(state[:4] - EXTENT / 2) > EXTENT).any():
            return "positions must be within 256 units of the square"
        return None if (np.abs(state[5:]) <= 1e4).all() else "velocities must be at most 10000 units a second"

    def set_state(self, state: np.ndarray) -> None:
        # A new space each time: contacts that it remembers would change what comes next.
        pymunk = self._pymunk
        self._space = space = pymunk.Space()
        space.damping = 0
        low, high = _WALLS
        corners = ((low, high), (low, low), (high, low), (high, high))
        for a, b in ((0, 1), (1, 2), (2, 3), (0, 3)):
            space.add(pymunk.Segment(space.static_body, corners[a], corners[b], 2))
        self._agent = agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        space.add(agent, pymunk.Circle(agent, AGENT_RADIUS))
        # The official block has its bar's inertia twice, and its centre of gravity is the mean of the two parts'.
        self._block = block = pymunk.Body(1, 2 * pymunk.moment_for_poly(1, _BAR))
        shapes = pymunk.Poly(block, _BAR), pymunk.Poly(block, _STEM)
        block.center_of_gravity = (shapes[0].center_of_gravity + shapes[1].center_of_gravity) / 2
        space.add(block, *shapes)
        agent.velocity, agent.position = tuple(state[5:].tolist()), tuple(state[:2].tolist())
        block.angle = float(state[4])  # before the position, which is not that of the centre of gravity
        block.position = tuple(state[2:4].tolist())
        space.reindex_shapes_for_body(agent)
        space.reindex_shapes_for_body(block)
        # Placing turns the position into the centre of gravity's and back: what was given is kept until the first step.
        self._placed: np.ndarray | None = np.array([*state[:4], state[4] % (2 * math.pi), *state[5:]])

    def get_state(self) -> np.ndarray:
        if self._placed is not None:
            return self._placed.copy()
        agent, block = self._agent, self._block
        return np.array([*agent.position, *block.position, block.angle % (2 * math.pi), *agent.velocity])

    def step(self, action: np.ndarray) -> None:
        self._placed = None
        agent, step = self._agent, self._space.step
        x, y = agent.position
        target_x, target_y = x + REACH * float(action[0]), y + REACH * float(action[1])
        for _ in range(_SUBSTEPS):
            (x, y), (vx, vy) = agent.position, agent.velocity
            agent.velocity = (
                vx + (_KP * (target_x - x) - _KV * vx) * _DT,
                vy + (_KP * (target_y - y) - _KV * vy) * _DT,
            )
            step(_DT)

    def render(self, size: int) -> np.ndarray:
        return picture(self.get_state(), size, self.recoloured)

    def distance(self, state: np.ndarray, goal: np.ndarray) -> float:
        return float(np.linalg.norm(state[:4] - goal[:4]))

    def success(self, state: np.ndarray, goal: np.ndarray) -> bool:
        return self.distance(state, goal) < POSITION_TOLERANCE and turned(state[4], goal[4]) < ANGLE_TOLERANCE

    def teleported(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`state` with agent and block at places as an episode's start has them."""
        return np.concatenate([self.draw_goal(rng, state)[:4], state[4:]])

    @classmethod
    def factors(cls, states: np.ndarray) -> dict[str, np.ndarray]:
        angle = states[:, 4]
        return {
            "agent": states[:, :2], "block": states[:, 2:4], "angle": np.stack([np.sin(angle), np.cos(angle)], 1)
        }  # fmt: skip

    @classmethod
    def moved(cls, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """(N,) whether the block of a goal is elsewhere: by more than 10 units or 0.2 radians."""
        far = np.linalg.norm(states[:, 2:4] - goals[:, 2:4], axis=1) > 10
        return far | (turned(states[:, 4], goals[:, 4]) > 0.2)

    @classmethod
    def blind(cls, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """(N, 2) actions of who does not see the block: straight to where the goal has the pusher."""
        return np.clip((goals[:, :2] - states[:, :2]) / REACH, -1, 1).astype(np.float32)


def turned(a: Any, b: Any) -> Any:
    """The angle between two directions, from 0 to pi."""
    return np.abs((np.asarray(a) - np.asarray(b) + math.pi) % (2 * math.pi) - math.pi)


# ---------------------------------------------------------------------------------------------------------- picture


def picture(state: np.ndarray, size: int, recoloured: bool = False) -> np.ndarray:
    """The picture (size, size, 3) uint8 of a state: a function of its first five numbers; `recoloured` is the block.

    At 224 pixels this is the official picture, but for edges of shapes. At any other size the 512-unit canvas is
    averaged over the area of each pixel.
    """
    frame = _floor(size).copy()
    x, y, angle = state[2:5].tolist()
    cos, sin = math.cos(angle), math.sin(angle)
    shapes = [np.array(corners) @ np.array([[cos, sin], [-sin, cos]]) + (x, y) for corners in (_BAR, _STEM)]
    agent, corners = state[:2], np.concatenate(shapes)
    block = corners.min(0) - 4, corners.max(0) + 4
    disc = agent - AGENT_RADIUS - 2, agent + AGENT_RADIUS + 2
    # Only what shapes lie in is drawn and scaled, in whole pixels of the picture.
    block, disc = _cells(size, *block), _cells(size, *disc)
    colours = (_RECOLOURED, _RECOLOURED_INSIDE) if recoloured else (_BLOCK, _BLOCK_INSIDE)
    if (block[0] < disc[1]).all() and (disc[0] < block[1]).all():
        _draw(frame, (np.minimum(block[0], disc[0]), np.maximum(block[1], disc[1])), shapes, agent, colours)
    else:
        _draw(frame, block, shapes, None, colours)
        _draw(frame, disc, [], agent, colours)
    return frame


def _cells(size: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest rectangle of cells with these corners in it; a cell has whole pixels of canvas and picture."""
    cells = math.gcd(size, _CANVAS)
    scale = cells / _CANVAS
    first, last = np.clip(np.floor(low * scale), 0, cells), np.clip(np.ceil(high * scale), 0, cells)
    return first.astype(int), last.astype(int)


def _draw(
    frame: np.ndarray,
    cells: tuple[np.ndarray, np.ndarray],
    shapes: list[np.ndarray],
    agent: np.ndarray | None,
    colours: tuple[tuple[int, int, int], tuple[int, int, int]],
) -> None:
    import cv2

    (left, top), (right, bottom) = cells
    if left >= right or top >= bottom:
        return
    size, canvas = len(frame), _floor(_CANVAS)
    parts = math.gcd(size, _CANVAS)
    coarse, fine = _CANVAS // parts, size // parts
    part = canvas[top * coarse : bottom * coarse, left * coarse : right * coarse].copy()
    offset = np.array((left * coarse, top * coarse))
    for corners in shapes:
        points = np.rint(_FINE * (corners - offset)).astype(np.int32)
        cv2.fillConvexPoly(part, points, colours[1], cv2.LINE_8, _SHIFT)
        cv2.polylines(part, [points], True, colours[0], 4, cv2.LINE_8, _SHIFT)
    if agent is not None:
        x, y = np.rint(_FINE * (agent - offset)).astype(int).tolist()
        cv2.circle(part, (x, y), round(_FINE * AGENT_RADIUS), _AGENT, -1, cv2.LINE_8, _SHIFT)
        cv2.circle(part, (x, y), round(_FINE * (AGENT_RADIUS - 4)), _AGENT_INSIDE, -1, cv2.LINE_8, _SHIFT)
    shape = int((right - left) * fine), int((bottom - top) * fine)
    frame[top * fine : bottom * fine, left * fine : right * fine] = _scaled(part, shape, size)


def _scaled(part: np.ndarray, shape: tuple[int, int], size: int) -> np.ndarray:
    import cv2

    # The official picture takes the nearest four canvas pixels for each of its own.
    return cv2.resize(part, shape, interpolation=cv2.INTER_LINEAR if size == 224 else cv2.INTER_AREA)


@functools.lru_cache(maxsize=16)
def _floor(size: int) -> np.ndarray:
    """What never moves: the painted T and the walls."""
    import cv2

    if size != _CANVAS:
        return _scaled(_floor(_CANVAS), (size, size), size)
    canvas = np.full((_CANVAS, _CANVAS, 3), _FLOOR, np.uint8)
    x, y, angle = _GOAL_POSE
    cos, sin = math.cos(angle), math.sin(angle)
    for corners in (_BAR, _STEM):
        points = np.array(corners) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
        cv2.fillConvexPoly(canvas, np.rint(_FINE * points).astype(np.int32), _PAINT, cv2.LINE_8, _SHIFT)
    low, high = (int(value) for value in _WALLS)
    for a, b in ((low, low), (high, high)):
        canvas[low - 2 : high + 3, a - 2 : b + 3] = _WALL
        canvas[a - 2 : b + 3, low - 2 : high + 3] = _WALL
    return canvas


# ------------------------------------------------------------------------------------------------------ environments


class PushTEnv(TaskEnv):
    """PushT, registered as `lewm/PushT-v0`: `lewm.envs.task.TaskEnv` of `PushT`."""

    task_type = PushT


class PushTVectorEnv(TaskVectorEnv):
    """N PushT environments: `lewm.envs.vector.TaskVectorEnv` of `PushT`."""

    task_type = PushT

    def expert_policy(self) -> Pusher:
        """The behaviour policy that `lewm.collect(..., policy="expert")` uses."""
        return Pusher()

    def play_policy(self) -> Pusher:
        """The behaviour policy that `lewm.collect(..., policy="play")` uses: it walks about as much as it pushes."""
        return Pusher(wander=0.6)


class Pusher:
    """Pushes the block gently towards the goal's pose, then towards others: goes round it, touches, pushes, lets go.

    A push is chosen among some random places on the block's edge by how it would shift and turn the block towards the
    target, with some chance, and lasts some steps. What it does teaches contacts; where it goes is not the point.

    Args:
        noise: Standard deviation of what is added to each action.
        wander: Chance that, instead of the next push, it walks across the floor for a while, also into the block. What
            only pushes is always near the block, and where the block is says nearly everything about the picture.
    """

    def __init__(self, noise: float = 0.05, wander: float = 0.0) -> None:
        self.noise, self.wander = noise, wander
        self.begin(0)

    def begin(self, n: int) -> None:
        """Forgets: n new episodes follow."""
        self._target = np.full((n, 3), np.nan)  # block x, y, angle
        self._touch, self._normal = np.zeros((n, 2)), np.zeros((n, 2))  # in the block's frame
        self._pushing = np.zeros(n, bool)
        self._left = np.zeros(n, int)  # steps until another push is chosen
        self._depth = np.zeros(n)
        self._walk, self._speed = np.full((n, 2), np.nan), np.zeros(n)  # where to, if anywhere

    def __call__(self, states: np.ndarray, goals: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """(N, 2) float32 actions for states and goals (N, 7), with the chance of N generators."""
        if len(states) != len(self._left):
            self.begin(len(states))
        fresh = np.isnan(self._target[:, 0])
        self._target[fresh] = goals[fresh, 2:5]
        for i in np.flatnonzero(self._left == 0).tolist():
            self._choose(i, states[i], rngs[i])
        self._left -= 1

        agent, origin, angle = states[:, :2], states[:, 2:4], states[:, 4]
        touch, normal = origin + _turn(self._touch, angle), _turn(self._normal, angle)
        centre = origin + _turn(np.broadcast_to(_CENTRE, touch.shape), angle)
        stand = touch + (AGENT_RADIUS + 12) * normal
        self._pushing |= np.linalg.norm(stand - agent, axis=1) < 12
        aim = np.where(
            self._pushing[:, None],
            touch + (AGENT_RADIUS - self._depth)[:, None] * normal,
            _way_round(agent, stand, centre),
        )
        action = np.clip((aim - agent) / REACH, -0.3, 0.3)
        for i in np.flatnonzero(~np.isnan(self._walk[:, 0])).tolist():
            if np.linalg.norm(self._walk[i] - agent[i]) < 30:
                self._walk[i] = rngs[i].uniform(40, 470, 2)
            way = (self._walk[i] - agent[i]) / REACH
            action[i] = way * min(1.0, self._speed[i] / float(np.linalg.norm(way)))
        return (action + self.noise * np.stack([rng.standard_normal(2) for rng in rngs])).astype(np.float32)

    def _choose(self, i: int, state: np.ndarray, rng: np.random.Generator) -> None:
        """A new push for environment i, and now and then a new target; or a walk."""
        self._walk[i] = np.nan
        self._pushing[i] = False
        if self.wander and rng.random() < self.wander:
            self._walk[i], self._speed[i] = rng.uniform(40, 470, 2), rng.uniform(0.2, 0.5)
            self._left[i] = rng.integers(12, 40)
            return
        off, turn = self._target[i, :2] - state[2:4], _signed(self._target[i, 2] - state[4])
        if (np.linalg.norm(off) < 15 and abs(turn) < 0.3) or rng.random() < 0.05:
            self._target[i] = [*rng.uniform(110, 400, 2), rng.uniform(0, 2 * math.pi)]
            off, turn = self._target[i, :2] - state[2:4], _signed(self._target[i, 2] - state[4])
        edge = rng.choice(len(_EDGES), size=12, p=_LENGTHS / _LENGTHS.sum())
        places = _EDGES[edge, 0] + rng.uniform(0.1, 0.9, (12, 1)) * (_EDGES[edge, 1] - _EDGES[edge, 0])
        push, arm = -_turn(_NORMALS[edge], np.full(12, state[4])), _turn(places - _CENTRE, np.full(12, state[4]))
        torque = arm[:, 0] * push[:, 1] - arm[:, 1] * push[:, 0]
        best = np.argmax(push @ off / 40 + 1.5 * turn * torque / 40 + rng.gumbel(size=12))
        self._touch[i], self._normal[i] = places[best], _NORMALS[edge[best]]
        self._left[i] = rng.integers(12, 30)
        self._depth[i] = rng.uniform(6, 18)


_CENTRE = np.array([0.0, 45.0])  # of gravity, in the block's frame
_OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
_EDGES = np.stack([_OUTLINE, np.roll(_OUTLINE, -1, axis=0)], axis=1)
_LENGTHS = np.linalg.norm(_EDGES[:, 1] - _EDGES[:, 0], axis=1)
_NORMALS = np.diff(_EDGES, axis=1)[:, 0][:, ::-1] * (1, -1) / _LENGTHS[:, None]  # outwards


def _turn(points: np.ndarray, angles: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], axis=1)


def _signed(angle: Any) -> Any:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _way_round(agent: np.ndarray, to: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Where to go next on the way to a place beside the block: round it while it is on another side."""
    away, there = agent - centre, to - centre
    now = np.arctan2(away[:, 1], away[:, 0])
    turn = _signed(np.arctan2(there[:, 1], there[:, 0]) - now)
    along = now + np.clip(turn, -0.6, 0.6)
    arc = centre + 115 * np.stack([np.cos(along), np.sin(along)], axis=1)
    return np.where(np.abs(turn)[:, None] > 0.5, arc, to)
