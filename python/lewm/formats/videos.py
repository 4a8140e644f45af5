"""A folder of videos, one an episode, and the actions of each in a file of the same name: NAME.npy, .npz or .csv.

There is a row for each frame but the last, or for each frame; then the last row leads nowhere. In a `.npz` the array
`action` or `actions` (or the one called by `action=`) has them, and others with a row for each frame are columns. A
`.csv` has numbers with commas between them, one line a row, under a line of names or none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lewm.formats import Source, actions_of, frames_of, numeric, video

_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_ACTIONS = (".npy", ".npz", ".csv")


def recognised(path: Path) -> bool:
    """Whether this is a folder with a video and its actions."""
    return path.is_dir() and any(_beside(found) is not None for found in _videos(path))


class Reader(Source):
    """See `lewm.formats.Source`.

    Args:
        path: The folder.
        camera: Not for a folder of videos, where each has one.
        action: Name of the array with the actions, where they are in `.npz` files.
    """

    def __init__(self, path: Path, *, camera: str | None = None, action: str | None = None) -> None:
        if camera is not None:
            raise ValueError(f"camera must not be given for a folder of videos, one camera each, got {camera!r}")
        self.path, self.format, self.lossless = path, "videos", False
        self._videos = _videos(path)
        if not self._videos:
            raise ValueError(f"{path} has no videos: files that end in {', '.join(_VIDEOS)}")
        self.left_out = {}
        lengths, self._actions, self._columns, rates = [], [], [], set()
        for index, file in enumerate(self._videos):
            height, width, fps, count = video.size(file)
            count = video.count(file) if count is None else count
            rates.add(fps)
            if index == 0:
                self.height, self.width = height, width
            if (height, width) != (self.height, self.width):
                raise ValueError(
                    f"{file} is {height}x{width}, {self._videos[0].name} {self.height}x{self.width}: want one size"
                )
            rows, columns = _rows(file, action)
            if count < 2 or len(rows) not in (count - 1, count):
                raise ValueError(
                    f"{file} has {count} frames and {_beside(file)} {len(rows)} rows of actions: want a row for each "
                    f"frame or for each but the last; is the video cut short?"
                )
            if len(rows) == count - 1:
                rows = np.concatenate([rows, rows[-1:]])
            actions = actions_of(rows, str(file))
            if index and actions.shape[1] != self._actions[0].shape[1]:
                raise ValueError(
                    f"actions of {file} have {actions.shape[1]} columns, of {self._videos[0].name} "
                    f"{self._actions[0].shape[1]}"
                )
            lengths.append(count)
            self._actions.append(actions)
            self._columns.append(columns)
        self.lengths = np.array(lengths, np.int64)
        self.action_dim = self._actions[0].shape[1]
        self.columns = {}
        for name in sorted({name for columns in self._columns for name in columns}):
            why = self._no_column(name)
            if why is None:
                self.columns[name] = int(np.prod(self._columns[0][name].shape[1:], dtype=int))
            else:
                self.left_out[name] = why
        self.metadata = {"fps": rates.pop()} if len(rates) == 1 and rates != {0} else {}
        parts = [part for file in self._videos for part in (file, _beside(file)) if part is not None]
        self.bytes = sum(part.stat().st_size for part in parts)

    def frames(self, episode: int) -> np.ndarray:
        file = self._videos[episode]
        frames = video.frames(file)
        return frames_of(frames, str(file), (int(self.lengths[episode]), self.height, self.width))

    def actions(self, episode: int) -> np.ndarray:
        return self._actions[episode]

    def column(self, name: str, episode: int) -> np.ndarray:
        rows = self._columns[episode][name]
        return rows.reshape(len(rows), -1).astype(np.float64)

    def _no_column(self, name: str) -> str | None:
        first = self._columns[0].get(name)
        for file, length, columns in zip(self._videos, self.lengths, self._columns, strict=True):
            if name not in columns or first is None:
                return "not in every episode"
            rows = columns[name]
            if rows.ndim == 0 or len(rows) != length:
                return f"not a row for each frame of {file.name}"
            if rows.shape[1:] != first.shape[1:]:
                return f"of another shape in {file.name}"
            if why := numeric(rows.dtype, rows.shape[1:]):
                return why
        return None


def _videos(path: Path) -> list[Path]:
    """The videos, 2.mp4 before 10.mp4."""

    def order(file: Path) -> list[Any]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]

    return sorted((file for file in path.iterdir() if file.suffix.lower() in _VIDEOS and file.is_file()), key=order)


def _beside(file: Path) -> Path | None:
    return next((found for suffix in _ACTIONS if (found := file.with_suffix(suffix)).is_file()), None)


def _rows(file: Path, action: str | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows of actions of a video, and the further arrays beside them."""
    path = _beside(file)
    if path is None:
        raise ValueError(f"{file} has no actions beside it: {', '.join(file.stem + suffix for suffix in _ACTIONS)}")
    try:
        if path.suffix == ".csv":
            return _table(path), {}
        with open(path, "rb") as opened:
            found = np.load(opened, allow_pickle=False)
            arrays = {"actions": found} if isinstance(found, np.ndarray) else dict(found)
    except Exception as error:  # a damaged zip or header raises whatever it meets
        raise ValueError(f"{path} cannot be read as numbers, nothing in it is unpickled: {error}") from error
    for name in ("action", "actions") if action is None or path.suffix == ".npy" else (action,):
        if name in arrays and arrays[name].ndim in (1, 2) and len(arrays[name]):
            return arrays.pop(name), arrays
    raise ValueError(f"{path} must have actions of shape (N, A) as {action or 'action'!r}, got {', '.join(arrays)}")


def _table(path: Path) -> np.ndarray:
    with open(path, encoding="utf-8-sig") as lines:
        rows = [line.strip().split(",") for line in lines if line.strip()]
    try:
        [float(cell) for cell in rows[0]]
    except ValueError:
        rows = rows[1:]  # names
    table = np.array([[float(cell) for cell in row] for row in rows])
    if table.ndim != 2:
        raise ValueError("it has no rows")
    return table
