"""Recorded episodes, and the training windows cut from them."""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lewm._core import Store, read_windows
from lewm.loader import WindowSource, copy_episodes, integers
from lewm.memory import check_fits


class Dataset(WindowSource):
    """The episodes of a `.lewm` store, read when they are asked for.

    `data[i]` is an `Episode`; `len(data)` and iteration are over episodes. A dataset can be pickled and used in forked
    processes: it carries its path, and no state that two processes would share.

    Args:
        path: Folder of the store.
        skip_damaged: Check every byte now, and leave out damaged episodes with a warning instead of refusing them.
        in_memory: Decode all frames now and keep them in memory, `frame_count * height * width * 3` bytes: batches are
            then copied, not decoded. (Compressed bytes in memory would gain nothing: once read, the system's file cache
            has them.) Processes made by fork share the memory, others decode it again.

    Raises:
        FileNotFoundError: Nothing is at `path`.
        lewm.StoreError: It is not a store, or a damaged one.
        MemoryError: `in_memory`, and the machine or a control group of this process has less memory free.
    """

    def __init__(self, path: str | os.PathLike[str], *, skip_damaged: bool = False, in_memory: bool = False) -> None:
        self.path = Path(path).absolute()
        self.skip_damaged = skip_damaged
        self._store = Store(self.path, skip_damaged=skip_damaged)
        if self._store.skipped:
            text = "; ".join(self._store.skipped)
            warnings.warn(f"{self.path}: damaged episodes are left out: {text}", RuntimeWarning, stacklevel=2)
        self.metadata: dict[str, Any] = json.loads(self._store.metadata)
        self.height, self.width, self.action_dim = self._store.height, self._store.width, self._store.action_dim
        self.columns = self._store.columns
        self._memory: list[np.ndarray] | None = [] if in_memory else None
        self._load()

    @classmethod
    def open(cls, src: str | os.PathLike[str], store: str | os.PathLike[str] | None = None, **options: Any) -> Dataset:
        """Opens a store, or data of another format, which become a store the first time.

        Args:
            src: A `.lewm` store, or what `lewm.convert` reads.
            store: Where the converted store is, or is to be; beside `src` under its name with `.lewm` by default.
            options: For `lewm.convert`: `camera`, `low`, `high`, `size`, `progress` and so on.

        Raises:
            ValueError: The store that is there was made from something else, with other options, or `src` has changed
                since; or whatever `lewm.convert` refuses.
        """
        from lewm.conversion import open_dataset

        return open_dataset(src, store, **options)

    @classmethod
    def from_arrays(
        cls,
        frames: np.ndarray,
        actions: ArrayLike,
        episode_ends: ArrayLike,
        path: str | os.PathLike[str],
        *,
        low: ArrayLike,
        high: ArrayLike,
        columns: dict[str, ArrayLike] | None = None,
        fps: float | None = None,
        progress: Callable[[int, int, str], object] | None = None,
    ) -> Dataset:
        """Writes episodes that are in arrays to a new store, all or nothing, and opens it.

        Args:
            frames: uint8 of shape (N, H, W, 3), the episodes one after the other; may be a memory map.
            actions: Numbers of shape (N, A), raw units: row t leads from frame t to frame t+1. An episode's last row
                leads nowhere and may be NaN.
            episode_ends: Row after the last one of each episode, ascending integers (E,), the last of them N.
            path: Store to write, `NAME.lewm`.
            low, high: Raw bounds of actions, a number or A of them, which planning keeps to.
            columns: Further numbers for each frame, (N,) or (N, C), kept as float64.
            fps: Frames a second, for the metadata.
            progress: As that of `lewm.convert`.

        Raises:
            FileExistsError: `path` is there.
            ValueError: An argument is not that; nothing is written.
        """
        from lewm.conversion import dataset_from_arrays

        return dataset_from_arrays(
            frames, actions, episode_ends, path, low=low, high=high, columns=columns, fps=fps, progress=progress
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.skip_damaged, self._memory is not None)

    def __repr__(self) -> str:
        size = f"{self.frame_count} frames of {self.height}x{self.width}"
        return f"Dataset({str(self.path)!r}: {len(self)} episodes, {size}, {self.action_dim} action columns)"

    def __getitem__(self, index: int) -> Episode:
        return Episode(self, self._index(index))

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Frames of each episode, int64 of shape (episodes,)."""
        return self._store.lengths

    def fingerprint(self) -> str:
        """A hexadecimal number of what all episodes hold, in their order: equal for equal data."""
        return self._store.fingerprint()

    def refresh(self) -> int:
        """Looks for episodes committed since, and returns how many it found; they come after those already known."""
        found = self._store.refresh()
        self.__dict__.pop("lengths", None)
        self.__dict__.pop("_actions", None)
        self._load()
        return found

    def frames(self, episode: int, indices: ArrayLike | None = None) -> np.ndarray:
        """Frames of one episode, uint8 of shape (K, H, W, 3): those at `indices` (K,), or all."""
        episode = self._index(episode)
        chosen = np.arange(self.lengths[episode]) if indices is None else integers("indices", indices, 1)
        if self._memory is None:
            return self._store.frames(episode, chosen)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.lengths[episode]:
            raise IndexError(f"episode {episode} has {self.lengths[episode]} frames, got indices {chosen}")
        return self._memory[episode][chosen]

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
        chosen = np.arange(len(self)) if episodes is None else self._chosen(episodes)
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

    def _read(
        self, index: np.ndarray, frames: int, stride: int, out: np.ndarray, threads: int | None = None
    ) -> np.ndarray:
        if self._memory is None:
            read_windows(self._store, index, frames, stride, out, threads=threads)
        else:
            copy_episodes(self._memory, index, frames, stride, out, threads)
        actions, offsets = self._actions
        episodes, starts = index.T
        return actions[(offsets[episodes] + starts)[:, None] + np.arange((frames - 1) * stride)]

    def _load(self) -> None:
        """Decodes the episodes that are not in memory yet."""
        if self._memory is None:
            return
        new = range(len(self._memory), len(self))
        size = int(self.lengths[new.start :].sum()) * self.height * self.width * 3
        check_fits(size, f"in_memory=True for {self.path}", "without it the store is read as it is needed")
        for episode in new:
            self._memory.append(self._store.frames(episode, np.arange(self.lengths[episode])))

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


def _reopen(path: Path, skip_damaged: bool, in_memory: bool) -> Dataset:
    return Dataset(path, skip_damaged=skip_damaged, in_memory=in_memory)
