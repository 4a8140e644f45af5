"""stable-worldmodel's Lance tables: one row per frame, the episodes one after the other.

`episode_idx` and `step_idx` number the rows; pictures are JPEG in binary columns, numbers lists of float32. Row t holds
the frame and the action that leads to the frame of row t+1; the action of an episode's last row, mostly NaN, leads
nowhere. With `lance_video`, frames are MP4 in the table beside it, `<table>_videos`, one per episode and camera; what
is constant in an episode, in `<table>_episodes`, is not read. No format of these says how many frames a second are.

Lance has threads that a fork does not copy: what has opened a table must not be used in a forked process.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lewm.formats import Source, actions_of, frames_of, needed, numeric, video
from lewm.formats.arrow import picture_size, pictures_of, rows_of

_NUMBERS = ("episode_idx", "step_idx")
_SIDE = ("_videos", "_episodes")


def recognised(path: Path) -> bool:
    """Whether this is a table of Lance, or a folder of such."""
    return path.is_dir() and (_is_table(path) or any(map(_is_table, path.glob("*.lance"))))


class Reader(Source):
    """See `lewm.formats.Source`. The numbers of all rows are looked at when it is opened.

    Args:
        path: The table, a folder `.lance`; or a folder with one, and the tables that belong to it.
        camera: Column of pictures; "pixels" where it is there, else the only one.
        action: Column of actions; "action" when not given.
    """

    def __init__(self, path: Path, *, camera: str | None = None, action: str | None = None) -> None:
        self.path, self.metadata = path, {}
        table = self._frames_table(path)
        lance = needed("lance", "reading Lance")
        with _readable(table):
            self._table = lance.dataset(str(table))
            schema = self._table.schema
        beside = table.with_name(f"{table.name.removesuffix('.lance')}_videos.lance")
        self._videos: Any = None
        self._blobs: dict[tuple[int, str], int] = {}  # the row of each episode's and camera's video
        if _is_table(beside):
            with _readable(beside):
                self._videos = lance.dataset(str(beside))
                rows = self._videos.to_table(columns=["episode_idx", "video_key"]).to_pylist()
            self._blobs = {(row["episode_idx"], row["video_key"]): k for k, row in enumerate(rows)}
        self.format = "lance" if self._videos is None else "lance_video"

        self._index(table, schema)
        self._open_camera(schema, camera)
        self._open_columns(schema, action or "action")
        self.bytes = sum(
            file.stat().st_size for folder in (table, beside) for file in folder.rglob("*") if file.is_file()
        )

    def frames(self, episode: int) -> np.ndarray:
        what, length = self._what(episode), int(self.lengths[episode])
        if self._camera in self._pictures:
            blobs = self._rows(self._camera, episode).to_pylist()
            return pictures_of(blobs, what, self.height, self.width)
        with self._video(episode) as file:
            return frames_of(video.frames(file), what, (length, self.height, self.width))

    def actions(self, episode: int) -> np.ndarray:
        what = self._what(episode)
        return actions_of(rows_of(self._rows(self._action, episode), what), what)

    def column(self, name: str, episode: int) -> np.ndarray:
        return rows_of(self._rows(name, episode), f"{name} of {self._what(episode)}").astype(np.float64)

    def _what(self, episode: int) -> str:
        return f"{self.path} episode {self._numbers[episode]}"

    def _rows(self, name: str, episode: int) -> Any:
        start, length = int(self._offsets[episode]), int(self.lengths[episode])
        with _readable(self._what(episode)):
            column = self._table.to_table(columns=[name], offset=start, limit=length).column(name)
        if len(column) != length:
            raise ValueError(f"{self._what(episode)} has {len(column)} rows of {name}, there were {length}")
        return column

    def _index(self, table: Path, schema: Any) -> None:
        """Which rows are whose."""
        missing = [name for name in _NUMBERS if name not in schema.names]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]!r}, which numbers rows; it has {schema.names}")
        with _readable(table):
            rows = self._table.to_table(columns=list(_NUMBERS))
        episodes, steps = (
            rows_of(rows.column(name), f"{name} of {table}").reshape(-1).astype(np.int64) for name in _NUMBERS
        )
        offsets = np.flatnonzero(np.diff(episodes, prepend=-1))
        lengths = np.diff(offsets, append=len(episodes))
        bad = np.flatnonzero(steps != np.arange(len(steps)) - np.repeat(offsets, lengths))
        if len(bad):
            raise ValueError(
                f"{table} must have the steps of an episode in order from 0, row {bad[0]} is step {steps[bad[0]]} of "
                f"episode {episodes[bad[0]]}"
            )
        numbers = episodes[offsets]
        if len(np.unique(numbers)) != len(numbers):
            raise ValueError(f"{table} must have the rows of an episode together; it has some twice")
        kept = np.flatnonzero(lengths >= 2)
        if not len(kept):
            raise ValueError(f"{table} has no episode of at least 2 frames")
        self.left_out = {}
        if len(kept) < len(lengths):
            self.left_out["episodes"] = f"{len(lengths) - len(kept)} of {len(lengths)} have fewer than 2 frames"
        self.lengths, self._offsets, self._numbers = lengths[kept], offsets[kept], numbers[kept]
        self._used = np.repeat(lengths >= 2, lengths)

    def _open_camera(self, schema: Any, camera: str | None) -> None:
        import pyarrow as pa

        self._pictures = {
            field.name for field in schema if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        }
        cameras = sorted(self._pictures | {key for _, key in self._blobs})
        if camera is None:
            camera = "pixels" if "pixels" in cameras or len(cameras) != 1 else cameras[0]
        if camera not in cameras:
            raise ValueError(f"{self.path} has no camera {camera!r}; it has {', '.join(cameras) or 'none'}")
        self._camera = camera
        self.left_out |= {name: "another camera" for name in cameras if name != camera}
        if camera in self._pictures:
            first = self._rows(camera, 0)[0].as_py()
            self.height, self.width, kind = picture_size(first, f"frame 0 of {self._what(0)}")
            self.lossless = kind == "PNG"
            return
        self.lossless = False
        for episode, number in enumerate(self._numbers):
            if (number, camera) not in self._blobs:
                raise ValueError(f"{self._what(episode)} has no video of {camera!r}")
        with self._video(0) as file:
            self.height, self.width, _, _ = video.size(file)

    def _open_columns(self, schema: Any, action: str) -> None:
        """What is not finite is found now: it could not be kept."""
        import pyarrow as pa

        if action not in schema.names:
            raise ValueError(f"{self.path} has no column of actions {action!r}; it has {', '.join(schema.names)}")
        self._action, self.columns = action, {}
        for field in schema:
            name, kind, width = field.name, field.type, 1
            if name in _NUMBERS or name in self._pictures:
                continue
            if pa.types.is_fixed_size_list(kind):
                width, kind = kind.list_size, kind.value_type
            try:
                why = numeric(np.dtype(kind.to_pandas_dtype()), (width,))
            except (NotImplementedError, TypeError):
                why = f"{kind} is no number"
            if name == action:
                if why is not None:
                    raise ValueError(f"{action} of {self.path} must be numbers: {why}")
                self.action_dim = width
            elif why is not None:
                self.left_out[name] = why
            else:
                self.columns[name] = width
        needed_rows = dict.fromkeys(self.columns, self._used)
        needed_rows[action] = self._used.copy()
        needed_rows[action][self._offsets + self.lengths - 1] = False
        row = 0
        for batch in self._batches(list(needed_rows)):
            for name, wanted in needed_rows.items():
                values = rows_of(batch.column(name), f"{name} of {self.path}")
                where = row + np.flatnonzero(~np.isfinite(values).all(axis=1) & wanted[row : row + len(values)])
                if len(where) and name not in self.left_out:
                    episode = int(np.searchsorted(self._offsets, where[0], side="right")) - 1
                    why = f"row {where[0] - self._offsets[episode]} of episode {self._numbers[episode]} is not finite"
                    if name == action:
                        raise ValueError(f"{action} of {self.path} cannot be used: {why}")
                    self.left_out[name] = why
            row += len(batch)
        self.columns = {name: width for name, width in self.columns.items() if name not in self.left_out}

    def _batches(self, names: list[str]) -> Iterator[Any]:
        with _readable(self.path):
            yield from self._table.to_batches(columns=names)

    @contextmanager
    def _video(self, episode: int) -> Iterator[Path]:
        """The video of an episode as a file, as long as it is needed."""
        what = f"video of {self._what(episode)}"
        with tempfile.TemporaryDirectory(prefix="lewm-") as folder:
            file = Path(folder) / "video.mp4"
            with _readable(what):
                row = self._blobs[int(self._numbers[episode]), self._camera]
                file.write_bytes(self._videos.take_blobs("video_bytes", indices=[row])[0].read())
            try:
                yield file
            except ValueError as error:
                raise ValueError(f"{what}: {str(error).replace(str(file), 'it')}") from error

    @staticmethod
    def _frames_table(path: Path) -> Path:
        if _is_table(path):
            return path
        tables = sorted(table for table in path.glob("*.lance") if _is_table(table))
        tables = [table for table in tables if not table.stem.endswith(_SIDE)] or tables
        if len(tables) != 1:
            names = ", ".join(table.name for table in tables) or "none"
            raise ValueError(f"{path} must be a table of Lance, or hold one; it has {names}")
        return tables[0]


def _is_table(path: Path) -> bool:
    return (path / "_versions").is_dir()


@contextmanager
def _readable(what: Any) -> Iterator[None]:
    """Every error of Lance as a ValueError that names what was read. It panics at some damage: no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            text = re.sub(r"\s+", " ", str(error))[:300]
            raise ValueError(f"{what} cannot be read, it is damaged: {text}") from error
        raise
