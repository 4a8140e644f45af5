"""Closed-loop success by a named protocol, with its interval, the random-policy floor, and all that made the number.

A protocol says what is to be solved: environment, how far the goal is, how many steps there are. Who solves it, model
and planner, is not part of it; the result records both.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from lewm import envs
from lewm._core import __version__
from lewm.checks import integer
from lewm.collector import generate, space_of
from lewm.controller import Controller
from lewm.data import Dataset
from lewm.model_file import write_atomically
from lewm.planner import Planner, plan, planner_of

__all__ = ["PROTOCOLS", "Protocol", "Result", "evaluate", "wilson"]

# Latency is that of single plans; this many are timed.
_TIMED_PLANS = 20
# Candidates scored at once when `batch` is left open: bounds memory, large enough to keep a CPU busy.
_CANDIDATES = 4096
_EPISODES_AT_ONCE = 64
# Episodes to look through for each pair before saying that they are too short.
_TRIES = 20


@dataclass(frozen=True)
class Protocol:
    """What is to be solved (paper App. F.1; version 3 of the paper has 25/50 for every environment).

    Args:
        name: As in `PROTOCOLS`.
        env_id: Gymnasium id of an environment with a vector entry point that resets to any state.
        goal_offset: The goal is the state this many steps after the start, in the same episode.
        budget: Steps to reach it in.
        pairs: Start/goal pairs, one per episode.
        seed: Of the episodes and of the starts within them.
    """

    name: str
    env_id: str
    goal_offset: int = 25
    budget: int = 50
    pairs: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("goal_offset", "budget", "pairs"):
            integer(name, getattr(self, name), 1)
        integer("seed", self.seed, 0, 2**32)


PROTOCOLS = {p.name: p for p in (Protocol("two-room-25-50", "lewm/TwoRoom-v0"),)}


@dataclass(frozen=True)
class Result:
    """What `evaluate` found; `to_dict` is the result JSON.

    Attributes:
        success_rate: Share of the pairs solved, those that were solved at the start included.
        interval: Its 95 % Wilson interval.
        random_floor, random_interval: The same for uniformly random actions on the same pairs.
        n: Number of pairs.
        solved_at_start: Pairs whose start already counts as the goal.
        plan_ms: "p50" and "p95" of the latency of plans for a single environment, in milliseconds.
        protocol, planner: All their fields.
        execute: Blocks of each plan that were executed.
        seed: Of the planner's noise and of the random actions.
        data: Fingerprint of the data set the pairs are from; None if the protocol made its own episodes.
        model_hash, backend, precision: Of the model.
        versions: Of the software, and the CPU.
        seconds: Wall time of the whole evaluation.
        success: Per pair, for paired comparisons with another result of the same protocol.
        random_success: Per pair, of the random policy.
        distance: Per pair, to the goal when it was solved or the budget was spent, in the environment's unit.
        pairs: Per pair, (episode, row of the start).
    """

    success_rate: float
    interval: tuple[float, float]
    random_floor: float
    random_interval: tuple[float, float]
    n: int
    solved_at_start: int
    plan_ms: dict[str, float]
    protocol: dict[str, Any]
    planner: dict[str, Any]
    execute: int
    seed: int
    data: str | None
    model_hash: str
    backend: str
    precision: str
    versions: dict[str, str]
    seconds: float
    success: list[bool]
    random_success: list[bool]
    distance: list[float]
    pairs: list[tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON atomically: the file is the whole result or not there."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2).encode())

    def __str__(self) -> str:
        def rate(share: float, interval: tuple[float, float]) -> str:
            return f"{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

        return (
            f"{self.protocol['name']}: {rate(self.success_rate, self.interval)} of {self.n} pairs solved "
            f"(95 % interval), {self.solved_at_start} of them at the start\n"
            f"random actions: {rate(self.random_floor, self.random_interval)}\n"
            f"one plan ({self.planner['samples']} samples x {self.planner['iterations']} iterations, {self.backend} "
            f"{self.precision}): {self.plan_ms['p50']:.1f} ms p50, {self.plan_ms['p95']:.1f} ms p95"
        )


def evaluate(
    model: Any,
    protocol: str | Protocol = "two-room-25-50",
    *,
    pairs: int | None = None,
    planner: Planner | None = None,
    execute: int | None = None,
    seed: int = 0,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Measures how often the model's plans reach the goal.

    A pair is solved when the environment terminates at any step within the budget, or is at the goal at the start.
    Start and goal are frames `goal_offset` apart in one episode, one pair per episode. By default the episodes are
    the protocol's own: fresh ones of the scripted policy, drawn under a key that no `lewm.collect` can use, so that
    they are held out from any training and the same for every model.

    Args:
        model: What plans.
        protocol: A name in `PROTOCOLS` or a `Protocol`.
        pairs: Number of pairs, by default the protocol's. The first n pairs are the same whatever the number.
        planner: By default the one that the model file names, else `CEM()`.
        execute: Blocks of each plan to execute before the next; by default all.
        seed: Of the planner's noise and of the random actions.
        data: Take the pairs from this `lewm.Dataset` (or its path) instead: if the model was trained on it, from the
            episodes that training held out, else from all. Without `pairs`, as many as there are, up to the protocol's.
        out: Also write the result JSON here.
        batch: Environments planned for at once; changes speed and memory only.
        progress: Called with (pairs done, pairs).

    Raises:
        TypeError, ValueError: An argument is not as described, or model, data and environment do not fit together.
    """
    started = time.perf_counter()
    protocol = _protocol(protocol)
    planner = planner_of(model, planner)
    wanted = protocol.pairs if pairs is None else integer("pairs", pairs, 1)
    batch = max(1, _CANDIDATES // planner.samples) if batch is None else integer("batch", batch, 1)
    integer("seed", seed, 0, 2**64)
    model.require_stats()
    _check_actions(protocol, model)

    if data is None:
        tasks = make_tasks(protocol, wanted, model.config.image_size)
    else:
        tasks = _data_tasks(protocol, data, model, pairs)
    n = len(tasks.episodes)

    solved, at_start, distance = [], [], []
    for begin in range(0, n, batch):
        part = tasks.part(slice(begin, begin + batch))
        ids = np.arange(begin, begin + len(part.episodes))
        act = _planned_actions(model, part.pictures, ids, planner=planner, execute=execute, seed=seed)
        found = _run(protocol, part, "pixels", act)
        for whole, one in zip((solved, at_start, distance), found, strict=True):
            whole.extend(one.tolist())
        if progress is not None:
            progress(len(solved), n)
    random_solved = _run(protocol, tasks, "state", _random_actions(protocol, n, seed))[0].tolist()

    result = Result(
        success_rate=sum(solved) / n,
        interval=wilson(sum(solved), n),
        random_floor=sum(random_solved) / n,
        random_interval=wilson(sum(random_solved), n),
        n=n,
        solved_at_start=sum(at_start),
        plan_ms=_latency(protocol, tasks.part(slice(_TIMED_PLANS)), model, planner, seed),
        protocol=asdict(protocol),
        planner=asdict(planner),
        execute=planner.horizon if execute is None else execute,
        seed=seed,
        data=tasks.fingerprint,
        model_hash=model.hash(),
        backend=model.backend,
        precision=model.precision,
        versions=_versions(),
        seconds=time.perf_counter() - started,
        success=solved,
        random_success=random_solved,
        distance=distance,
        pairs=[(int(episode), int(row)) for episode, row in zip(tasks.episodes, tasks.rows, strict=True)],
    )
    if out is not None:
        result.save(out)
    return result


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate, low and high in [0, 1].

    Raises:
        ValueError: `n` is below 1, or successes are not between 0 and n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n, and n at least 1, got {successes} of {n}")
    z = 1.959963984540054  # two-sided 95 % of the normal distribution
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class Tasks(NamedTuple):
    """n start/goal pairs."""

    states: np.ndarray  # (n, S) of the starts
    goals: np.ndarray  # (n, S) states too
    pictures: np.ndarray  # (n, H, W, 3) uint8 of the goals
    episodes: np.ndarray  # (n,)
    rows: np.ndarray  # (n,) of the starts
    fingerprint: str | None = None

    def part(self, which: slice) -> Tasks:
        """Some of the pairs."""
        return Tasks(*(values[which] for values in self[:5]), fingerprint=self.fingerprint)


def _row(protocol: Protocol, episode: int, frames: int) -> int:
    """The start within an episode, from a key of its own; the goal of the last possible one is the last frame."""
    rng = np.random.default_rng((protocol.seed, episode, protocol.goal_offset))
    return int(rng.integers(frames - protocol.goal_offset))


def make_tasks(protocol: Protocol, n: int, size: int) -> Tasks:
    """Pairs from fresh episodes of the scripted policy; pair i is the same whatever n is."""
    env = _vector_env(protocol, min(n, _EPISODES_AT_ONCE), obs_type="state")
    # NumPy mixes a whole number's 32-bit words, lowest first, without leading zeros and padded to four. Five words that
    # end in zero are therefore the seed of no `collect`, and no data set that it makes can hold these episodes.
    key = (protocol.seed, 0, 0, 0, 0)
    numbers = range(_TRIES * n)
    states, goals, episodes, rows = [], [], [], []
    steps = env.spec.max_episode_steps
    for number, episode in enumerate(generate(env, env.expert_policy(), seed=key, episodes=numbers, max_steps=steps)):
        state = episode.columns["state"]
        if len(state) > protocol.goal_offset:
            row = _row(protocol, number, len(state))
            states.append(state[row])
            goals.append(state[row + protocol.goal_offset])
            episodes.append(number)
            rows.append(row)
        if len(episodes) == n:
            break
    else:
        raise ValueError(
            f"goal_offset must leave enough episodes that are longer, got {protocol.goal_offset}: only "
            f"{len(episodes)} of {len(numbers)} are"
        )
    goals = np.stack(goals)
    # A picture depends on the state alone, so the goals are drawn now rather than every frame on the way.
    pictures, _ = _vector_env(protocol, n, size=size).reset(options={"state": goals, "goal": goals})
    return Tasks(np.stack(states), goals, pictures, np.array(episodes), np.array(rows))


def _data_tasks(protocol: Protocol, data: Any, model: Any, pairs: int | None) -> Tasks:
    """Pairs from a data set, none of them from an episode that the model was trained on."""
    data = data if isinstance(data, Dataset) else Dataset(data)
    if data.metadata.get("env_id") != protocol.env_id:
        raise ValueError(f"data must be of {protocol.env_id}, as the protocol, got {data.metadata.get('env_id')}")
    usable = [e for e in _held_out(data, model) if data.lengths[e] > protocol.goal_offset]
    n = min(len(usable), protocol.pairs) if pairs is None else pairs
    if not 0 < n <= len(usable):
        raise ValueError(
            f"pairs must be at most {len(usable)}, one for each episode of data that was held out from training and "
            f"is longer than {protocol.goal_offset} steps, got {protocol.pairs if pairs is None else pairs}"
        )
    episodes = np.random.default_rng(protocol.seed).permutation(usable)[:n]
    rows = np.array([_row(protocol, int(e), int(data.lengths[e])) for e in episodes])
    places = list(zip(episodes.tolist(), rows.tolist(), strict=True))
    ahead = protocol.goal_offset
    return Tasks(
        states=np.stack([data.column("state", e)[row] for e, row in places]),
        goals=np.stack([data.column("state", e)[row + ahead] for e, row in places]),
        pictures=np.stack([data.frames(e, np.array([row + ahead]))[0] for e, row in places]),
        episodes=episodes,
        rows=rows,
        fingerprint=data.fingerprint(),
    )


def _held_out(data: Dataset, model: Any) -> list[int]:
    """The episodes that the model was not trained on, by its training record."""
    trained = model.meta.get("data") or {}
    recipe = ("env_id", "seed", "policy")
    # A store that grew, or was collected once more by the same recipe, begins with the episodes of the training.
    same_recipe = all(key in trained and trained[key] == data.metadata.get(key) for key in recipe)
    if data.fingerprint() != trained.get("fingerprint") and not same_recipe:
        return list(range(len(data)))
    validation = (model.meta.get("training") or {}).get("validation_episodes") or ()
    return [*(e for e in validation if e < len(data)), *range(trained.get("episodes", len(data)), len(data))]


def _vector_env(protocol: Protocol, n: int, **settings: Any) -> gymnasium.vector.VectorEnv:
    """n environments that go on after success, so that all pairs keep step."""
    envs.register()
    return gymnasium.make_vec(
        protocol.env_id,
        num_envs=n,
        vectorization_mode="vector_entry_point",
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
        **settings,
    )


def _check_actions(protocol: Protocol, model: Any) -> None:
    space = space_of(protocol.env_id)
    if space.shape != (model.config.action_dim,):
        raise ValueError(
            f"model and protocol must have the same actions: {protocol.env_id} has {space}, "
            f"the model {model.config.action_dim} numbers"
        )


def _run(protocol: Protocol, tasks: Tasks, obs_type: str, act: Callable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who was solved, who was at the start, and the last distance, all (n,).

    `act(obs, active, step)` gives actions (n, A_raw); those of pairs no longer active do not count.
    """
    env = _vector_env(protocol, len(tasks.episodes), size=tasks.pictures.shape[1], obs_type=obs_type)
    obs, info = env.reset(options={"state": tasks.states, "goal": tasks.goals})
    at_start, solved, distance = info["success"].copy(), info["success"].copy(), info["distance"].copy()
    for step in range(protocol.budget):
        active = ~solved
        if not active.any():
            break
        obs, _, terminated, _, info = env.step(act(obs, active, step))
        distance[active] = info["distance"][active]
        solved |= terminated
    env.close()
    return solved, at_start, distance


def _planned_actions(model: Any, goals: np.ndarray, env_ids: np.ndarray, **settings: Any) -> Callable:
    """Actions of a controller that drops the pairs that are solved."""
    controller, kept = None, None

    def act(obs: np.ndarray, active: np.ndarray, step: int) -> np.ndarray:
        nonlocal controller, kept
        if controller is None:
            controller = Controller(model, goals[active], env_id=env_ids[active], **settings)
        elif not active[kept].all():
            controller.keep(active[kept])
        kept = active
        actions = np.zeros((len(obs), model.config.action_dim), dtype=np.float32)
        actions[active] = controller(obs[active])
        return actions

    return act


def _random_actions(protocol: Protocol, n: int, seed: int) -> Callable:
    """Uniform over the action space; pair i gets the same actions whatever n is."""
    space = _vector_env(protocol, 1).single_action_space
    shape = (n, protocol.budget, *space.shape)
    actions = np.random.default_rng(seed).uniform(space.low, space.high, shape).astype(np.float32)
    return lambda obs, active, step: actions[:, step]


def _latency(protocol: Protocol, tasks: Tasks, model: Any, planner: Planner, seed: int) -> dict[str, float]:
    """Milliseconds of plans made one at a time, after one to warm up."""
    env = _vector_env(protocol, len(tasks.episodes), size=tasks.pictures.shape[1], obs_type="pixels")
    frames, _ = env.reset(options={"state": tasks.states, "goal": tasks.goals})
    times = [
        plan(frames[i], tasks.pictures[i], model=model, planner=planner, seed=seed, env_ids=[i]).latency_ms
        for i in (0, *range(len(frames)))
    ]
    return {name: float(np.percentile(times[1:], q)) for name, q in (("p50", 50), ("p95", 95))}


def _protocol(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be a Protocol or one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    return PROTOCOLS[protocol]


def _versions() -> dict[str, str]:
    found = {"lewm": __version__, "numpy": np.__version__, "python": platform.python_version()}
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)
    return {**found, "platform": platform.platform(), "cpu": _cpu()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
