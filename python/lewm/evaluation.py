"""Closed-loop success by a named protocol, with its interval, the random-policy floor, and all that made the number.

A protocol says what is to be solved: environment, how far the goal is, how many steps there are. Who solves it, model
and planner, is not part of it; the result records both.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from lewm import envs
from lewm._core import __version__
from lewm.checks import integer
from lewm.collector import generate, space_of
from lewm.config import PRESETS, TERMS, configure
from lewm.controller import Controller
from lewm.data import Dataset
from lewm.model_file import write_atomically
from lewm.planner import CEM, ICEM, MPPI, Planner, plan, planner_from, planner_of
from lewm.records import read_record, typed

__all__ = ["PLANNERS", "PROTOCOLS", "Protocol", "Result", "evaluate", "wilson"]

# Settings of model and training, each off by default, that make it another method: loss terms beside the paper's two
# (their weights), heads, the predictor of action prefixes.
OPTIONAL_PARTS = (*TERMS, "distance_head", "action_prior", "action_prefix")
# Latency is that of single plans; this many are timed.
_TIMED_PLANS = 20
# Candidates scored at once when `batch` is left open: bounds memory, large enough to keep a CPU busy.
_CANDIDATES = 4096
# Environments that make episodes or pictures at once; some simulators are large.
_AT_ONCE = 32
# Episodes to look through for each pair before saying that none will do.
_TRIES = 20


@dataclass(frozen=True)
class Protocol:
    """What is to be solved (paper App. F.1; version 3 of the paper has 25/50 for every environment).

    Args:
        name: As in `PROTOCOLS`.
        env_id: Gymnasium id of an environment with a vector entry point that resets to any state.
        goal_offset: The goal is the state exactly this many steps after the start, in the same episode.
        budget: Steps to reach it in.
        pairs: Start/goal pairs, one per episode.
        seed: Of the episodes and of the starts within them.
        strict: Leave out pairs whose start already counts as the goal; further episodes take their place.
        past_success: Episodes last until the environment's limit, also when their policy is done before. They have to
            where the goal is as far ahead as the limit: episodes that are over by then are those of a policy that got
            there, and with only the others left, the protocol would ask for what the policy failed at.
        env_kwargs: Further arguments for the environment; plain JSON data.
    """

    name: str
    env_id: str
    goal_offset: int = 25
    budget: int = 50
    pairs: int = 200
    seed: int = 0
    strict: bool = False
    past_success: bool = False
    env_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("goal_offset", "budget", "pairs"):
            integer(name, getattr(self, name), 1)
        integer("seed", self.seed, 0, 2**32)


# 100/150 is of versions 1 and 2 of the paper. Episodes have at most 100 steps, so the start is the first state and the
# goal the last, there and here. There, episodes count only if the policy had not got to its own goal by then: of ours
# that would be 62 %, with 72 instead of 83 % of the goals in the other room (1,000 pairs each).
PROTOCOLS = {
    p.name: p
    for frozen in (
        Protocol("pusht-25-50", "lewm/PushT-v0"),
        Protocol("two-room-25-50", "lewm/TwoRoom-v0"),
        Protocol("two-room-100-150", "lewm/TwoRoom-v0", goal_offset=100, budget=150, past_success=True),
        Protocol("reacher-25-50", "lewm/Reacher-v0"),
        Protocol("cube-25-50", "lewm/Cube-v0"),
    )
    for p in (frozen, replace(frozen, name=f"{frozen.name}-strict", strict=True))
}

# The presets' planners by the presets' names ("paper": CEM, 300 samples, 30 iterations, 30 elites, horizon 5), the
# paper's as the official code does it, and the others with their defaults.
PLANNERS: dict[str, Planner] = {
    **{name: planner_from(preset.planner) for name, preset in PRESETS.items()},
    "official": CEM(reference=True),
    "icem": ICEM(),
    "mppi": MPPI(),
}


@dataclass(frozen=True)
class Moved:
    """The pairs in which more than the agent moved from start to goal, where the task can tell (its class's `moved`).

    The control beside the rate of all pairs: of these, a model blind to what is to be moved solves few.

    Attributes:
        n: Number of such pairs.
        success_rate, interval, random_floor, blind_floor: Of them alone, as in `Result`.
    """

    n: int
    success_rate: float
    interval: tuple[float, float]
    random_floor: float
    blind_floor: float | None = None


@dataclass(frozen=True)
class Training:
    """What a model's file says of its training.

    Attributes:
        preset: Its name.
        changes: Settings of model and training that are not the preset's, by name.
        seed, steps: Of the run.
        seconds: Wall time of the steps, evaluation on held-out data included.
        device: As torch names it.
        parts: Those of the optional settings in `OPTIONAL_PARTS` that are on, by name; None in older files.
        episodes, policy: Of the data, and who acted in it; None where the file does not say.
    """

    preset: str
    changes: dict[str, Any]
    seed: int
    steps: int
    seconds: float
    device: str
    parts: dict[str, Any] | None = None
    episodes: int | None = None
    policy: str | None = None


@dataclass(frozen=True)
class Result:
    """What `evaluate` found; `to_dict` is the result JSON, `load` reads one.

    Attributes:
        success_rate: Share of the pairs solved, those that were solved at the start included.
        interval: Its 95 % Wilson interval.
        random_floor, random_interval: The same for uniformly random actions on the same pairs.
        n: Number of pairs.
        solved_at_start: Pairs whose start already counts as the goal.
        moved: The same of the pairs in which more than the agent moved; None if the task cannot tell or there are none.
        plan_ms: "p50" and "p95" of the latency of plans for a single environment, in milliseconds.
        protocol: All of it.
        planner: All its fields, and as "name" which it is.
        execute: Blocks of each plan that were executed.
        shrink: Whether each search looked ahead only as far as the plan before it still went.
        seed: Of the planner's noise and of the random actions.
        data: Fingerprint of the data set the pairs are from; None if the protocol made its own episodes.
        model_hash, backend, precision: Of the model.
        training: Of the model; None if its file does not say.
        command: What measures it again; MODEL and STORE stand for paths.
        versions: Of the software, and the CPU.
        seconds: Wall time of the whole evaluation.
        success: Per pair, for paired comparisons with another result of the same protocol.
        random_success: Per pair, of the random policy.
        distance: Per pair, to the goal when it was solved or the budget was spent, in the environment's unit.
        pairs: Per pair, (episode, row of the start).
        blind_floor: Share solved by who sees the agent alone and takes it straight to its place in the goal; None if
            the task has no such control (its class's `blind`).
    """

    success_rate: float
    interval: tuple[float, float]
    random_floor: float
    random_interval: tuple[float, float]
    n: int
    solved_at_start: int
    moved: Moved | None
    plan_ms: dict[str, float]
    protocol: Protocol
    planner: dict[str, Any]
    execute: int
    seed: int
    data: str | None
    model_hash: str
    backend: str
    precision: str
    training: Training | None
    command: str
    versions: dict[str, str]
    seconds: float
    success: list[bool]
    random_success: list[bool]
    distance: list[float]
    pairs: list[tuple[int, int]]
    shrink: bool = False
    blind_floor: float | None = None

    def __post_init__(self) -> None:
        integer("n", self.n, 1)
        for name in ("success", "random_success", "distance", "pairs"):
            if len(getattr(self, name)) != self.n:
                raise ValueError(f"{name} must have one entry for each of n = {self.n} pairs")
        for name, rate, interval, solved in (
            ("success_rate", self.success_rate, self.interval, self.success),
            ("random_floor", self.random_floor, self.random_interval, self.random_success),
        ):
            share, limits = _rate(solved)
            if not np.allclose([rate, *interval], [share, *limits], rtol=0, atol=1e-9):
                raise ValueError(f"{name} and its interval must be those of the {self.n} pairs, got {rate}")
        if not {"p50", "p95"} <= self.plan_ms.keys():
            raise ValueError(f"plan_ms must have p50 and p95, got {', '.join(self.plan_ms)}")
        if described(planner_from(self.planner)) != self.planner:
            raise ValueError(f"planner must have all fields of a planner, got {', '.join(self.planner)}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Reads a result JSON, which may be from anywhere.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not one that this release wrote; the text says what is wrong.
        """
        return read_record(path, "result", "result of lewm evaluate", lambda value: typed("the file", value, cls))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON atomically: the file is the whole result or not there."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2).encode())

    def __str__(self) -> str:
        def rate(share: float, interval: tuple[float, float]) -> str:
            return f"{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

        lines = [
            f"{self.protocol.name}: {rate(self.success_rate, self.interval)} of {self.n} pairs solved "
            f"(95 % interval), {self.solved_at_start} of them at the start",
            f"random actions: {rate(self.random_floor, self.random_interval)}",
            f"one plan ({self.planner['name'].upper()}, {self.planner['samples']} samples x "
            f"{self.planner['iterations']} iterations, {self.execute} of {self.planner['horizon']} blocks executed"
            f"{', horizon shrinking' * self.shrink}, "
            f"{self.backend} {self.precision}): {self.plan_ms['p50']:.1f} ms p50, {self.plan_ms['p95']:.1f} ms p95",
        ]
        if (moved := self.moved) is not None:
            lines.insert(
                1,
                f"pairs in which more than the agent moved: {rate(moved.success_rate, moved.interval)} of {moved.n}, "
                f"random actions {moved.random_floor:.1%}",
            )
        if self.blind_floor is not None:
            among = f", of those pairs {moved.blind_floor:.1%}" if moved and moved.blind_floor is not None else ""
            lines.append(f"straight to the agent's place in the goal, blind to the rest: {self.blind_floor:.1%}{among}")
        return "\n".join(lines)


def evaluate(
    model: Any,
    protocol: str | Protocol = "two-room-25-50",
    *,
    pairs: int | None = None,
    planner: str | Planner | None = None,
    execute: int | None = None,
    shrink: bool = False,
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

    The environment is made with the `env_kwargs` of the data that the model learnt from, so that it draws the pictures
    that the model knows (`look="official"`); those of the protocol come first. The result's protocol has both.

    Args:
        model: What plans.
        protocol: A name in `PROTOCOLS` or a `Protocol`, of the environment that the model learnt from.
        pairs: Number of pairs, by default the protocol's. The first n pairs are the same whatever the number.
        planner: A name in `PLANNERS` or a planner; by default the one that the model file names, else `CEM()`.
        execute: Blocks of each plan to execute before the next; by default all.
        shrink: Each search looks ahead only as far as the plan before it still goes, see `lewm.Controller`.
        seed: Of the planner's noise and of the random actions.
        data: Take the pairs from this `lewm.Dataset` (or its path) instead: if the model was trained on it, from the
            episodes that training held out, else from all. Its episodes end where they end, `past_success` or not.
            Without `pairs`, as many as there are, up to the protocol's.
        out: Also write the result JSON here.
        batch: Environments planned for at once; changes speed and memory only.
        progress: Called with (pairs done, pairs).

    Raises:
        TypeError, ValueError: An argument is not as described, or model, data and environment do not fit together:
            a model of another environment than the protocol's, as far as its file says which.
    """
    started = time.perf_counter()
    protocol = _named("protocol", protocol, PROTOCOLS)
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol must be a Protocol or the name of one, got {protocol!r}")
    planner = planner_of(model, _named("planner", planner, PLANNERS))
    # A cost that the model takes by itself need not be asked for.
    asked = replace(planner, cost=None) if planner == planner_of(model, replace(planner, cost=None)) else planner
    execute = planner.horizon if execute is None else integer("execute", execute, 1, planner.horizon + 1)
    wanted = protocol.pairs if pairs is None else integer("pairs", pairs, 1)
    batch = max(1, _CANDIDATES // planner.samples) if batch is None else integer("batch", batch, 1)
    integer("seed", seed, 0, 2**64)
    model.require_stats()
    protocol = _as_learnt(protocol, model)
    _check_actions(protocol, model)

    if data is None:
        tasks = make_tasks(protocol, wanted, model.config.image_size)
    else:
        tasks = _data_tasks(protocol, data, model, pairs)
    n, size = len(tasks.episodes), tasks.pictures.shape[1]

    chance = _random_actions(protocol, n, seed)
    solved, at_start, distance, random_solved, moved, blind_solved = [], [], [], [], [], []
    for env, some in _batches(protocol, n, batch, size=size, obs_type="state", render_mode="rgb_array"):
        part = tasks.part(some)
        ids = np.arange(some.start, some.stop)
        act = _planned_actions(model, part.pictures, ids, planner=planner, execute=execute, shrink=shrink, seed=seed)
        found = _run(env, protocol, part, act)
        by_chance, *_ = _run(env, protocol, part, lambda env, info, active, step, rows=chance[some]: rows[:, step])
        controls = by_chance, _moved(env, part), _blind(env, protocol, part)
        for whole, one in zip(
            (solved, at_start, distance, random_solved, moved, blind_solved), (*found, *controls), strict=True
        ):
            whole.extend(one.tolist())
        if progress is not None:
            progress(len(solved), n)

    rate, interval = _rate(solved)
    floor, floor_interval = _rate(random_solved)
    result = Result(
        success_rate=rate,
        interval=interval,
        random_floor=floor,
        random_interval=floor_interval,
        n=n,
        solved_at_start=sum(at_start),
        moved=_among(moved, solved, random_solved, blind_solved),
        plan_ms=_latency(protocol, tasks.part(slice(_TIMED_PLANS)), model, planner, seed),
        protocol=protocol,
        planner=described(planner),
        execute=execute,
        shrink=shrink,
        blind_floor=_rate(blind_solved)[0] if blind_solved else None,
        seed=seed,
        data=tasks.fingerprint,
        model_hash=model.hash(),
        backend=model.backend,
        precision=model.precision,
        training=_training(model),
        command=command_of(protocol, n, asked, execute, seed, data is not None, shrink),
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


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate, low and high in [0, 1]; successes may be a mean.

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


def _rate(solved: list[bool]) -> tuple[float, tuple[float, float]]:
    """Success rate and its interval."""
    return sum(solved) / len(solved), wilson(sum(solved), len(solved))


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


class _Pair(NamedTuple):
    """What may become one of them."""

    episode: int
    row: int
    states: np.ndarray  # (2, S) of start and goal


def _pair(protocol: Protocol, episode: int, states: np.ndarray) -> _Pair:
    """The pair of an episode (N, S); the start is drawn under a key of its own, the goal of the last is the last."""
    rng = np.random.default_rng((protocol.seed, episode, protocol.goal_offset))
    row = int(rng.integers(len(states) - protocol.goal_offset))
    return _Pair(episode, row, states[[row, row + protocol.goal_offset]])


def _chosen(protocol: Protocol, pairs: Iterable[_Pair], n: int) -> list[_Pair]:
    """The first n pairs that the protocol takes, fewer if there are fewer."""
    if not protocol.strict:
        return list(islice(pairs, n))
    with closing(_vector_env(protocol, 1, obs_type="state")) as env:

        def solved(pair: _Pair) -> bool:
            _, info = env.reset(options={"state": pair.states[:1], "goal": pair.states[1:]})
            return bool(info["success"][0])

        return list(islice((pair for pair in pairs if not solved(pair)), n))


def make_tasks(protocol: Protocol, n: int, size: int) -> Tasks:
    """Pairs from fresh episodes of the scripted policy; pair i is the same whatever n is."""
    tries = _TRIES * n
    chosen = _chosen(protocol, _fresh(protocol, range(tries), min(n, _AT_ONCE)), n)
    if len(chosen) < n:
        raise ValueError(
            f"goal_offset must leave enough pairs, got {protocol.goal_offset}: only {len(chosen)} of {tries} episodes "
            f"are longer{' and not solved at their start' if protocol.strict else ''}"
        )
    states, goals = np.stack([pair.states for pair in chosen], axis=1)
    episodes, rows = np.array([pair[:2] for pair in chosen]).T
    # A picture depends on the state alone, so the goals are drawn now rather than every frame on the way.
    return Tasks(states, goals, _pictures(protocol, goals, size), episodes, rows)


def _fresh(protocol: Protocol, numbers: range, at_once: int) -> Iterator[_Pair]:
    """Pairs of the protocol's own episodes, as far as they are long enough."""
    # NumPy mixes a whole number's 32-bit words, lowest first, without leading zeros and padded to four. Five words that
    # end in zero are therefore the seed of no `collect`, and no data set that it makes can hold these episodes.
    key = (protocol.seed, 0, 0, 0, 0)
    steps = gymnasium.spec(protocol.env_id).max_episode_steps or protocol.goal_offset
    with closing(_vector_env(protocol, at_once, obs_type="state", max_episode_steps=steps)) as env:
        whole = protocol.past_success or None
        made = generate(env, env.expert_policy(), seed=key, episodes=numbers, max_steps=steps, past_success=whole)
        for number, episode in zip(numbers, made, strict=True):
            states = episode.columns["state"]
            if len(states) > protocol.goal_offset:
                yield _pair(protocol, number, states)


def _data_tasks(protocol: Protocol, data: Any, model: Any, pairs: int | None) -> Tasks:
    """Pairs from a data set, none of them from an episode that the model was trained on."""
    data = data if isinstance(data, Dataset) else Dataset(data)
    if data.metadata.get("env_id") != protocol.env_id:
        raise ValueError(f"data must be of {protocol.env_id}, as the protocol, got {data.metadata.get('env_id')}")
    usable = [e for e in _held_out(data, model) if data.lengths[e] > protocol.goal_offset]
    order = np.random.default_rng(protocol.seed).permutation(usable).astype(int).tolist()
    wanted = protocol.pairs if pairs is None else pairs
    chosen = _chosen(protocol, (_pair(protocol, e, data.column("state", e)) for e in order), wanted)
    if not chosen or (pairs is not None and len(chosen) < pairs):
        raise ValueError(
            f"pairs must be at most {len(chosen)}, one for each episode of data that was held out from training and is "
            f"longer than {protocol.goal_offset} steps{', not solved at its start' if protocol.strict else ''}, "
            f"got {wanted}"
        )
    states, goals = np.stack([pair.states for pair in chosen], axis=1)
    ahead = protocol.goal_offset
    return Tasks(
        states,
        goals,
        pictures=np.stack([data.frames(pair.episode, np.array([pair.row + ahead]))[0] for pair in chosen]),
        episodes=np.array([pair.episode for pair in chosen]),
        rows=np.array([pair.row for pair in chosen]),
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
        **protocol.env_kwargs,
        **settings,
    )


def _batches(
    protocol: Protocol, n: int, at_once: int, **settings: Any
) -> Iterator[tuple[gymnasium.vector.VectorEnv, slice]]:
    """Parts of n pairs, each with as many environments; to make some takes long, so whole batches share theirs."""
    env = None
    try:
        for begin in range(0, n, at_once):
            part = slice(begin, min(n, begin + at_once))
            if env is None or env.num_envs != part.stop - begin:
                if env is not None:
                    env.close()
                env = _vector_env(protocol, part.stop - begin, **settings)
            yield env, part
    finally:
        if env is not None:
            env.close()


def _pictures(protocol: Protocol, states: np.ndarray, size: int) -> np.ndarray:
    """(n, size, size, 3) pictures of states (n, S)."""
    drawn = [
        env.reset(options={"state": states[part], "goal": states[part]})[0]
        for env, part in _batches(protocol, len(states), _AT_ONCE, size=size, obs_type="pixels")
    ]
    return np.concatenate(drawn)


def _as_learnt(protocol: Protocol, model: Any) -> Protocol:
    """The protocol in the environment that the model learnt from, as far as its file says what that was."""
    learnt = model.meta.get("data") or {}
    env_id, settings = learnt.get("env_id"), learnt.get("env_kwargs")
    if env_id not in (None, protocol.env_id):
        raise ValueError(
            f"model and protocol must be of the same environment: the model learnt from {str(env_id)[:200]}, "
            f"{protocol.name} is of {protocol.env_id}"
        )
    if not isinstance(settings, dict):
        return protocol
    # How starts and goals are drawn is the protocol's own affair, whose pairs are the same for every model.
    kept = {name: value for name, value in settings.items() if name not in ("start_rule", "goal_rule")}
    return replace(protocol, env_kwargs={**kept, **protocol.env_kwargs})


def _check_actions(protocol: Protocol, model: Any) -> None:
    space = space_of(protocol.env_id)
    if space.shape != (model.config.action_dim,):
        raise ValueError(
            f"model and protocol must have the same actions: {protocol.env_id} has {space}, "
            f"the model {model.config.action_dim} numbers"
        )


def _run(env: Any, protocol: Protocol, tasks: Tasks, act: Callable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who was solved, who was at the start, and the last distance, all (n,).

    `act(env, info, active, step)` gives actions (n, A_raw); those of pairs no longer active do not count.
    """
    _, info = env.reset(options={"state": tasks.states, "goal": tasks.goals})
    at_start, solved, distance = info["success"].copy(), info["success"].copy(), info["distance"].copy()
    for step in range(protocol.budget):
        active = ~solved
        if not active.any():
            break
        _, _, terminated, _, info = env.step(act(env, info, active, step))
        distance[active] = info["distance"][active]
        solved |= terminated
    return solved, at_start, distance


def _planned_actions(
    model: Any, goals: np.ndarray, env_ids: np.ndarray, *, execute: int, shrink: bool, **settings: Any
) -> Callable[[Any, dict[str, Any], np.ndarray, int], np.ndarray]:
    """Actions of a controller that drops the pairs that are solved."""
    controller, kept, frames = None, None, None
    # A controller looks at the pictures between blocks, if it has a history, else at those that it plans from. To
    # draw is most of the work in some environments, so no others are drawn.
    block = model.config.action_block
    look = block if shrink or model.config.history > 1 else block * execute

    def act(env: Any, info: dict[str, Any], active: np.ndarray, step: int) -> np.ndarray:
        nonlocal controller, kept, frames
        if step % look == 0:
            frames = np.stack(env.render())
        if controller is None:
            how = {"execute": execute, "shrink": shrink, **settings}
            controller = Controller(model, goals[active], env_id=env_ids[active], **how)
        elif not active[kept].all():
            controller.keep(active[kept])
        kept = active
        actions = np.zeros((len(active), model.config.action_dim), dtype=np.float32)
        actions[active] = controller(frames[active])
        return actions

    return act


def _moved(env: Any, tasks: Tasks) -> np.ndarray:
    """(n,) in which pairs more than the agent moved; (0,) if the task cannot tell."""
    moved = _of_task(env, "moved")
    return np.zeros(0, dtype=bool) if moved is None else np.asarray(moved(tasks.states, tasks.goals), dtype=bool)


def _blind(env: Any, protocol: Protocol, tasks: Tasks) -> np.ndarray:
    """(n,) which pairs the task's blind control solves; (0,) if it has none."""
    blind = _of_task(env, "blind")
    if blind is None:
        return np.zeros(0, dtype=bool)
    solved, *_ = _run(env, protocol, tasks, lambda env, info, *_: blind(info["state"], info["goal_state"]))
    return solved


def _of_task(env: Any, name: str) -> Callable | None:
    return getattr(getattr(env.unwrapped, "task_type", None), name, None)


def _among(moved: list[bool], solved: list[bool], random_solved: list[bool], blind: list[bool]) -> Moved | None:
    if not any(moved):
        return None
    (rate, interval), (floor, _), (blind_floor, _) = (
        _rate([s for s, m in zip(all_pairs, moved, strict=True) if m])
        for all_pairs in (solved, random_solved, blind or solved)
    )
    return Moved(sum(moved), rate, interval, floor, blind_floor if blind else None)


def _random_actions(protocol: Protocol, n: int, seed: int) -> np.ndarray:
    """(n, budget, A_raw) uniform over the action space; pair i gets the same actions whatever n is."""
    space = space_of(protocol.env_id)
    shape = (n, protocol.budget, *space.shape)
    return np.random.default_rng(seed).uniform(space.low, space.high, shape).astype(np.float32)


def _latency(protocol: Protocol, tasks: Tasks, model: Any, planner: Planner, seed: int) -> dict[str, float]:
    """Milliseconds of plans made one at a time, after one to warm up."""
    frames = _pictures(protocol, tasks.states, tasks.pictures.shape[1])
    times = [
        plan(frames[i], tasks.pictures[i], model=model, planner=planner, seed=seed, env_ids=[i]).latency_ms
        for i in (0, *range(len(frames)))
    ]
    return {name: float(np.percentile(times[1:], q)) for name, q in (("p50", 50), ("p95", 95))}


def _named(name: str, value: Any, known: dict[str, Any]) -> Any:
    """What a name stands for; what is none stands for itself."""
    if not isinstance(value, str):
        return value
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def described(planner: Planner) -> dict[str, Any]:
    """What `planner_from` makes it of again."""
    return {"name": type(planner).__name__.lower(), **asdict(planner)}


def _training(model: Any) -> Training | None:
    """From the model's file, which may be from anywhere: None where it does not say all of it."""
    record, preset = model.meta.get("training") or {}, model.meta.get("preset")
    if preset not in PRESETS or not isinstance(record.get("config"), dict):
        return None
    now = {**asdict(model.config), **record["config"]}
    before = {k: v for part in configure(preset, model.config.action_dim, {}) for k, v in asdict(part).items()}
    changes = {name: value for name, value in now.items() if value != before.get(name)}
    found = {name: record.get(name) for name in ("seed", "steps", "seconds", "device")}
    found["parts"] = {name: now[name] for name in OPTIONAL_PARTS if now.get(name)}
    found |= {name: (model.meta.get("data") or {}).get(name) for name in ("episodes", "policy")}
    try:
        return typed("training", {"preset": preset, "changes": changes, **found}, Training)
    except (ValueError, OverflowError, RecursionError):
        return None


def command_of(
    protocol: Protocol, n: int, planner: Planner, execute: int, seed: int, data: bool, shrink: bool = False
) -> str:
    """The command, or for a protocol that it cannot name the call, that measures the same."""
    known = PROTOCOLS.get(protocol.name)
    if known is None or replace(known, pairs=protocol.pairs, env_kwargs=protocol.env_kwargs) != protocol:
        store = (", shrink=True" if shrink else "") + (", data=STORE" if data else "")
        return f"lewm.evaluate(MODEL, {protocol}, pairs={n}, planner={planner}, execute={execute}, seed={seed}{store})"
    changes = {
        name: {k: v for k, v in asdict(planner).items() if v != getattr(known, k)}
        for name, known in PLANNERS.items()
        if type(known) is type(planner)
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    words = ["lewm", "evaluate", "MODEL", "--protocol", protocol.name, "--pairs", str(n)]
    words += [w for k, v in protocol.env_kwargs.items() for w in ("--env", f"{k}={json.dumps(v)}")]
    words += ["--planner", nearest]
    words += [w for k, v in changes[nearest].items() for w in ("--planner", f"{k}={json.dumps(v)}")]
    words += ["--execute", str(execute), *(("--shrink",) if shrink else ())]
    words += ["--seed", str(seed), *(("--data", "STORE") if data else ())]
    return shlex.join(words)


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
