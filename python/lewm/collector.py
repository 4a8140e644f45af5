"""`lewm.collect`: lets a policy act in an environment and writes what happens to a trajectory store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from lewm._core import StoreWriter, __version__
from lewm.checks import integer
from lewm.data import Dataset

Policy = Callable[[np.ndarray, np.ndarray, Sequence[np.random.Generator]], np.ndarray]
_BATCH_BYTES = 128 * 2**20  # of pictures that one batch of environments makes, by default


class Episode(NamedTuple):
    """N pictures, the N - 1 actions between them, and the state columns."""

    frames: np.ndarray  # (N, H, W, 3) uint8
    actions: np.ndarray  # (N - 1, A) float32
    columns: dict[str, np.ndarray]  # (N, C) float64 each


def collect(
    env_id: str,
    path: str | Path,
    *,
    episodes: int,
    size: int = 64,
    seed: int = 0,
    policy: str | Policy = "expert",
    num_envs: int | None = None,
    max_steps: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Dataset:
    """Collects whole episodes into the trajectory store at `path`, and goes on where an earlier call stopped.

    An episode ends after `max_steps` steps, or with success in an environment whose policy has nothing more to do then
    (`whole_episodes` is not set: TwoRoom). All its randomness comes from (seed, episode number),
    so the same arguments give the same store, whatever `num_envs` is and however often the work was interrupted:
    Ctrl-C leaves every episode that was finished, and the same call again adds those that are missing.

    Args:
        env_id: A gymnasium id whose vector form (`vector_entry_point`) takes `size`, `obs_type="pixels"`,
            `max_episode_steps` and `autoreset_mode=AutoresetMode.DISABLED`, a list of seeds in `reset`, and reports
            `state` (N, C) and `goal_state` (N, G) in its info, as `lewm/TwoRoom-v0` does.
        path: Folder of the store; made if it is not there.
        episodes: How many the store holds in the end.
        size: Side of the pictures in pixels.
        seed: A whole number of at least 0.
        policy: "expert" or "play" (the environment's own `expert_policy()`, or `play_policy()`, which tries things
            out), "random" (uniform within the action bounds), or a callable
            `(states (N, C), goals (N, G), rngs) -> actions (N, A)`. `rngs` is a list of N generators, one for each
            row: what row i draws from `rngs[i]` is what makes the store reproducible. Actions are clipped to the
            action bounds and stored so.
        num_envs: Environments that run at once; None chooses up to 32, fewer where pictures are large.
        max_steps: Longest episode, in steps; by default the environment's own limit, or 100 where it has none.
        env_kwargs: Further arguments for the environment, such as `{"goal_rule": "anywhere"}`; plain JSON data.
        progress: Called as `progress(done, total, frames)` after each episode: episodes in the store, episodes
            wanted, and frames that this call has written.

    Returns:
        The store, opened for reading.

    Raises:
        TypeError: A number that is not whole.
        ValueError: An argument that cannot be, an unknown environment, one with a discrete or unbounded action space
            or without a vector form, a policy whose actions have another shape or are NaN, or a store that was
            made with other arguments (the message names them) or already holds more episodes.
    """
    for name, value, least in (("episodes", episodes, 1), ("size", size, 8), ("seed", seed, 0)):
        integer(name, value, least)
    space_of(env_id)
    max_steps = integer(
        "max_steps", (gymnasium.spec(env_id).max_episode_steps or 100) if max_steps is None else max_steps, 1
    )
    if num_envs is None:
        num_envs = min(32, max(1, _BATCH_BYTES // ((max_steps + 1) * size * size * 3)))
    integer("num_envs", num_envs, 1)

    env = _make(env_id, min(num_envs, episodes), size=size, max_steps=max_steps, env_kwargs=env_kwargs or {})
    try:
        act, policy_name = _policy(policy, env, env_id)
        space = env.single_action_space
        recipe = {
            "env_id": env_id,
            "env_kwargs": env_kwargs or {},
            "seed": int(seed),
            "policy": policy_name,
            "max_steps": int(max_steps),
            "pixels": {"size": int(size)},
            "action_low": space.low.tolist(),
            "action_high": space.high.tolist(),
        }
        first, text = _resume(Path(path), recipe, episodes)
        writer, frames = None, 0
        with ExitStack() as closing:
            for episode in generate(env, act, seed=seed, episodes=range(first, episodes), max_steps=max_steps):
                if writer is None:  # not earlier: a policy that fails at once should leave no store behind
                    widths = {name: column.shape[1] for name, column in episode.columns.items()}
                    writer = closing.enter_context(
                        StoreWriter(
                            str(path), height=size, width=size, action_dim=len(space.low), columns=widths, metadata=text
                        )
                    )
                done = writer.append(episode.frames, episode.actions, episode.columns) + 1
                frames += len(episode.frames)
                if progress is not None:
                    progress(done, episodes, frames)
    finally:
        env.close()
    return Dataset(path)


def generate(
    env: VectorEnv, policy: Policy, *, seed: int, episodes: range, max_steps: int, past_success: bool | None = None
) -> Iterator[Episode]:
    """Yields the given episodes in order, as many at a time as `env` has environments.

    Args:
        env: A vector environment as `collect` describes it.
        policy: As in `collect`, a callable.
        seed: Of the whole data set.
        episodes: Numbers of the episodes wanted.
        max_steps: Longest episode, in steps; the environment truncates there.
        past_success: Whether episodes go on after success, by default as the environment's `whole_episodes` says.
    """
    past_success = getattr(env, "whole_episodes", False) if past_success is None else past_success
    low, high = env.single_action_space.low, env.single_action_space.high
    count = env.num_envs
    for first in episodes[::count]:
        # A last batch that is not full runs in full: what it runs beyond the range is dropped.
        keys = [np.random.SeedSequence(seed, spawn_key=(first + i,)).spawn(2) for i in range(count)]
        rngs = [np.random.default_rng(key) for _, key in keys]
        obs, info = env.reset(seed=[int(key.generate_state(1, np.uint64)[0]) for key, _ in keys])
        if hasattr(policy, "begin"):
            policy.begin(count)
        frames = np.empty((count, max_steps + 1, *obs.shape[1:]), dtype=np.uint8)
        actions = np.empty((count, max_steps, len(low)), dtype=np.float32)
        names = ("state", "goal_state")
        columns = {name: np.empty((count, max_steps + 1, info[name].shape[1])) for name in names}
        lengths = np.zeros(count, dtype=np.int64)
        frames[:, 0] = obs
        for name in names:
            columns[name][:, 0] = info[name]
        for step in range(max_steps):
            chosen = np.asarray(policy(info["state"], info["goal_state"], rngs), dtype=np.float32)
            if chosen.shape != (count, len(low)):
                raise ValueError(f"policy gave actions of shape {chosen.shape}, but must give {(count, len(low))}")
            if np.isnan(chosen).any():
                raise ValueError("policy gave an action that is NaN")
            actions[:, step] = np.clip(chosen, low, high)
            obs, _, terminated, truncated, info = env.step(actions[:, step])
            frames[:, step + 1] = obs
            for name in names:
                columns[name][:, step + 1] = info[name]
            over = truncated if past_success else terminated | truncated
            lengths[(lengths == 0) & over] = step + 1
            if lengths.all():
                break
        for i, length in enumerate(lengths[: episodes.stop - first]):
            yield Episode(
                frames[i, : length + 1],
                actions[i, :length],
                {name: column[i, : length + 1] for name, column in columns.items()},
            )


def _make(env_id: str, num_envs: int, *, size: int, max_steps: int, env_kwargs: dict[str, Any]) -> VectorEnv:
    try:
        return gymnasium.make_vec(
            env_id,
            num_envs,
            vectorization_mode="vector_entry_point",
            size=size,
            obs_type="pixels",
            max_episode_steps=max_steps,
            autoreset_mode=AutoresetMode.DISABLED,
            **env_kwargs,
        )
    except TypeError as error:
        raise ValueError(f"the vector form of {env_id!r} does not take what collect passes: {error}") from error


def space_of(env_id: str) -> gymnasium.spaces.Box:
    """The action space of an environment that lewm can act in.

    Raises:
        ValueError: It is unknown or cannot be made, its actions are discrete or unbounded, or it has no
            vector form.
    """
    try:
        spec = gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise ValueError(f"env_id is {env_id!r}, which gymnasium does not know: {error}") from error
    try:
        env = gymnasium.make(env_id, disable_env_checker=True)
    except gymnasium.error.Error as error:
        raise ValueError(f"env_id is {env_id!r}, which gymnasium cannot make here: {error}") from error
    space = env.action_space
    env.close()
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        raise ValueError(
            f"env_id is {env_id!r}, whose action space is {space}; lewm wants continuous, bounded actions: Box of (A,)"
        )
    if spec.vector_entry_point is None:
        raise ValueError(f"env_id is {env_id!r}, which has no vector form; lewm needs one (see `lewm.collect`)")
    return space


def _policy(policy: str | Policy, env: VectorEnv, env_id: str) -> tuple[Policy, str]:
    """The policy as a callable, and its name for the store's metadata."""
    if policy in ("expert", "play"):
        if not hasattr(env, f"{policy}_policy"):
            raise ValueError(f"policy is {policy!r}, but {env_id!r} has none; use 'random' or a callable")
        return getattr(env, f"{policy}_policy")(), policy
    if policy == "random":
        low, high = env.single_action_space.low, env.single_action_space.high
        return lambda states, goals, rngs: np.stack([rng.uniform(low, high) for rng in rngs]), "random"
    if callable(policy):
        kind = policy if hasattr(policy, "__qualname__") else type(policy)
        return policy, f"{kind.__module__}.{kind.__qualname__}"
    known = "'expert', 'play', 'random' or a callable (states, goals, rngs)"
    raise ValueError(f"policy is {policy!r}, but must be {known}")


def _resume(path: Path, recipe: dict[str, Any], episodes: int) -> tuple[int, str]:
    """The number of the first missing episode, and the metadata text to write with."""
    try:
        wanted = json.loads(json.dumps(recipe))  # as the store gives it back
    except TypeError as error:
        raise ValueError(f"env_kwargs is {recipe['env_kwargs']!r}, but must be plain JSON data: {error}") from error
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return 0, json.dumps({**wanted, "created_by": f"lewm-fast {__version__}"})
    there = Dataset(path)
    differing = [key for key in wanted if there.metadata.get(key) != wanted[key]]
    if differing:
        pairs = "; ".join(f"{key} {there.metadata.get(key)!r} there, {wanted[key]!r} asked for" for key in differing)
        raise ValueError(f"path is {str(path)!r}, a store made with other arguments: {pairs}. Choose another path")
    if len(there) > episodes:
        raise ValueError(f"episodes is {episodes}, but the store at {str(path)!r} already holds {len(there)}")
    return len(there), json.dumps(there.metadata)
