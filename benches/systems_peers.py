"""TD-MPC2 and DreamerV3 on TwoRoom with rewards: the rows of other people's code in the table of `lewm bench systems`.

    .venv-peers/bin/python -m benches.systems_peers td-mpc2 [--observation pixels] [--data STORE] --out ROWS.json
    .venv-dreamer/bin/python -m benches.systems_peers dreamerv3 [--data STORE] --out ROWS.json

`make systems-peers` makes both environments and runs both. TD-MPC2 is the module, loss and MPPI solver of
stable-worldmodel's release, DreamerV3 its authors' package from PyPI. Both learn offline, from the episodes that our
model learns from, with a reward for being near a place that the episode gets to; both are given the goal's position.
The pairs, the floor of random actions and the interval are those of `lewm.evaluate`. What cannot be imported or run is
a row that says why. `--quick` only checks that it runs.

The budget is minutes on a CPU, where these methods' papers have days on a GPU: a row says what the method costs and
what it had reached by then, nothing of what it can reach. `CAVEAT` is in every row that was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorWrapper

import lewm
from lewm import evaluation
from lewm.config import PRESETS
from lewm.envs.two_room import EXTENT, SPEED
from lewm.model_file import write_atomically
from lewm.pixels import MEAN, STD

PROTOCOL = "two-room-25-50"
SIZE = 64
ONE_THREAD = os.environ.get("OMP_NUM_THREADS") == "1"
EPISODES = 300  # of our own recipe
CAVEAT = (
    "A budget of minutes on a CPU says nothing about the best that this method can do; it is trained offline, once, "
    "with one seed and settings that nobody tuned for this task."
)
TASK = (
    "TwoRoom with a reward: minus the distance to the goal after the step, in widths of the picture. Every recorded "
    "episode is given goals that it gets to; the agent is given the goal's position."
)
FIELDS = (
    "system",
    "task",
    "measured",
    "why_not",
    "loss_terms",
    "hyperparameters",
    "tokens_per_frame",
    "parameters",
    "plan_ms",
    "success",
    "n",
    "interval",
    "training",
    "versions",
    "machine",
)
# What a row may say beside them.
NOTES = ("random_floor", "straight_line", "planner", "observation", "names", "timing", "notes")


# ------------------------------------------------------------------------------------------- the task with a reward


def reward(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Minus the distance of states (..., 2) from goals (..., 2), in widths of the picture: (...) float32, at most 0."""
    apart = np.asarray(states, np.float64) - np.asarray(goals, np.float64)
    return (-np.hypot(apart[..., 0], apart[..., 1]) / EXTENT).astype(np.float32)


class RewardTwoRoom(VectorWrapper):
    """`lewm/TwoRoom-v0` as a vector environment whose steps have `reward`, which are 0 there."""

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        observation, _, terminated, truncated, info = self.env.step(actions)
        return observation, reward(info["state"], info["goal_state"]), terminated, truncated, info


@dataclass(frozen=True)
class Labelled:
    """Episodes one after the other, as many times as they have goals; M rows, one for each state.

    Attributes:
        states: (M, 2) float32, positions in widths of the picture.
        goals: (M, 2) float32, the same.
        actions: (M, 2) float32, what was done there; 0 in the last state of an episode, where nothing was.
        rewards: (M,) float32, of `actions`, that is, of the state after; in the last state that of the state itself.
        first: (M,) bool, whether an episode begins.
        episode, row: (M,) int64, where it is from.
    """

    states: np.ndarray
    goals: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    first: np.ndarray
    episode: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    def starts(self, rows: int) -> np.ndarray:
        """Where windows of `rows` states begin that stay within one episode: (n,) int64."""
        run = np.cumsum(self.first)
        last = np.arange(len(self)) + rows - 1
        inside = last < len(self)
        return np.flatnonzero(inside & (run == run[np.minimum(last, len(self) - 1)]))


def labelled(data: lewm.Dataset, goals: int = 1, seed: int = 0) -> Labelled:
    """Labels recorded episodes: each is repeated with `goals` goals, states of its own drawn uniformly.

    Raises:
        ValueError: The data are not of TwoRoom, have no episode or no positions, or positions that are not finite; or
            `goals` is below 1.
    """
    if goals < 1:
        raise ValueError(f"goals must be at least 1, got {goals}")
    if data.metadata.get("env_id") != "lewm/TwoRoom-v0":
        raise ValueError(f"data must be of lewm/TwoRoom-v0, got {data.metadata.get('env_id')}")
    if "state" not in data.columns:
        raise ValueError(f"data must have the column state, {data.path} has {', '.join(data.columns) or 'none'}")
    if not len(data):
        raise ValueError(f"data must have at least 1 episode, {data.path} has none")
    rng = np.random.default_rng(seed)
    parts = []
    for episode in range(len(data)):
        states = data.column("state", episode)
        if not np.isfinite(states).all():
            raise ValueError(f"the column state of episode {episode} of {data.path} must be finite")
        actions = np.concatenate([data.actions(episode), np.zeros((1, data.action_dim), np.float32)])
        after = np.concatenate([states[1:], states[-1:]])
        rows = np.arange(len(states))
        for goal in states[rng.integers(len(states), size=goals)]:
            goals_of = np.broadcast_to(goal, states.shape)
            parts.append(
                (
                    (states / EXTENT).astype(np.float32),
                    (goals_of / EXTENT).astype(np.float32),
                    actions,
                    reward(after, goals_of),
                    rows == 0,
                    np.full(len(rows), episode),
                    rows,
                )
            )
    return Labelled(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def pictures(data: lewm.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """All frames (N, H, W, 3) uint8, and where each episode's begin (episodes,)."""
    frames = np.concatenate([data.frames(episode) for episode in range(len(data))])
    return frames, np.concatenate([[0], np.cumsum(data.lengths)[:-1]])


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluated(act: Callable[[Any, dict[str, Any], np.ndarray, int], np.ndarray], n: int) -> dict[str, Any]:
    """Success on the first n pairs of the protocol, with its controls; `act` as in `lewm.evaluation`.

    Who knows both positions, as these systems' agents may, can also go straight there: `straight_line`.
    """
    protocol = evaluation.PROTOCOLS[PROTOCOL]
    tasks = evaluation.make_tasks(protocol, n, SIZE)
    env = RewardTwoRoom(evaluation._vector_env(protocol, n, size=SIZE, obs_type="state", render_mode="rgb_array"))
    with contextlib.closing(env):
        solved, at_start, _ = evaluation._run(env, protocol, tasks, act)
        chance = evaluation._random_actions(protocol, n, 0)
        by_chance, *_ = evaluation._run(env, protocol, tasks, lambda env, info, active, step: chance[:, step])
        straight, *_ = evaluation._run(env, protocol, tasks, straight_line)
    rate, interval = evaluation._rate(solved.tolist())
    return {
        "success": rate,
        "n": n,
        "interval": interval,
        "random_floor": evaluation._rate(by_chance.tolist())[0],
        "straight_line": evaluation._rate(straight.tolist())[0],
        "solved_at_start": int(at_start.sum()),
    }


def straight_line(env: Any, info: dict[str, Any], active: np.ndarray, step: int) -> np.ndarray:
    """Actions straight to the goal's position, through no door."""
    return np.clip((info["goal_state"] - info["state"]) / SPEED, -1, 1).astype(np.float32)


def latency(once: Callable[[], Any], times: int) -> dict[str, Any]:
    """Milliseconds of a call after one to warm up: of this process's work and by the clock.

    With one thread the work is what counts, as in `benches.common.compare`, for other programs hardly change it.
    """
    once()
    wall, work = [], []
    for _ in range(times):
        start = time.perf_counter(), time.process_time()
        once()
        wall.append(1e3 * (time.perf_counter() - start[0]))
        work.append(1e3 * (time.process_time() - start[1]))
    both = {
        name: {"p50": round(float(np.median(each)), 3), "p95": round(float(np.percentile(each, 95)), 3)}
        for name, each in (("work_ms", work), ("clock_ms", wall))
    }
    counts = "work_ms" if ONE_THREAD else "clock_ms"
    return {"plan_ms": both[counts], "plan_ms_is": counts, **both, "plans": times}


@dataclass
class Budget:
    """A training's: `for step in budget` ends when the seconds are over, or after `steps` if there is a limit.

    The clock starts with the first step's end, whose time, compilation for the most part, is `first`.
    """

    allowed: float
    limit: int | None = None
    steps: int = 0
    first: float = 0.0
    seconds: float = 0.0
    work: float = 0.0

    def __iter__(self) -> Iterator[int]:
        begun = time.perf_counter()
        yield 0
        self.steps, self.first = 1, time.perf_counter() - begun
        start, work = time.perf_counter(), time.process_time()
        while (self.limit is None or self.steps < self.limit) and time.perf_counter() - start < self.allowed:
            yield self.steps
            self.steps += 1
            self.seconds, self.work = time.perf_counter() - start, time.process_time() - work

    def described(self, **further: Any) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds + self.first, 1),
            "seconds_of_the_first_step": round(self.first, 1),
            "cpu_seconds_after_the_first_step": round(self.work, 1),
            "device": "cpu",
            "budget": f"{self.allowed:g} s by the clock after the first step. {CAVEAT}",
            **further,
        }


# ------------------------------------------------------------------------------------------------------------ TD-MPC2


def td_mpc2(data: lewm.Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """stable-worldmodel's TD-MPC2: its module, loss and settings (`scripts/train` of its repository), its MPPI."""
    import torch
    from omegaconf import OmegaConf
    from stable_worldmodel.policy import PlanConfig
    from stable_worldmodel.solver import MPPISolver
    from stable_worldmodel.wm.tdmpc2 import TDMPC2, tdmpc2_forward

    torch.manual_seed(args.seed)
    pixels = args.observation == "pixels"
    weights = {"consistency_coef": 20.0, "reward_coef": 0.1, "value_coef": 0.1, "entropy_coef": 1e-4, "rho": 0.5}
    sizes = {"horizon": 5, "mlp_dim": 384, "enc_dim": 256, "simnorm_dim": 8, "num_q": 5, "num_bins": 101}
    others = {"tau": 0.01, "discount": 0.99, "uncertainty_penalty": 0.5, "vmin": -6, "vmax": 2}
    encoding = {"pixels": 128, "goal": 128} if pixels else {"state": 128}
    config = OmegaConf.create(
        {
            "image_size": SIZE,
            "action_dim": 2,
            "extra_dims": {"goal": 2} if pixels else {"state": 4},
            "wm": {**weights, **sizes, **others, "encoding": encoding},
        }
    )
    model = TDMPC2(config)
    groups = {
        ("cnn", "pixel_encoder", "extra_encoders"): 0.3 * 3e-4,
        ("dynamics", "reward", "qs"): 3e-4,
        ("pi",): 0.1 * 3e-4,
    }
    trained = [
        {"params": [p for name in names if hasattr(model, name) for p in getattr(model, name).parameters()], "lr": rate}
        for names, rate in groups.items()
    ]
    optimiser = torch.optim.AdamW(trained)

    rows = labelled(data, goals=4, seed=args.seed)
    starts = rows.starts(config.wm.horizon + 1)
    frames, begins = pictures(data) if pixels else (None, None)
    places = np.concatenate([rows.states, rows.goals], axis=1)
    mean, std = places.mean(axis=0), places.std(axis=0) + 1e-2
    rng = np.random.default_rng(args.seed)

    def observed(places: np.ndarray, drawn: np.ndarray | None) -> dict[str, torch.Tensor]:
        """What their encoder takes for places (..., 4) and pictures (..., H, W, 3) uint8."""
        normal = torch.from_numpy(((places - mean) / std).astype(np.float32))
        if drawn is None:
            return {"state": normal}
        shade = (drawn / np.float32(255) - MEAN) / STD
        return {"pixels": torch.from_numpy(np.moveaxis(shade, -1, -3).astype(np.float32)), "goal": normal[..., 2:]}

    class Context:
        """What their loss wants of a Lightning module."""

        def __init__(self) -> None:
            self.model, self.logged = model, {}

        def log_dict(self, values: dict[str, Any], **_: Any) -> None:
            self.logged = {name: float(value.detach()) for name, value in values.items()}

    context, budget = Context(), Budget(args.seconds, 3 if args.quick else None)
    batch_size = 8 if args.quick else 64
    model.train()
    for step in budget:
        index = rng.choice(starts, batch_size)[:, None] + np.arange(config.wm.horizon + 1)
        drawn = frames[begins[rows.episode[index]] + rows.row[index]] if pixels else None
        batch = observed(places[index], drawn)
        batch |= {"action": torch.from_numpy(rows.actions[index]), "reward": torch.from_numpy(rows.rewards[index])}
        loss = tdmpc2_forward(context, batch, "train", config)["loss"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        optimiser.step()
        if step % 200 == 0:
            said(step=step, **context.logged)
    model.eval()
    losses = {name.partition("/")[2]: round(value, 5) for name, value in context.logged.items()}

    def solver(n: int, samples: int, iterations: int, elites: int) -> MPPISolver:
        budget = {"num_samples": samples, "n_steps": iterations, "topk": elites, "temperature": 0.5}
        made = MPPISolver(model, batch_size=max(1, 1000 // samples), **budget, device="cpu", seed=args.seed)
        space = gymnasium.spaces.Box(-1, 1, (n, 2))
        made.configure(action_space=space, n_envs=n, config=PlanConfig(config.wm.horizon, 1, action_block=1))
        return made

    def seen(env: Any, info: dict[str, Any], which: np.ndarray) -> dict[str, torch.Tensor]:
        here = np.concatenate([info["state"][which], info["goal_state"][which]], axis=1) / EXTENT
        return observed(here, np.stack(env.render())[which] if pixels else None)

    ours = PRESETS["tiny"].planner
    same = (ours["samples"], ours["iterations"], ours["elites"])
    own = (8, 2, 4) if args.quick else (1024, 12, 64)  # of its authors' settings for evaluation
    kept: dict[str, Any] = {}

    def planned(env: Any, info: dict[str, Any], active: np.ndarray, step: int) -> np.ndarray:
        if step % config.wm.horizon == 0:
            if not step:
                kept["solver"] = solver(len(active), *same)
            kept["plan"] = np.zeros((len(active), config.wm.horizon, 2), np.float32)
            kept["plan"][active] = quietly(kept["solver"].solve, seen(env, info, active))["actions"].numpy()
        return np.clip(kept["plan"][:, step % config.wm.horizon], -1, 1)

    def prior(env: Any, info: dict[str, Any], active: np.ndarray, step: int) -> np.ndarray:
        with torch.inference_mode():
            mean = model.pi(model.encode(seen(env, info, np.ones(len(active), bool)))).chunk(2, dim=-1)[0]
        return torch.tanh(mean).numpy()

    tasks = evaluation.make_tasks(evaluation.PROTOCOLS[PROTOCOL], 1, SIZE)
    one = observed(np.concatenate([tasks.states, tasks.goals], axis=1) / EXTENT, tasks.pictures if pixels else None)
    times = 2 if args.quick else 20
    plan = latency(lambda: quietly(solver(1, *same).solve, one), times)
    plan_own = latency(lambda: quietly(solver(1, *own).solve, one), 1 if args.quick else 3)
    said(plan=plan, plan_own=plan_own)
    found = evaluated(planned, args.pairs)
    said(found=found)
    by_prior = evaluated(prior, args.prior_pairs)
    horizon = config.wm.horizon
    return {
        "loss_terms": 4,
        "hyperparameters": len(weights),
        "tokens_per_frame": 1,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "plan_ms": plan["plan_ms"],
        **{name: found[name] for name in ("success", "n", "interval", "random_floor", "straight_line")},
        "training": budget.described(batch=batch_size, windows=len(starts), losses_of_the_last_step=losses),
        "planner": f"its MPPI, {same[0]} samples x {same[1]} iterations, {same[2]} elites (the budget of our preset "
        f"tiny), {horizon} steps and the value after them, all executed before the next plan (its authors "
        "plan at every step, which is five times the work)",
        "observation": "frame of 64 px and position of the goal" if pixels else "positions of agent and goal, no frame",
        "names": {"loss_terms": ["consistency", "reward", "value", "policy"], "hyperparameters": weights},
        "timing": {"same_budget": plan, f"its_own_budget_{own[0]}x{own[1]}": plan_own},
        "notes": [
            "hyperparameters counts the weights of the loss; sizes, discount, bins and rates of learning are not in it",
            "batches of 64 windows, smaller than its 256: more steps for the same work",
            "parameters are those that gradients reach; the target values' copy is not among them",
            f"its policy network alone, without plans: {by_prior['success']:.1%} of {by_prior['n']} pairs",
        ],
    }


def quietly(call: Callable[..., Any], *args: Any) -> Any:
    """Its result, without what their solver prints at every plan."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args)


# ---------------------------------------------------------------------------------------------------------- DreamerV3


def dreamerv3(data: lewm.Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """The package `dreamerv3` of PyPI: its agent in its smallest size, on frames and the goal's position."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if ONE_THREAD:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import dreamerv3 as package
    import embodied
    import jax

    unoptimised = args.quick or args.fast_compile
    length, batch = (8, 2) if args.quick else (16, 4)
    keys = {"mlp_keys": "goal", "cnn_keys": "image"}
    changes = {
        "jax": {"platform": "cpu", "precision": "float32", "prealloc": False, "metrics_every": 1, "debug": unoptimised},
        **{"encoder": keys, "decoder": keys},
        **{"batch_size": batch, "batch_length": length, "data_loaders": 1, "seed": args.seed},
    }
    config = embodied.Config(package.configs["defaults"]).update(package.configs["small"]).update(changes)
    if args.quick:  # compiling is most of it
        config = config.update({r".*\.cnn_depth": 4, r".*\.units": 16, r".*\.layers": 1, "rssm.deter": 16})

    space = embodied.Space
    flagged = {name: space(bool) for name in ("is_first", "is_last", "is_terminal")}
    observation = {"image": space(np.uint8, (SIZE, SIZE, 3)), "goal": space(np.float32, (2,)), **flagged}
    observation["reward"] = space(np.float32)
    action = {"action": space(np.float32, (2,), -1, 1), "reset": space(bool)}
    agent = package.Agent(observation, action, embodied.Counter(), config)
    from dreamerv3 import jaxutils  # it counts as the agent is made

    counts = {name.rsplit("/", 1)[1]: int(n) for name, n in jaxutils.Optimizer.PARAM_COUNTS.items()}

    rows = labelled(data, goals=4, seed=args.seed)
    frames, begins = pictures(data)
    last = np.append(rows.first[1:], True)
    # Theirs is the reward that comes with an observation, ours that of the action taken there.
    arrived = np.where(rows.first, reward(rows.states * EXTENT, rows.goals * EXTENT), np.roll(rows.rewards, 1))
    starts = rows.starts(length)
    rng = np.random.default_rng(args.seed)

    def sequences() -> Iterator[dict[str, np.ndarray]]:
        while True:
            index = rng.choice(starts) + np.arange(length)
            yield {
                "image": frames[begins[rows.episode[index]] + rows.row[index]],
                "goal": rows.goals[index],
                "reward": arrived[index],
                "is_first": np.arange(length) == 0,  # as their replay has it: nothing is known before a window
                "is_last": last[index],
                "is_terminal": np.zeros(length, bool),
                "action": rows.actions[index],
                "reset": last[index],
            }

    batches, state, metrics = agent.dataset(sequences), None, {}
    budget = Budget(args.seconds, 3 if args.quick else None)
    for step in budget:
        _, state, metrics = agent.train(next(batches), state)
        if step % 10 == 0:
            said(step=step, **{k: float(v) for k, v in metrics.items() if k.endswith("loss_mean")})
    losses = {k: round(float(v), 5) for k, v in metrics.items() if k.endswith(("loss_mean", "opt_loss"))}
    jax.config.update("jax_disable_most_optimizations", False)  # its policy is compiled from here on, and timed

    def policy(images: np.ndarray, goals: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        n = len(images)
        seen = {"image": images, "goal": (goals / EXTENT).astype(np.float32), "reward": np.zeros(n, np.float32)}
        seen |= {name: np.full(n, state is None and name == "is_first") for name in flagged}
        out, state = agent.policy(seen, state, mode="eval")
        return np.clip(out["action"], -1, 1).astype(np.float32), state

    kept: dict[str, Any] = {}

    def act(env: Any, info: dict[str, Any], active: np.ndarray, step: int) -> np.ndarray:
        actions, kept["state"] = policy(np.stack(env.render()), info["goal_state"], kept["state"] if step else None)
        return actions

    tasks = evaluation.make_tasks(evaluation.PROTOCOLS[PROTOCOL], 1, SIZE)
    _, begun = policy(tasks.pictures, tasks.goals, None)
    step_of = latency(lambda: policy(tasks.pictures, tasks.goals, begun), 2 if args.quick else 50)
    said(policy=step_of)
    found = evaluated(act, args.pairs)
    said(found=found)
    weights = {name: float(value) for name, value in config.loss_scales.items()} | {"actent": float(config.actent)}
    return {
        "loss_terms": len(config.loss_scales),
        "hyperparameters": len(weights),
        "tokens_per_frame": 1,
        "parameters": sum(counts.values()),
        "plan_ms": step_of["plan_ms"],
        **{name: found[name] for name in ("success", "n", "interval", "random_floor", "straight_line")},
        "training": budget.described(batch=[batch, length], windows=len(starts), losses_of_the_last_step=losses),
        "planner": "none: plan_ms is one step of its policy, encoder included",
        "observation": "frame of 64 px and position of the goal",
        "names": {"loss_terms": list(config.loss_scales), "hyperparameters": weights, "parameters": counts},
        "timing": {"policy_step": step_of},
        "notes": [
            "hyperparameters counts the weights of the loss and of the policy's entropy",
            "its size small, which is the smallest of the package's configurations; batches smaller than its 16 x 64",
            "made to collect for itself; here its agent's train() is given windows of the recorded episodes alone",
            *(["its training step was compiled without optimisations"] if unoptimised else []),
            f"`pip install dreamerv3` fails on Python 3.11 (its gym==0.19.0 has no wheel and does not build with a "
            f"current setuptools), so gym, crafter and tensorflow-cpu are left out, which its agent does not "
            f"need, and jax is of the release's time: {version_of('jax')}",
        ],
    }


# --------------------------------------------------------------------------------------------------------------- rows


SYSTEMS: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "td-mpc2": ("TD-MPC2 (stable-worldmodel)", td_mpc2, ("stable-worldmodel", "torch", "omegaconf")),
    "dreamerv3": ("DreamerV3 (dreamerv3 of PyPI)", dreamerv3, ("dreamerv3", "jax", "jaxlib", "tensorflow-probability")),
}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def row(name: str, packages: tuple[str, ...], found: dict[str, Any] | None, why_not: str | None) -> dict[str, Any]:
    """One row: what was measured, or why it was not.

    Raises:
        ValueError: Neither or both; or something in `found` that a row does not have, or a field that it lacks.
    """
    if (found is None) == (not why_not):
        raise ValueError("a row has either what was found or why it was not")
    here = {
        "system": name,
        "task": TASK,
        "measured": found is not None,
        "why_not": why_not,
        "versions": {p: version_of(p) for p in (*packages, "numpy")} | {"python": platform.python_version()},
        "machine": machine(),
    }
    rest = [field for field in FIELDS if field not in here]
    if found is None:
        return {field: here.get(field) for field in FIELDS}
    unknown, missing = set(found) - set(rest) - set(NOTES), set(rest) - set(found)
    if unknown or missing:
        raise ValueError(f"a row has other fields: unknown {sorted(unknown)}, missing {sorted(missing)}")
    whole = here | found
    return {field: whole[field] for field in (*FIELDS, *NOTES) if field in whole}


def machine() -> str:
    from benches.common import cpu

    load = f", {os.getloadavg()[0]:.1f} processes waiting or running at the end" if hasattr(os, "getloadavg") else ""
    return f"{cpu()}{load}"


def said(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def measured(key: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a system; a failure of any kind becomes one that says so."""
    name, measure, packages = SYSTEMS[key]
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.data is None:
                few = 4 if args.quick else EPISODES
                data = lewm.collect("lewm/TwoRoom-v0", Path(folder) / "data.lewm", episodes=few, size=SIZE, seed=0)
            else:
                data = lewm.Dataset(args.data)
            return row(name, packages, measure(data, args), None)
    except Exception as error:
        traceback.print_exc()
        return row(name, packages, None, f"{type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("--observation", choices=("state", "pixels"), default="state", help="of td-mpc2")
    parser.add_argument("--data", type=Path, help="store of TwoRoom, 64 px; else the recipe's own is made")
    parser.add_argument("--seconds", type=float, default=720.0, help="of training, after the first step")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--fast-compile", action="store_true", help="of dreamerv3: its training step not optimised")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.prior_pairs = evaluation.PROTOCOLS[PROTOCOL].pairs
    if args.quick:
        args.pairs = args.prior_pairs = 2
    found = measured(args.system, args)
    write_atomically(args.out, (json.dumps([found], indent=2) + "\n").encode())
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["measured"] else 1)


if __name__ == "__main__":
    main()
