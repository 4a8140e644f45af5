"""Recorded episodes, and the training windows cut from them."""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lewm._core import Store
from lewm.checks import integer


class Dataset:
    """The episodes of a `.lewm` store, read when they are asked for.

    `data[i]` is an `Episode`; `len(data)` and iteration are over episodes. A dataset can be pickled and used in forked
    processes: it carries its path, and no state that two processes would share.

    Args:
        path: Folder of the store.
        skip_damaged: Check every byte now, and leave out damaged episodes with a warning instead of refusing them.

    Raises:
        FileNotFoundError: Nothing is at `path`.
        lewm.StoreError: It is not a store, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str], *, skip_damaged: bool = False) -> None:
        self.path = Path(path).absolute()
        self.skip_damaged = skip_damaged
        self._store = Store(self.path, skip_damaged=skip_damaged)
        if self._store.skipped:
            text = "; ".join(self._store.skipped)
            warnings.warn(f"{self.path}: damaged episodes are left out: {text}", RuntimeWarning, stacklevel=2)
        self.metadata: dict[str, Any] = json.loads(self._store.metadata)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.skip_damaged)

    def __repr__(self) -> str:
        size = f"{self.frame_count} frames of {self.height}x{self.width}"
        return f"Dataset({str(self.path)!r}: {len(self)} episodes, {size}, {self.action_dim} action columns)"

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Episode:
        return Episode(self, self._index(index))

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    @property
    def height(self) -> int:
        """Height of a frame, in pixels."""
        return self._store.height

    @property
    def width(self) -> int:
        """Width of a frame, in pixels."""
        return self._store.width

    @property
    def action_dim(self) -> int:
        """Width of one raw action."""
        return self._store.action_dim

    @property
    def columns(self) -> dict[str, int]:
        """Name and width of each column that is kept beside frames and actions."""
        return self._store.columns

    @cached_property
    def lengths(self) -> np.ndarray:
        """Frames of each episode, int64 of shape (episodes,)."""
        return self._store.lengths

    @property
    def frame_count(self) -> int:
        """Frames of all episodes."""
        return int(self.lengths.sum())

    def fingerprint(self) -> str:
        """A hexadecimal number of what all episodes hold, in their order: equal for equal data."""
        return self._store.fingerprint()

    def refresh(self) -> int:
        """Looks for episodes committed since, and returns how many it found; they come after those already known."""
        found = self._store.refresh()
        self.__dict__.pop("lengths", None)
        self.__dict__.pop("_actions", None)
        return found

    def frames(self, episode: int, indices: ArrayLike | None = None) -> np.ndarray:
        """Frames of one episode, uint8 of shape (K, H, W, 3): those at `indices` (K,), or all."""
        episode = self._index(episode)
        chosen = np.arange(self.lengths[episode]) if indices is None else _integers("indices", indices, 1)
        return self._store.frames(episode, chosen)

    def actions(self, episode: int) -> np.ndarray:
        """Raw actions of one episode, float32 of shape (N-1, A): `actions[t]` leads from frame t to frame t+1."""
        return self._store.actions(self._index(episode))

    def column(self, name: str, episode: int) -> np.ndarray:
        """A column of one episode, float64 of shape (N, C)."""
        return self._store.column(name, self._index(episode))

    def split(self, validation: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Divides the episodes, each with all its frames, into training and validation.

        Args:
            validation: Share of the episodes that is held out, above 0 and below 1; at least one episode is.
            seed: Seed of the division.

        Returns:
            Episode numbers for training and for validation, both int64 and ascending.
        """
        if not 0 < validation < 1:
            raise ValueError(f"validation must be above 0 and below 1, got {validation}")
        if len(self) < 2:
            raise ValueError(f"a split needs at least 2 episodes, {self.path} has {len(self)}")
        held_out = min(max(round(len(self) * validation), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        return np.sort(order[held_out:]), np.sort(order[:held_out])

    def action_statistics(self, episodes: ArrayLike | None = None) -> dict[str, np.ndarray]:
        """What a model needs to know of raw actions.

        Args:
            episodes: Numbers of the episodes to use (n,); all by default.

        Returns:
            `mean` and `std` (of the population) of each action column, and `low` and `high`, the bounds that the
            metadata has as `action_low` and `action_high`. Each is float64 of shape (A,).

        Raises:
            ValueError: The actions do not vary, are not finite, or have no bounds.
        """
        chosen = np.arange(len(self)) if episodes is None else self._episodes(episodes)
        if not len(chosen):
            raise ValueError("action statistics need at least 1 episode, got none")
        actions, offsets = self._actions
        parts = [actions[offsets[episode] : offsets[episode + 1]] for episode in chosen]
        for episode, part in zip(chosen, parts, strict=True):
            if not np.isfinite(part).all():
                raise ValueError(f"the actions of episode {episode} of {self.path} are not all finite")
        rows = np.concatenate(parts).astype(np.float64)
        for column, values in enumerate(rows.T):
            if values.min() == values.max():
                raise ValueError(f"action column {column} of {self.path} is constant at {values[0]:g}: it has no scale")
        bounds = {name: self._bound(f"action_{name}") for name in ("low", "high")}
        return {"mean": rows.mean(axis=0), "std": rows.std(axis=0), **bounds}

    def _bound(self, key: str) -> np.ndarray:
        value = self.metadata.get(key)
        try:
            bound = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            bound = np.empty(0)
        if bound.shape != (self.action_dim,) or np.isnan(bound).any():
            raise ValueError(f"metadata {key!r} of {self.path} must be {self.action_dim} numbers, got {value!r}")
        return bound

    def windows(self, episodes: ArrayLike, frames: int, stride: int = 1) -> np.ndarray:
        """Every window of `frames` frames, `stride` apart, that lies within one of the episodes.

        Args:
            episodes: Numbers of the episodes (n,). Those too short for a window are left out.
            frames: Frames T of a window.
            stride: Raw steps from one frame of a window to the next.

        Returns:
            (episode, start) of each window, int64 of shape (windows, 2), in the order of `episodes`.

        Raises:
            ValueError: No episode is long enough.
        """
        chosen = self._episodes(episodes)
        needed = (integer("frames", frames, 1) - 1) * integer("stride", stride, 1) + 1
        lengths = self.lengths[chosen]
        counts = np.maximum(lengths - needed + 1, 0)
        if not counts.any():
            longest = f"the longest of {len(chosen)} has {lengths.max()}" if len(chosen) else "there are no episodes"
            raise ValueError(f"no window of {frames} frames at stride {stride}: it needs {needed} frames, {longest}")
        starts = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([np.repeat(chosen, counts), starts], axis=1)

    def batch(self, index: ArrayLike, frames: int, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Reads windows: only their own frames are decoded, on several threads, with the GIL released.

        Args:
            index: (episode, start) of each window, integers of shape (B, 2), such as rows of `windows`.
            frames: Frames T of a window.
            stride: Raw steps from one frame of a window to the next.

        Returns:
            Frames, uint8 of shape (B, T, H, W, 3), and the raw actions between them, float32 of shape
            (B, T-1, stride*A): block k holds the actions at start + k*stride to start + (k+1)*stride - 1, in order.

        Raises:
            IndexError: A window is not within its episode.
        """
        index = _integers("index", index, 2)
        if index.shape[1] != 2:
            raise ValueError(f"index must be of shape (B, 2), got {index.shape}")
        frames, stride = integer("frames", frames, 1), integer("stride", stride, 1)
        episodes, starts = index.T.copy()
        pixels = self._store.windows(episodes, starts, frames, stride)
        actions, offsets = self._actions
        steps = np.arange((frames - 1) * stride)
        blocks = actions[(offsets[episodes] + starts)[:, None] + steps]  # (B, (T-1)*stride, A)
        return pixels, blocks.reshape(len(index), frames - 1, stride * self.action_dim)

    @cached_property
    def _actions(self) -> tuple[np.ndarray, np.ndarray]:
        """The actions of all episodes, one after the other, and where each episode's begin."""
        parts = [np.empty((0, self.action_dim), np.float32), *map(self.actions, range(len(self)))]
        return np.concatenate(parts), np.concatenate([[0], np.cumsum(self.lengths - 1)])

    def _index(self, episode: int) -> int:
        index = operator.index(episode)
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} is not in {self.path}, which has {len(self)}")
        return index % len(self)

    def _episodes(self, episodes: ArrayLike) -> np.ndarray:
        chosen = _integers("episodes", episodes, 1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"episodes must be from 0 to {len(self) - 1}, got {chosen.min()} to {chosen.max()}")
        return chosen


class Episode:
    """One episode of a `Dataset`; each part is read when it is first used, and kept as long as this object.

    Attributes:
        index: Number of the episode.
    """

    def __init__(self, data: Dataset, index: int) -> None:
        self._data = data
        self.index = index

    def __len__(self) -> int:
        return int(self._data.lengths[self.index])

    def __repr__(self) -> str:
        return f"Episode({self.index}: {len(self)} frames)"

    @cached_property
    def frames(self) -> np.ndarray:
        """All frames, uint8 of shape (N, H, W, 3)."""
        return self._data.frames(self.index)

    @cached_property
    def actions(self) -> np.ndarray:
        """Raw actions, float32 of shape (N-1, A): `actions[t]` leads from frame t to frame t+1."""
        return self._data.actions(self.index)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Each further column, float64 of shape (N, C)."""
        return {name: self._data.column(name, self.index) for name in self._data.columns}


def _reopen(path: Path, skip_damaged: bool) -> Dataset:
    return Dataset(path, skip_damaged=skip_damaged)


def _integers(name: str, values: ArrayLike, dimensions: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != dimensions or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a {dimensions}-d array of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
