"""Episodes in arrays, one after the other, which may be memory maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lewm.formats import Source, actions_of, numeric
from lewm.pixels import checked


class Reader(Source):
    """See `lewm.formats.Source`; arguments as those of `lewm.Dataset.from_arrays`."""

    def __init__(self, frames: Any, actions: Any, episode_ends: Any, columns: dict[str, Any]) -> None:
        self._frames = checked(frames, "frames")
        if self._frames.ndim != 4:
            raise ValueError(f"frames must be of shape (N, H, W, 3), got {self._frames.shape}")
        count, self.height, self.width, _ = map(int, self._frames.shape)
        self._actions = np.asarray(actions)
        if self._actions.ndim not in (1, 2) or len(self._actions) != count or self._actions.dtype.kind not in "fiu":
            raise ValueError(
                f"actions must be numbers of shape (N, A), a row for each of the {count} frames, got "
                f"{self._actions.dtype} of shape {self._actions.shape}"
            )
        ends = np.asarray(episode_ends)
        starts = np.concatenate([[0], ends[:-1]]) if ends.ndim == 1 else ends
        if ends.dtype.kind not in "iu" or ends.ndim != 1 or not len(ends) or ends[-1] != count:
            raise ValueError(f"episode_ends must be integers (E,), the last of them {count}, got {episode_ends!r}")
        self.lengths = (ends.astype(np.int64) - starts).astype(np.int64)
        if self.lengths.min() < 2:
            raise ValueError(
                f"episodes must have at least 2 frames, episode {self.lengths.argmin()} has {self.lengths.min()}"
            )
        self._starts = starts.astype(np.int64)
        self._columns = {name: np.asarray(rows) for name, rows in columns.items()}
        for name, rows in self._columns.items():
            why = numeric(rows.dtype, rows.shape[1:]) if rows.ndim else "it has no rows"
            if why is None and len(rows) != count:
                why = f"it has {len(rows)} rows"
            if why is not None:
                raise ValueError(f"columns[{name!r}] must be numbers of shape ({count},) or ({count}, C): {why}")
        self.columns = {name: int(np.prod(rows.shape[1:], dtype=int)) for name, rows in self._columns.items()}
        self.action_dim = 1 if self._actions.ndim == 1 else self._actions.shape[1]
        self.path, self.format, self.lossless, self.left_out, self.metadata = Path("arrays"), "arrays", True, {}, {}
        self.bytes = self._frames.nbytes + self._actions.nbytes + sum(rows.nbytes for rows in self._columns.values())

    def frames(self, episode: int) -> np.ndarray:
        return np.ascontiguousarray(self._frames[self._rows(episode)])

    def actions(self, episode: int) -> np.ndarray:
        return actions_of(self._actions[self._rows(episode)], f"episode {episode}")

    def column(self, name: str, episode: int) -> np.ndarray:
        rows = self._columns[name][self._rows(episode)].astype(np.float64).reshape(int(self.lengths[episode]), -1)
        if not np.isfinite(rows).all():  # the caller can do something about it
            raise ValueError(f"columns[{name!r}] must be finite, that of episode {episode} is not")
        return rows

    def _rows(self, episode: int) -> slice:
        return slice(int(self._starts[episode]), int(self._starts[episode] + self.lengths[episode]))
