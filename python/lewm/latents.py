"""Latents of recorded episodes, as analyses need them: along the predictor's steps, or of frames drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lewm.data import Dataset

_AT_ONCE = 256  # frames decoded and encoded together


@dataclass(frozen=True)
class Track:
    """One episode as the predictor steps through it.

    Attributes:
        episode: Its number in the store.
        steps: (n,) int64, the frames taken, `action_block` apart.
        z: (n, D) float32, their latents.
        blocks: (n - 1, A) float32, the normalised action blocks between them.
    """

    episode: int
    steps: np.ndarray
    z: np.ndarray
    blocks: np.ndarray


def held_out(model: Any, data: Dataset) -> np.ndarray:
    """Numbers (n,) of the episodes that the model has not learnt from: all, if `data` is not what it learnt from."""
    learnt = (model.meta.get("data") or {}).get("fingerprint")
    episodes = (model.meta.get("training") or {}).get("validation_episodes")
    if learnt == data.fingerprint() and episodes:
        return np.asarray(episodes, np.int64)
    return np.arange(len(data))


def encode(model: Any, data: Dataset, episode: int, indices: np.ndarray) -> np.ndarray:
    """Latents (n, D) float32 of some frames of an episode."""
    parts = np.array_split(indices, max(1, -(-len(indices) // _AT_ONCE)))
    return np.concatenate([model.encode(data.frames(episode, part)) for part in parts])


def tracks(model: Any, data: Dataset, episodes: Iterable[int], *, least: int = 2, start: int = 0) -> Iterator[Track]:
    """Episodes as the predictor steps through them, from frame `start` on; those of fewer than `least` steps are left
    out.

    Args:
        model: What encodes; its statistics normalise the actions.
        data: Where the episodes are.
        episodes: Their numbers.
        least: Frames that a track must have.
        start: First frame.
    """
    block = model.config.action_block
    for episode in map(int, episodes):
        steps = np.arange(start, int(data.lengths[episode]), block)
        if len(steps) < max(least, 1):
            continue
        raw = data.actions(episode)[start : steps[-1]].reshape(len(steps) - 1, block * data.action_dim)
        blocks = model.normalise(raw).astype(np.float32)
        yield Track(episode, steps, encode(model, data, episode, steps), blocks)


def scattered(
    model: Any, data: Dataset, episodes: Iterable[int], *, frames: int, per_episode: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents of random frames of random episodes.

    Args:
        model: What encodes.
        data: Where the episodes are.
        episodes: Numbers to choose from.
        frames: How many in all, at most.
        per_episode: How many of each, at most.
        seed: Of the choice.

    Returns:
        Latents (N, D) float32; the episode of each and its frame in it, both (N,) int64, ascending within an episode.
    """
    rng = np.random.default_rng(seed)
    z, which, where, count = [], [], [], 0
    for episode in rng.permutation(np.asarray(list(episodes), np.int64)):
        length = int(data.lengths[episode])
        index = np.sort(rng.choice(length, min(length, per_episode, frames - count), replace=False))
        z.append(encode(model, data, int(episode), index))
        which.append(np.full(len(index), episode))
        where.append(index)
        count += len(index)
        if count >= frames:
            break
    return np.concatenate(z), np.concatenate(which), np.concatenate(where)
