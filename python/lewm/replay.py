"""A bounded buffer of the newest episodes, filled by a control loop while training reads from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lewm._core import Store, StoreWriter, read_windows
from lewm.checks import integer
from lewm.loader import Batch, WindowSource, copy_episodes
from lewm.memory import check_fits
from lewm.pixels import checked


class ReplayBuffer(WindowSource):
    """The newest episodes, at most `capacity` frames of them; the oldest are dropped whole.

    One thread writes, any number read: reading takes no lock and keeps no writer waiting. The episode in progress can
    be read as far as it goes. Windows, batches and loaders are those of a `Dataset`; episodes keep their numbers, so
    those there are now are `first` to `first + len(buffer) - 1`.

        buffer = lewm.ReplayBuffer(100_000, height=64, width=64, action_dim=2)
        batches = iter(buffer.loader(128, frames=4, stride=5))
        while training:
            obs, _ = env.reset()
            buffer.start(obs)
            ended = False
            while not ended:
                action = act(obs)
                obs, _, terminated, truncated, _ = env.step(action)
                buffer.add(action, obs)
                ended = terminated or truncated
            update(next(batches))

    Without `path` frames are kept in memory as they are, `capacity * height * width * 3` bytes when it is full. With
    it, an episode is committed to that store as soon as it is finished, which keeps it from then on, and is read from
    there; dropped ones are only forgotten, no file is deleted. A store that is there already fills the buffer with its
    newest episodes, and what other processes commit to it meanwhile is found with the next episode of our own.

    A buffer belongs to its process; give others a store.

    Args:
        capacity: Most frames.
        height, width: Size of a frame in pixels.
        action_dim: Width A of a raw action.
        columns: Name and width of each further column.
        path: Folder of a store to keep the episodes in; made if it is not there.
        metadata: Plain JSON data for the store, if it is made.

    Raises:
        MemoryError: No `path`, and the buffer would not fit into memory when it is full.
        ValueError: An argument out of its domain, or a store with another height, width, action_dim or columns.
    """

    growing = True

    def __init__(
        self,
        capacity: int,
        *,
        height: int,
        width: int,
        action_dim: int,
        columns: dict[str, int] | None = None,
        path: str | os.PathLike[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.capacity = integer("capacity", capacity, 2)
        self.height, self.width = integer("height", height, 1), integer("width", width, 1)
        self.action_dim = integer("action_dim", action_dim, 1)
        self.columns = {name: integer(f"columns[{name!r}]", width, 1) for name, width in (columns or {}).items()}
        self._store: Store | None = None
        self._open: _Recording | None = None
        # Replaced as a whole, never changed: a reader has one state or the next.
        self._state = _State(0, (), np.empty(0, np.int64), None)
        if path is None:
            size = self.capacity * self.height * self.width * 3
            check_fits(size, f"a ReplayBuffer of {capacity} frames", "choose a smaller capacity, or a path")
            return
        self._writer = StoreWriter(
            path,
            height=self.height,
            width=self.width,
            action_dim=self.action_dim,
            columns=self.columns,
            metadata=json.dumps(metadata or {}),
        )
        self._store = Store(Path(path).absolute())
        self._state = self._with_new_of(self._store, self._state)

    def __reduce__(self) -> Any:
        raise TypeError("a ReplayBuffer belongs to its process; give others its store, or lewm.Dataset(path)")

    def __repr__(self) -> str:
        held = f"{self.frame_count} of {self.capacity} frames of {self.height}x{self.width}"
        return f"ReplayBuffer({len(self)} episodes, {held})"

    # --------------------------------------------------------------------------------------------------------- writing

    def start(self, frame: ArrayLike, columns: dict[str, ArrayLike] | None = None) -> None:
        """Starts an episode with its first frame; the one in progress is finished.

        Args:
            frame: uint8 of shape (H, W, 3).
            columns: For each column, its numbers (C,) at this frame.
        """
        frames, rows = self._frames(np.asarray(frame)[None]), self._rows(columns, 1, "")
        self.finish()
        self._open = _Recording(frames, rows, self.action_dim)
        self._state = self._trimmed(self._state, room=1)._replace(open=self._open)

    def add(self, action: ArrayLike, frame: ArrayLike, columns: dict[str, ArrayLike] | None = None) -> None:
        """Adds a step to the episode in progress.

        Args:
            action: What led to `frame`, finite numbers of shape (A,), raw.
            frame: uint8 of shape (H, W, 3).
            columns: For each column, its numbers (C,) at this frame.

        Raises:
            ValueError: An argument that is not that, an episode longer than `capacity`, or none in progress.
        """
        if self._open is None:
            raise ValueError("there is no episode to add to; start() begins one")
        frames = self._frames(np.asarray(frame)[None])
        actions = _numbers(np.asarray(action)[None], "action", (1, self.action_dim), np.float32)
        rows = self._rows(columns, 1, "")
        if self._open.count == self.capacity:
            raise ValueError(f"the episode in progress has {self.capacity} frames, which is all of the capacity")
        self._state = self._trimmed(self._state, room=self._open.count + 1)
        self._open.add(actions[0], frames[0], {name: row[0] for name, row in rows.items()})

    def finish(self) -> None:
        """Ends the episode in progress, if there is one. One of a single frame holds no step, and is dropped."""
        if self._open is None:
            return
        if self._open.count < 2:
            self._state = self._state._replace(open=None)
        else:
            self._keep(self._open.part(copy=True))
        self._open = None

    def append(self, frames: ArrayLike, actions: ArrayLike, columns: dict[str, ArrayLike] | None = None) -> None:
        """Adds a whole episode; the one in progress is finished first.

        Args:
            frames: uint8 of shape (N, H, W, 3), N from 2 to `capacity`. They are copied.
            actions: Finite numbers of shape (N-1, A), raw.
            columns: For each column, numbers of shape (N, C).
        """
        kept = self._frames(np.asarray(frames)).copy()
        count = len(kept)
        if not 2 <= count <= self.capacity:
            raise ValueError(f"frames must be 2 to {self.capacity}, the capacity, got {count}")
        numbers = _numbers(actions, "actions", (count - 1, self.action_dim), np.float32)
        part = _Part(kept, numbers, self._rows(columns, count, "s"))
        self.finish()
        self._keep(part)

    def close(self) -> None:
        """Finishes the episode in progress, and lets go of the store's files; what there is can still be read."""
        self.finish()
        if self._store is not None:
            self._writer.close()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, part: _Part) -> None:
        state = self._state._replace(open=None)
        if self._store is not None:
            self._writer.append(part.frames, part.actions, part.columns)
            self._state = self._with_new_of(self._store, state)
        else:
            state = self._trimmed(state, room=len(part.frames))
            lengths = np.append(state.lengths, len(part.frames))
            self._state = state._replace(parts=(*state.parts, part), lengths=lengths)

    def _with_new_of(self, store: Store, state: _State) -> _State:
        """`state` with what the store has beyond it; what would be dropped at once is not even read."""
        store.refresh()
        lengths = store.lengths
        known = state.first + len(state.parts)
        first = max(state.first, _oldest(lengths, self.capacity))
        new = (_Part(None, store.actions(number), None) for number in range(max(first, known), len(lengths)))
        return _State(first, (*state.parts[first - state.first :], *new), lengths[first:], state.open)

    def _trimmed(self, state: _State, room: int) -> _State:
        """`state` without the oldest episodes, so that there is room for so many frames more."""
        count = _oldest(state.lengths, self.capacity - room)
        first, lengths = state.first + count, state.lengths[count:]
        return _State(first, state.parts[count:], lengths, state.open) if count else state

    def _frames(self, frames: np.ndarray) -> np.ndarray:
        checked(frames, "frame")
        if frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(f"a frame must be of shape ({self.height}, {self.width}, 3), got {frames.shape[1:]}")
        return frames

    def _rows(self, columns: dict[str, ArrayLike] | None, count: int, plural: str) -> dict[str, np.ndarray]:
        columns = columns or {}
        if set(columns) != set(self.columns):
            raise ValueError(f"columns must be {sorted(self.columns)}, got {sorted(columns)}")
        values = columns if plural else {name: np.asarray(value)[None] for name, value in columns.items()}
        return {
            name: _numbers(values[name], f"columns[{name!r}]", (count, width), np.float64)
            for name, width in self.columns.items()
        }

    # --------------------------------------------------------------------------------------------------------- reading

    def snapshot(self) -> Snapshot:
        """The episodes there are now, as far as they go. It stays as it is, and keeps in memory what it has."""
        return Snapshot(self, self._state)

    @property
    def lengths(self) -> np.ndarray:
        """Frames of each episode there is now, int64 of shape (episodes,)."""
        return self.snapshot().lengths

    @property
    def first(self) -> int:
        """Number of the oldest episode there is now."""
        return self._state.first

    def windows(self, episodes: ArrayLike, frames: int, stride: int = 1) -> np.ndarray:
        return self.snapshot().windows(episodes, frames, stride)

    def batch(self, index: ArrayLike, frames: int, stride: int = 1) -> Batch:
        return self.snapshot().batch(index, frames, stride)

    def _read(
        self, index: np.ndarray, frames: int, stride: int, out: np.ndarray, threads: int | None = None
    ) -> np.ndarray:
        return self.snapshot()._read(index, frames, stride, out, threads)


class Snapshot(WindowSource):
    """What a `ReplayBuffer` held at one moment. Made by `ReplayBuffer.snapshot`."""

    def __init__(self, buffer: ReplayBuffer, state: _State) -> None:
        self.height, self.width, self.action_dim = buffer.height, buffer.width, buffer.action_dim
        self.columns, self._store, self._first = buffer.columns, buffer._store, state.first
        self._parts, self._lengths = state.parts, state.lengths
        if state.open:
            part = state.open.part()
            self._parts = (*self._parts, part)
            self._lengths = np.append(self._lengths, len(part.frames))

    @property
    def lengths(self) -> np.ndarray:
        """Frames of each episode, int64 of shape (episodes,)."""
        return self._lengths

    @property
    def first(self) -> int:
        """Number of the oldest episode."""
        return self._first

    def frames(self, episode: int) -> np.ndarray:
        """All frames of one episode, uint8 of shape (N, H, W, 3)."""
        return self.batch(self.windows([episode], 1), 1).frames[:, 0]

    def actions(self, episode: int) -> np.ndarray:
        """Raw actions of one episode, float32 of shape (N-1, A)."""
        return self._part(episode).actions.copy()

    def column(self, name: str, episode: int) -> np.ndarray:
        """A column of one episode, float64 of shape (N, C)."""
        if name not in self.columns:
            raise ValueError(f"name must be one of {sorted(self.columns)}, got {name!r}")
        columns = self._part(episode).columns
        if columns is not None:
            return columns[name].copy()
        assert self._store is not None
        return self._store.column(name, episode)

    def _part(self, episode: int) -> _Part:
        return self._parts[self._chosen([episode])[0] - self._first]

    def _read(
        self, index: np.ndarray, frames: int, stride: int, out: np.ndarray, threads: int | None = None
    ) -> np.ndarray:
        places = index[:, 0] - self._first
        memory = {place: self._parts[place].frames for place in set(places.tolist())}
        stored = np.array([memory[place] is None for place in places.tolist()], bool)
        if stored.all():
            if self._store is not None:
                read_windows(self._store, index, frames, stride, out, threads=threads)
        elif not stored.any():
            local = np.stack([places, index[:, 1]], axis=1)
            copy_episodes(memory, local, frames, stride, out, threads)
        else:  # the episode in progress, and others of the store
            for mine in (stored, ~stored):
                pixels = np.empty((int(mine.sum()), *out.shape[1:]), np.uint8)
                self._read(index[mine], frames, stride, pixels, threads)
                out[mine] = pixels
        steps = (frames - 1) * stride
        actions = np.empty((len(index), steps, self.action_dim), np.float32)
        for block, place, start in zip(actions, places, index[:, 1], strict=True):
            block[:] = self._parts[place].actions[start : start + steps]
        return actions


class _Part(NamedTuple):
    """An episode: N frames, N-1 actions, columns. One that a store has is without frames and columns."""

    frames: Any
    actions: np.ndarray
    columns: Any


class _State(NamedTuple):
    """Finished episodes, from number `first` on, and the one in progress."""

    first: int
    parts: tuple[_Part, ...]
    lengths: np.ndarray
    open: _Recording | None


class _Recording:
    """An episode in progress. Rows below `count` are never written again, so readers need no lock."""

    def __init__(self, frames: np.ndarray, columns: dict[str, np.ndarray], action_dim: int) -> None:
        self.count = 1
        self._frames = frames.copy()
        self._columns = {name: rows.copy() for name, rows in columns.items()}
        self._actions = np.empty((1, action_dim), np.float32)

    def add(self, action: np.ndarray, frame: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        if self.count == len(self._frames):  # readers keep the arrays that they have
            self._frames, self._actions = _doubled(self._frames), _doubled(self._actions)
            self._columns = {name: _doubled(rows) for name, rows in self._columns.items()}
        self._frames[self.count], self._actions[self.count - 1] = frame, action
        for name, row in columns.items():
            self._columns[name][self.count] = row
        self.count += 1  # last: from here on a reader may see the step

    def part(self, copy: bool = False) -> _Part:
        count = self.count  # first: the arrays hold at least as many
        frames, actions, columns = self._frames[:count], self._actions[: count - 1], self._columns
        rows = {name: values[:count] for name, values in columns.items()}
        if not copy:
            return _Part(frames, actions, rows)
        return _Part(frames.copy(), actions.copy(), {name: values.copy() for name, values in rows.items()})


def _doubled(rows: np.ndarray) -> np.ndarray:
    larger = np.empty((2 * len(rows), *rows.shape[1:]), rows.dtype)
    larger[: len(rows)] = rows
    return larger


def _oldest(lengths: np.ndarray, capacity: int) -> int:
    """The first of the newest episodes that fit."""
    return int((np.cumsum(lengths[::-1]) > capacity).sum())


def _numbers(values: ArrayLike, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        wanted = shape[1:] if shape[0] == 1 else shape
        got = array.shape[1:] if shape[0] == 1 else array.shape
        raise ValueError(f"{name} must be finite numbers of shape {wanted}, got {array.dtype} of shape {got}")
    return array.astype(dtype)
