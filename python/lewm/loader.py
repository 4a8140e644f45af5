"""Training windows in batches: in which order, decoded ahead by Rust threads, resumable at any batch."""

from __future__ import annotations

import os
import sys
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lewm._core import WindowOrder, copy_windows
from lewm.checks import integer


class Batch(NamedTuple):
    """B windows of T frames, `stride` raw steps apart.

    Attributes:
        frames: uint8 of shape (B, T, H, W, 3).
        actions: Raw actions between them, float32 of shape (B, T-1, stride*A).
    """

    frames: Any
    actions: Any


class WindowSource(ABC):
    """Episodes that windows are cut from; `lewm.Dataset`, `lewm.ReplayBuffer` and its snapshots are such.

    Attributes:
        height, width: Size of a frame in pixels.
        action_dim: Width A of one raw action.
        columns: Name and width of each column that is kept beside frames and actions.
        growing: Whether episodes come and go, so that what there is has to be looked up for every batch.
    """

    height: int
    width: int
    action_dim: int
    columns: dict[str, int]
    growing = False

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Frames of each episode, int64 of shape (episodes,)."""

    @property
    def first(self) -> int:
        """Number of the first episode; the others follow."""
        return 0

    @abstractmethod
    def _read(
        self, index: np.ndarray, frames: int, stride: int, out: np.ndarray, threads: int | None = None
    ) -> np.ndarray:
        """Decodes windows that are known to be there into `out`, and returns their actions (B, (T-1)*stride, A)."""

    def snapshot(self) -> WindowSource:
        """The episodes there are now, which stay as they are; itself, if they do anyway."""
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def frame_count(self) -> int:
        """Frames of all episodes."""
        return int(self.lengths.sum())

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
        chosen, counts = self._counts(episodes, frames, stride)
        starts = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([np.repeat(chosen, counts), starts], axis=1)

    def batch(self, index: ArrayLike, frames: int, stride: int = 1) -> Batch:
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
        index = integers("index", index, 2)
        if index.shape[1] != 2:
            raise ValueError(f"index must be of shape (B, 2), got {index.shape}")
        frames, stride = integer("frames", frames, 1), integer("stride", stride, 1)
        episodes, starts = index.T
        self._chosen(episodes)
        lengths = self.lengths[episodes - self.first]
        outside = np.flatnonzero((starts < 0) | (starts >= lengths - _span(frames, stride)))
        if len(outside):
            (episode, start), length = index[outside[0]], lengths[outside[0]]
            raise IndexError(
                f"episode {episode} has {length} frames: no window of {frames} at stride {stride} starts at {start}"
            )
        pixels = np.empty((len(index), frames, self.height, self.width, 3), np.uint8)
        actions = self._read(index, frames, stride, pixels)
        return Batch(pixels, actions.reshape(len(index), frames - 1, stride * self.action_dim))

    def loader(
        self,
        batch_size: int,
        frames: int,
        stride: int = 1,
        *,
        episodes: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        threads: int | None = None,
        prefetch: int = 2,
        tensors: bool | None = None,
        pin_memory: bool | None = None,
        transform: Callable[[Batch], Any] | None = None,
    ) -> Loader:
        """Batches of windows for training, decoded ahead in the background; see `Loader`.

        Args:
            batch_size: Windows B of a batch.
            frames: Frames T of a window.
            stride: Raw steps from one frame of a window to the next: a model's `action_block`.
            episodes: Numbers of the episodes (n,), such as one part of `split`; all by default.
            weights: Draw windows with replacement, in proportion to these: one for each of `episodes`, which each of
                its windows has, or one for each row of `windows(episodes, frames, stride)`. (Where there are as many
                of both, the former.) By default an epoch has every window once.
            seed: Of the order, from 0 to 2**64 - 1.
            shuffle: Another order in every epoch; else that of `windows`.
            drop_last: Leave out the last windows of an epoch where they do not fill a batch.
            threads: Most threads that decode; `LEWM_NUM_THREADS`, else every core, by default.
            prefetch: Batches to have ready or in work while the caller is busy.
            tensors: Give torch tensors rather than NumPy arrays; by default where torch is installed.
            pin_memory: Give tensors in page-locked memory, from which a GPU copies asynchronously; by default where
                torch has CUDA.
            transform: Called with each `Batch` in the background; what it returns is given instead.

        Raises:
            ValueError: An argument out of its domain, or no window or not enough for a batch.
            ImportError: `tensors` or `pin_memory` without torch.
        """
        return Loader(
            self,
            integer("batch_size", batch_size, 1),
            integer("frames", frames, 1),
            integer("stride", stride, 1),
            episodes=episodes,
            weights=weights,
            seed=integer("seed", seed, 0, 2**64),
            shuffle=shuffle,
            drop_last=drop_last,
            threads=None if threads is None else integer("threads", threads, 1),
            prefetch=integer("prefetch", prefetch, 0),
            tensors=tensors,
            pin_memory=pin_memory,
            transform=transform,
        )

    def _numbers(self) -> np.ndarray:
        return np.arange(self.first, self.first + len(self.lengths))

    def _chosen(self, episodes: ArrayLike) -> np.ndarray:
        chosen, end = integers("episodes", episodes, 1), self.first + len(self.lengths)
        if len(chosen) and not self.first <= chosen.min() <= chosen.max() < end:
            raise IndexError(
                f"episodes must be from {self.first} to {end - 1}, got {chosen.min()} to {chosen.max()}"
                if end > self.first
                else f"there are no episodes, got {chosen.min()} to {chosen.max()}"
            )
        return chosen

    def _counts(self, episodes: ArrayLike, frames: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of each of the episodes, and the episodes' numbers."""
        chosen = self._chosen(episodes)
        needed = _span(integer("frames", frames, 1), integer("stride", stride, 1)) + 1
        lengths = self.lengths[chosen - self.first]
        counts = np.maximum(lengths - needed + 1, 0)
        if not counts.any():
            longest = f"the longest of {len(chosen)} has {lengths.max()}" if len(chosen) else "there are no episodes"
            raise ValueError(f"no window of {frames} frames at stride {stride}: it needs {needed} frames, {longest}")
        return chosen, counts


class Loader:
    """Batches of training windows: iterate over it, epoch after epoch.

    Made by `Dataset.loader` or `ReplayBuffer.loader`. Each batch is a `Batch`, `frames, actions = batch`, and stays as
    it is for as long as it is held. Batches are decoded in a background thread, which lets Rust threads work without
    the GIL, at most `prefetch` ahead. Threads begin with an iteration and end with it, however it ends; nothing of them
    is left that a fork could break.

    The batches of an epoch are a function of (windows, seed, epoch), whatever the threads. Each iteration is one epoch
    and the next iteration the next one, also if it was broken off; `set_epoch` and `load_state_dict` choose where the
    next iteration begins. A `ReplayBuffer` has no epochs: its iterations never end, and each batch is drawn with
    replacement from the windows that are there when the batch is made.

    `torch.utils.data.DataLoader(loader, batch_size=None)` takes it as an `IterableDataset`. The threads are inside, so
    `num_workers=0` is right; each of several workers reads every n-th batch, which gives the same batches in the same
    order, but epoch and position are those of the workers' copies: call `set_epoch` before every epoch.
    """

    def __init__(
        self,
        source: WindowSource,
        batch_size: int,
        frames: int,
        stride: int,
        *,
        episodes: ArrayLike | None,
        weights: ArrayLike | None,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        threads: int | None,
        prefetch: int,
        tensors: bool | None,
        pin_memory: bool | None,
        transform: Callable[[Batch], Any] | None,
    ) -> None:
        self._source, self.batch_size, self.frames, self.stride = source, batch_size, frames, stride
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self._threads, self._prefetch, self._transform = threads, prefetch, transform
        self._tensors = (find_spec("torch") is not None) if tensors is None else tensors
        if pin_memory and not self._tensors:
            raise ValueError("pin_memory is True, which wants torch tensors; got tensors=False, or there is no torch")
        self._pin_memory = pin_memory
        self._epoch = self._batch = 0
        self._resumed = False
        if source.growing:
            for name, value, plain in (
                ("episodes", episodes, None),
                ("weights", weights, None),
                ("shuffle", shuffle, True),
                ("drop_last", drop_last, True),
            ):
                if value is not plain:
                    raise ValueError(
                        f"{name} must be {plain} for what grows; take the loader of its snapshot() instead"
                    )
            self._windows: tuple[np.ndarray, np.ndarray] | None = None
            self._weights = None
        else:
            self._windows = source._counts(source._numbers() if episodes is None else episodes, frames, stride)
            self._weights = None if weights is None else np.asarray(weights, np.float64)
            if self._weights is not None and self._weights.ndim != 1:
                raise ValueError(f"weights must be of one dimension, got shape {self._weights.shape}")
            count = len(self._ordered(*self._windows, self._weights))
            if drop_last and count < batch_size:
                raise ValueError(f"batch_size is {batch_size}, but there are only {count} windows for a whole batch")
            self._length = count // batch_size if drop_last else -(-count // batch_size)
        self._registered()

    # ------------------------------------------------------------------------------------------------- where it stands

    def __len__(self) -> int:
        """Batches of an epoch."""
        if self._windows is None:
            raise TypeError("the batches of what grows never end: they have no number")
        return self._length

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """The next iteration begins with this batch of this epoch."""
        end = None if self._windows is None else self._length + 1
        self._epoch, self._batch = integer("epoch", epoch, 0, 2**32), integer("batch", batch, 0, end)
        self._resumed = True

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, after the last batch that was given out, and what it must agree on; plain JSON data."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on with the batch that comes after `state`.

        Raises:
            ValueError: It is of a loader with other windows or in another order.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"state is of a loader with {name} {state.get(name)!r}; this has {value!r}")
        self.set_epoch(state["epoch"], state["batch"])

    def _identity(self) -> dict[str, Any]:
        windows = None
        if self._windows is not None:
            parts = (*self._windows, *([] if self._weights is None else [self._weights]))
            windows = f"{self._windows[1].sum()} ({zlib.crc32(b''.join(part.tobytes() for part in parts)):08x})"
        names = ("batch_size", "frames", "stride", "seed", "shuffle", "drop_last")
        return {**{name: getattr(self, name) for name in names}, "windows": windows}

    # ----------------------------------------------------------------------------------------------------- the batches

    def __iter__(self) -> Iterator[Any]:
        if self._batch and not self._resumed:
            self._epoch, self._batch = self._epoch + 1, 0
        self._resumed = False
        return self._iterate(self._epoch, self._batch)

    def _iterate(self, epoch: int, first: int) -> Iterator[Any]:
        worker, step = _worker()
        end = sys.maxsize if self._windows is None else self._length
        order = None if self._windows is None else self._ordered(*self._windows, self._weights)
        pin = self._pins(worker is not None)
        memory: deque[np.ndarray] = deque(maxlen=1 + self._prefetch)  # free to be written to
        given = ahead = first + (worker or 0)
        pending: deque[Future[Any]] = deque()
        pool: ThreadPoolExecutor | None = None
        pid = 0
        try:
            while given < end:
                if (
                    pool is None or pid != os.getpid()
                ):  # the first batch, or the first in a forked process, where the thread is not
                    pool, pid = ThreadPoolExecutor(1, "lewm-loader"), os.getpid()
                    pending.clear()
                    ahead = given
                while len(pending) <= self._prefetch and ahead < end:
                    pending.append(pool.submit(self._make, order, epoch, ahead, memory, pin))
                    ahead += step
                batch = pending.popleft().result()
                given += step
                self._epoch, self._batch = (epoch, given) if given < end else (epoch + 1, 0)
                yield batch
                del batch  # its memory may be free by now
        finally:
            if pool and pid == os.getpid():
                pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, order: WindowOrder | None, epoch: int, place: int, memory: deque[np.ndarray], pin: bool) -> Any:
        """One batch; in the background."""
        source = self._source
        if order is None:
            source = source.snapshot()
            numbers, counts = source._counts(source._numbers(), self.frames, self.stride)
            order = self._ordered(numbers, counts, np.ones(len(numbers)))
            count = self.batch_size
        else:
            count = min(self.batch_size, len(order) - place * self.batch_size)
        index = order.windows(epoch, place * self.batch_size, count)
        frames, out = self._memory((count, self.frames, source.height, source.width, 3), memory, pin)
        actions: Any = source._read(index, self.frames, self.stride, out, self._threads)
        actions = actions.reshape(count, self.frames - 1, self.stride * source.action_dim)
        if self._tensors:
            import torch

            actions = torch.from_numpy(actions)
            actions = actions.pin_memory() if pin else actions
        batch = Batch(frames, actions)
        return self._transform(batch) if self._transform else batch

    def _memory(self, shape: tuple[int, ...], free: deque[np.ndarray], pin: bool) -> tuple[Any, np.ndarray]:
        """Memory of a batch's frames, as it is given out and as it is written to.

        Faulting in new memory takes a tenth of the time that decoding takes (224 px; of copying, almost half), so
        memory is used again. Page-locked memory is torch's to use again: it knows when a GPU has done copying.
        """
        if pin:
            import torch

            tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return tensor, tensor.numpy()
        try:
            array = free.pop()
        except IndexError:
            array = None
        if array is None or array.shape != shape:
            array = np.empty(shape, np.uint8)
        array = np.asarray(_Lease(free, array))
        if not self._tensors:
            return array, array
        import torch

        return torch.from_numpy(array), array

    def _ordered(self, episodes: np.ndarray, counts: np.ndarray, weights: np.ndarray | None) -> WindowOrder:
        return WindowOrder(episodes, counts, seed=self.seed, shuffle=self.shuffle, weights=weights)

    def _pins(self, within_a_worker: bool) -> bool:
        """Whether to page-lock memory. A worker process must leave that to the DataLoader: it may have no CUDA."""
        if not self._tensors or self._pin_memory is False or within_a_worker:
            return False
        import torch

        found = torch.cuda.is_available()
        if self._pin_memory and not found:
            raise ValueError("pin_memory is True, but torch has no CUDA here")
        return found

    def _registered(self) -> None:
        """Makes DataLoader take it as what it is, without importing torch for those who do without."""
        if self._tensors or sys.modules.get("torch"):
            from torch.utils.data import IterableDataset

            IterableDataset.register(Loader)


class _Lease:
    """Memory that is free again when the last array or tensor over it is gone: NumPy makes this their base."""

    def __init__(self, free: deque[np.ndarray], array: np.ndarray) -> None:
        self._free, self._array = free, array
        self.__array_interface__ = array.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._array)


def _span(frames: int, stride: int) -> int:
    """Raw steps from the first frame of a window to its last; no more than fits an int64."""
    return min((frames - 1) * stride, 2**62)


def _worker() -> tuple[int | None, int]:
    """Which DataLoader worker this process is, None for none, and of how many."""
    torch_data = sys.modules.get("torch.utils.data")
    info = torch_data.get_worker_info() if torch_data else None
    return (info.id, info.num_workers) if info else (None, 1)


def copy_episodes(
    memory: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    index: np.ndarray,
    frames: int,
    stride: int,
    out: np.ndarray,
    threads: int | None,
) -> None:
    """`read_windows` where `memory` has all frames (N, H, W, 3) of each episode."""
    episodes, places = np.unique(index[:, 0], return_inverse=True)
    index = np.stack([places.reshape(-1), index[:, 1]], axis=1)
    copy_windows([memory[episode] for episode in episodes], index, frames, stride, out, threads=threads)


def integers(name: str, values: ArrayLike, dimensions: int) -> np.ndarray:
    """`values` as an int64 array of so many dimensions.

    Raises:
        ValueError: They are not that.
    """
    array = np.asarray(values)
    if array.ndim != dimensions or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a {dimensions}-d array of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
