import os
from collections.abc import Callable
from typing import TypedDict, final, type_check_only

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Engine",
    "Objective",
    "Planner",
    "Store",
    "StoreError",
    "StoreWriter",
    "WindowOrder",
    "__version__",
    "copy_windows",
    "noise",
    "philox",
    "read_tensors",
    "read_windows",
    "repair_store",
    "sigreg_backward",
    "sigreg_directions",
    "sigreg_forward",
    "verify_store",
]

__version__: str

class StoreError(Exception):
    """A trajectory store whose bytes are not what was committed."""

@type_check_only
class _Found(TypedDict):
    actions: NDArray[np.float64]
    cost: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    elite_cost: NDArray[np.float64]
    iterations: int
    trace: NDArray[np.float64]
    kept: NDArray[np.float64]
    clipped: NDArray[np.float64]
    deadline_hit: bool

def philox(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10 words (N, 4) of counters (N, 4) under a key (2,), all uint32."""

def noise(seed: int, env_ids: ArrayLike, plan: int, iteration: int, samples: int, width: int) -> NDArray[np.float32]:
    """Standard normal noise (E, S, width) of one planner iteration; layout in `rust/core/src/rng/mod.rs`."""

@final
class Planner:
    """CEM, iCEM or MPPI over plans (E, H, A), and its memory; `help(lewm._core.Planner)` tells all.

    `reference` is for "cem"; "icem" needs `beta`, `factor`, `keep` and `momentum`, "mppi" needs `temperature`.
    """

    def __new__(
        cls,
        name: str,
        *,
        samples: int,
        iterations: int,
        elites: int,
        init_std: float = 1.0,
        min_std: float = 0.05,
        dtype: str = "float32",
        reference: bool | None = None,
        beta: float | None = None,
        factor: float | None = None,
        keep: float | None = None,
        momentum: float | None = None,
        temperature: float | None = None,
    ) -> Planner: ...
    @property
    def kept(self) -> int:
        """Elites of each environment that a plan hands to the next, 0 unless it is "icem"."""

    def solve(
        self,
        cost: Callable[[NDArray], ArrayLike] | Objective,
        mean: ArrayLike,
        *,
        low: ArrayLike | None = None,
        high: ArrayLike | None = None,
        seed: int = 0,
        env_ids: ArrayLike | None = None,
        plan: int = 0,
        kept: ArrayLike | None = None,
        noise: ArrayLike | None = None,
        deadline: float | None = None,
    ) -> _Found:
        """Plans. `cost` gets a new C-contiguous array (E, S, H, A) of the planner's dtype and returns (E, S); an
        `Objective` is run without Python, for dtype "float32".

        `mean` is (E, H, A), `low` and `high` (A,), `env_ids` (E,), `kept` (E, K, H, A), `deadline` seconds, `noise`
        (iterations, E, S, H, A).
        """

@final
class Engine:
    """A model on this processor: encoder and rollout, without torch. Arrays are C-contiguous float32 unless said.

    Args:
        config: The integers and flags of a `ModelConfig`, and `block_dim`.
        weights: float32 arrays under the official names.
        precision: Of the rollout; frames are encoded in float32.
        cpu: One of `instruction_sets(precision)`; the best by default.
        threads: By default those of the process: LEWM_NUM_THREADS, else what machine and cgroup allow.

    Raises:
        KeyError, TypeError, ValueError: Something is missing, or not as described; the text names it.
    """

    def __new__(
        cls,
        config: dict[str, int],
        weights: dict[str, NDArray[np.float32]],
        *,
        precision: str = "float32",
        cpu: str | None = None,
        threads: int | None = None,
    ) -> Engine: ...
    @staticmethod
    def instruction_sets(precision: str) -> list[str]:
        """Names of the instruction sets that this processor has for a precision, the best first."""
    @property
    def precision(self) -> str:
        """Of the rollout: "float32", "bfloat16" or "int8"."""
    @property
    def cpu(self) -> str:
        """The instruction set of the rollout."""
    @property
    def threads(self) -> int:
        """Threads that work."""
    def peak(self) -> float:
        """The most operations a second of all threads with the rollout's instructions, registers only, best of 5."""
    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, size, size, 3) -> (N, D)."""
    def rollout(
        self, z: NDArray[np.float32], candidates: NDArray[np.float32], past: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """(E, T, D), (E, S, H, A), (E, T - 1, A) -> (E, S, T + H, D)."""
    def head(self, name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, inputs) -> (N, outputs) of the head "distance_head", D to D, or "action_prior", 2 D to blocks."""
    def costs(
        self,
        z: NDArray[np.float32],
        goal: NDArray[np.float32],
        candidates: NDArray[np.float32],
        past: NDArray[np.float32] | None = None,
        cost: str = "latent",
    ) -> NDArray[np.float64]:
        """(E, S): the squared distance of the last latent to `goal` (E, D), summed over D; with "distance" the blocks
        between them that the model's distance head estimates."""
    def objective(
        self,
        z: NDArray[np.float32],
        goal: NDArray[np.float32],
        past: NDArray[np.float32] | None = None,
        cost: str = "latent",
    ) -> Objective:
        """`costs` with all but the candidates given, for `Planner.solve`."""

@final
class Objective:
    """What plans cost an engine's model; `Planner.solve` runs it without Python."""

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
    def close(self) -> None:
        """Lets go of the store, which has all that was appended; closing twice does no harm."""
    def __enter__(self) -> StoreWriter: ...
    def __exit__(self, *_args: object) -> None: ...

@final
class WindowOrder:
    """Which window has which place in an epoch: a function of (seed, epoch, place), see `rust/core/src/loader.rs`.

    Args:
        episodes: Numbers of the episodes (n,).
        counts: Windows of each (n,).
        seed: Of the permutation and of the draws, from 0 to 2**64 - 1.
        shuffle: Every epoch is another permutation; else the windows come in order.
        weights: Draw with replacement instead, in proportion to these: one for each episode, which each of its windows
            has, or one for each window.
    """

    def __new__(
        cls,
        episodes: NDArray[np.int64],
        counts: NDArray[np.int64],
        *,
        seed: int,
        shuffle: bool,
        weights: NDArray[np.float64] | None = None,
    ) -> WindowOrder: ...
    def __len__(self) -> int:
        """Windows, and places in an epoch."""
    def windows(self, epoch: int, first: int, count: int) -> NDArray[np.int64]:
        """(episode, start) (count, 2) at the places from `first` on; draws go on beyond the end."""

def read_windows(
    store: Store,
    index: NDArray[np.int64],
    length: int,
    stride: int,
    out: NDArray[np.uint8],
    *,
    threads: int | None = None,
) -> None:
    """Decodes windows, (episode, start) rows of `index` (B, 2), into a contiguous `out` (B, length, H, W, 3).

    `threads` is the most to use; `LEWM_NUM_THREADS`, else every core, when not given. The GIL is released.
    """

def copy_windows(
    parts: list[NDArray[np.uint8]],
    index: NDArray[np.int64],
    length: int,
    stride: int,
    out: NDArray[np.uint8],
    *,
    threads: int | None = None,
) -> None:
    """`read_windows` of `parts`, contiguous episodes (N, H, W, 3): `index` (B, 2) has (part, start)."""

def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[str | None, list[tuple[str, str, list[int], NDArray[np.uint8]]]]:
    """The `lewm` entry of a safetensors file, and name, dtype, shape and bytes of its tensors.

    Raises:
        ValueError: It is not a safetensors file.
        OSError: It cannot be read.
    """

def sigreg_directions(seed: int, step: int, count: int, dim: int) -> NDArray[np.float32]:
    """The unit directions of a key in rows, (P, D); see `lewm.losses.Directions`.

    Raises:
        TypeError, ValueError: An argument is no number, or outside its range; the text names it.
    """

def sigreg_forward(
    z: NDArray[np.float32],
    directions: NDArray[np.float32] | tuple[int, int],
    statistic: NDArray[np.float32],
    ecf: NDArray[np.float32],
) -> None:
    """Writes the Epps-Pulley statistic (T, P) and the empirical characteristic function (T, 2, K - 1, P) of z (T, B, D)
    along directions (D, P), or those of a key (seed, step), see `lewm.losses`. Arrays are C-contiguous; the GIL is
    released.

    Raises:
        ValueError: An array is empty, not contiguous or of another shape; the text names it.
    """

def sigreg_backward(
    z: NDArray[np.float32],
    directions: NDArray[np.float32] | tuple[int, int],
    ecf: NDArray[np.float32],
    statistic_grad: NDArray[np.float32] | None,
    ecf_grad: NDArray[np.float32] | None,
    z_grad: NDArray[np.float32],
) -> None:
    """Writes the gradient of z into `z_grad` (T, B, D), from those of `sigreg_forward`'s results (None is zero).

    Raises:
        ValueError: As `sigreg_forward`.
    """

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
