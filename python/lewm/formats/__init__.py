"""Episodes in other programs' formats: one module each, with a `Source` that reads it and maybe a `write`.

A format is told by what a path holds, not by its name. Nothing of a file is executed: no format here unpickles.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Asked in this order; each module has `recognised(path)` and `Reader(path, **options)`.
FORMATS = ("hdf5", "lance", "lerobot", "minari", "swm_video", "videos")


class Source(ABC):
    """Recorded episodes, read one at a time. What cannot be used is said when it is opened, not halfway through.

    Attributes:
        path: What is read.
        format: Name of the format, as in `FORMATS`; with its version where it has several.
        lengths: Frames N of each episode, int64 of shape (episodes,), each at least 2.
        height, width: Size of a frame in pixels.
        action_dim: Width A of a raw action.
        columns: Name and width C of each further numeric column.
        left_out: For each part of the data that is not read, why: text, constant camera, episodes of one frame.
        lossless: Frames are stored as they were seen, not as JPEG or video.
        metadata: Plain JSON data: `action_low` and `action_high` (A numbers each) and `fps` where the format has them.
        bytes: Size of what is read, on disk.
    """

    path: Path
    format: str
    lengths: np.ndarray
    height: int
    width: int
    action_dim: int
    columns: dict[str, int]
    left_out: dict[str, str]
    lossless: bool
    metadata: dict[str, Any]
    bytes: int

    @abstractmethod
    def frames(self, episode: int) -> np.ndarray:
        """All frames of one episode, uint8 of shape (N, H, W, 3).

        Raises:
            ValueError: They are damaged, missing, or not as described; the text names path and episode.
        """

    @abstractmethod
    def actions(self, episode: int) -> np.ndarray:
        """Raw actions of one episode, float32 of shape (N-1, A): `actions[t]` leads from frame t to frame t+1."""

    @abstractmethod
    def column(self, name: str, episode: int) -> np.ndarray:
        """A column of one episode, float64 of shape (N, C)."""

    def close(self) -> None:  # noqa: B027
        """Lets go of files."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(path: str | os.PathLike[str], format: str | None = None, **options: Any) -> Source:
    """What is at `path`, as a `Source`.

    Args:
        path: File or folder.
        format: One of `FORMATS`; told by what is there when not given.
        options: `camera`: name of the image column, where there are several; `action`: name of the action column.

    Raises:
        FileNotFoundError: Nothing is there.
        ModuleNotFoundError: The library of this format is not installed; the text says how.
        ValueError: It is none of the formats, damaged, or without frames or actions.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    for name in FORMATS if format is None else (format,):
        module = module_of(name)
        if format is not None or module.recognised(path):
            return module.Reader(path, **options)
    raise ValueError(f"{path} is none of the formats that are read: {', '.join(FORMATS)}")


def module_of(format: str) -> ModuleType:
    """The module of a format. It imports its library when it opens something, not before."""
    return import_module(f"lewm.formats.{format}")


def needed(name: str, what: str) -> ModuleType:
    """The library `name`, which reads or writes `what`.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{what} needs {error.name}: pip install "lewm-fast[data]"') from error


def actions_of(rows: np.ndarray, what: str) -> np.ndarray:
    """The N-1 actions among N rows, float32: the last row leads nowhere, many recorders write NaN there.

    Args:
        rows: Numbers of shape (N, A) or (N,).
        what: Path and episode, for the error.

    Raises:
        ValueError: They are no finite numbers.
    """
    rows = np.asarray(rows)
    if rows.dtype.kind not in "fiu" or rows.ndim not in (1, 2):
        raise ValueError(f"actions of {what} must be numbers of shape (N, A), got {rows.dtype} of shape {rows.shape}")
    actions = rows.reshape(len(rows), -1)[:-1].astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(actions).all(axis=1))
    if len(bad):
        raise ValueError(f"actions of {what} must be finite, row {bad[0]} of {len(rows)} is {rows[bad[0]].tolist()}")
    return actions


def frames_of(frames: np.ndarray, what: str, shape: tuple[int, int, int]) -> np.ndarray:
    """`frames`, checked: uint8 of shape (N, H, W, 3), with `shape` (N, H, W).

    Raises:
        ValueError: They are not; the text has `what`, path and episode.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.shape != (*shape, 3):
        raise ValueError(
            f"frames of {what} must be uint8 of shape {(*shape, 3)}, got {frames.dtype} of shape {frames.shape}"
        )
    return frames


def numeric(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str | None:
    """Why rows of this type and shape (without the first axis) are no column of a store; None if they can be."""
    if dtype.kind not in "fiub":
        return f"{dtype} is no number"
    if len(shape) > 1 or (shape and not 1 <= shape[0] <= 4096):
        return f"rows of shape {shape} are no vector of 1 to 4096 numbers"
    return None
