import os
from collections.abc import Callable
from typing import Literal, TypedDict, final, type_check_only

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Store",
    "StoreError",
    "StoreWriter",
    "__version__",
    "cem",
    "noise",
    "philox",
    "repair_store",
    "verify_store",
]

__version__: str

class StoreError(Exception):
    """A trajectory store whose bytes are not what was committed."""

@type_check_only
class _CemResult(TypedDict):
    actions: NDArray[np.float64]
    cost: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    elite_cost: NDArray[np.float64]
    iterations: int
    trace: NDArray[np.float64]
    clipped: NDArray[np.float64]
    deadline_hit: bool

def philox(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10 words (N, 4) of counters (N, 4) under a key (2,), all uint32."""

def noise(seed: int, env_ids: ArrayLike, plan: int, iteration: int, samples: int, width: int) -> NDArray[np.float64]:
    """Standard normal noise (E, S, width) of one planner iteration; layout in `rust/core/src/rng.rs`."""

def cem(
    cost: Callable[[NDArray], ArrayLike],
    mean: ArrayLike,
    *,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    samples: int,
    iterations: int,
    elites: int,
    init_std: float = 1.0,
    min_std: float = 0.05,
    seed: int = 0,
    env_ids: ArrayLike | None = None,
    plan: int = 0,
    reference: bool = False,
    dtype: Literal["float32", "float64"] = "float32",
    noise: ArrayLike | None = None,
    deadline: float | None = None,
) -> _CemResult:
    """Cross-entropy method over plans (E, H, A); `help(lewm._core.cem)` tells all.

    `cost` gets a new C-contiguous array (E, S, H, A) of `dtype` and returns (E, S). `mean` is (E, H, A), `low` and
    `high` (A,), `env_ids` (E,), `noise` (iterations, E, S, H, A), `deadline` seconds.
    """

@final
class Store:
    """Reads a trajectory store; `lewm.Dataset` is the friendly face of it.

    Args:
        path: Folder of the store.
        skip_damaged: Check every byte now and leave out damaged episodes, see `skipped`.
    """

    def __new__(cls, path: str | os.PathLike[str], *, skip_damaged: bool = False) -> Store: ...
    def __len__(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode (episodes,)."""
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def columns(self) -> dict[str, int]:
        """Name and width of each further column."""
    @property
    def metadata(self) -> str:
        """The JSON object of whoever created the store."""
    @property
    def skipped(self) -> list[str]:
        """What was left out as damaged, in words."""
    def frames(self, episode: int, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames (K, H, W, 3) of one episode at `indices` (K,)."""
    def actions(self, episode: int) -> NDArray[np.float32]:
        """Actions (N-1, A) of one episode."""
    def column(self, name: str, episode: int) -> NDArray[np.float64]:
        """A column (N, C) of one episode."""
    def windows(
        self,
        episodes: NDArray[np.int64],
        starts: NDArray[np.int64],
        length: int,
        stride: int,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Windows (B, length, H, W, 3) of frames `stride` apart, from `starts` (B,) of `episodes` (B,).

        They go into `out` where it is given, which saves the system making memory for every batch.
        """
    def fingerprint(self) -> str:
        """A hexadecimal number of schema and content of all episodes in their order."""
    def refresh(self) -> int:
        """Looks for episodes committed since; returns how many it found."""

@final
class StoreWriter:
    """Appends episodes to a trajectory store, which it creates where there is none.

    Args:
        path: Folder of the store.
        height, width: Size of a frame in pixels.
        action_dim: Width A of a raw action.
        columns: Name and width C of each further column.
        metadata: A JSON object, as text. An existing store keeps the one it has.

    Raises:
        ValueError: The store there has another height, width, action_dim or columns.
    """

    def __new__(
        cls,
        path: str | os.PathLike[str],
        *,
        height: int,
        width: int,
        action_dim: int,
        columns: dict[str, int],
        metadata: str,
    ) -> StoreWriter: ...
    def append(self, frames: NDArray[np.uint8], actions: ArrayLike, columns: dict[str, ArrayLike]) -> int:
        """Appends an episode; it is committed, and on the disk, when this returns its number.

        Episodes that other writers append at the same time are not counted in it.

        Args:
            frames: uint8 of shape (N, height, width, 3), N at least 2.
            actions: Finite real numbers of shape (N-1, A), kept as float32.
            columns: For each column finite real numbers of shape (N, C), kept as float64.

        Raises:
            ValueError: An argument is not that; nothing is written.
            OSError: The disk refused; the episode may or may not be there, whole.
        """
    def close(self) -> None: ...
    def __enter__(self) -> StoreWriter: ...
    def __exit__(self, *_args: object) -> None: ...

def verify_store(
    path: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None
) -> tuple[int, int, list[str], list[str]]:
    """Decodes every byte of a store and compares it with every checksum, beside writers too.

    Args:
        path: Folder of the store.
        progress: Called with the bytes checked and those there are, after each episode.

    Returns:
        Committed episodes and their frames, the damage in words, and what is there besides and does no harm.

    Raises:
        StoreError: There is no store, nor the rest of one.
    """

def repair_store(
    path: str | os.PathLike[str], *, dry_run: bool = False, progress: Callable[[int, int], object] | None = None
) -> tuple[int, int, list[str]]:
    """Keeps every whole episode of a store and moves what is replaced or unreadable into its folder `damaged`.

    Args:
        path: Folder of the store.
        dry_run: Say what would be done, and do nothing.
        progress: Called with the bytes checked and those there are, after each episode.

    Returns:
        Episodes and frames that the store then has, and the changes in words.

    Raises:
        ValueError: A writer has the store open.
        StoreError: Nothing there tells what the episodes look like.
    """
