"""LeRobot's data sets: numbers in parquet, frames in videos or in the parquet, described by `meta/info.json`.

Read are v2.0, v2.1 (a file per episode) and v3.0 (files of many episodes); written is v3.0. Row t holds observation t
and the action taken then, which leads to row t+1; the action of an episode's last row leads nowhere. The statistics
that LeRobot keeps are of what was recorded: they are no bounds of actions, and are not read as such.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from lewm.formats import Source, actions_of, frames_of, needed, numeric
from lewm.formats import video as video_files
from lewm.formats.arrow import picture_size, pictures_of, png, rows_of

if TYPE_CHECKING:
    from lewm.data import Dataset

VERSIONS = ("v2.0", "v2.1", "v3.0")

# What every data set has, and follows from the order of rows and `fps`; tasks are text.
_OWN = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_NUMBERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float32", "float64")
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_FILES_PER_CHUNK, _DATA_MB, _VIDEO_MB = 1000, 100, 200
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def recognised(path: Path) -> bool:
    """Whether this is such a folder, of any version."""
    return (path / "meta/info.json").is_file() or (path / "meta_data/info.json").is_file()


@dataclass
class _Episode:
    """Where an episode is: `row` is its first in `data`, `first_time` (s) that of its first frame in `video`."""

    number: int
    length: int
    data: Path
    video: Path | None = None
    first_time: float = 0.0
    row: int = -1


class Reader(Source):
    """See `lewm.formats.Source`. The list of rows and the headers of all videos are looked at when it is opened.

    Files that `meta/info.json` names are read within the folder only. A file there may be a link to elsewhere, as in
    the cache of huggingface_hub.

    Args:
        path: The folder.
        camera: Feature of frames, as `observation.images.top`; the only one when not given.
        action: Feature of actions; "action" when not given.
    """

    def __init__(self, path: Path, *, camera: str | None = None, action: str | None = None) -> None:
        needed("pyarrow.parquet", "reading LeRobot's data sets")
        self.path = path
        self._table_open: _Table | None = None
        self._groups: dict[tuple[str, ...], tuple[Any, Any]] = {}
        try:
            self._open(camera, action or "action")
        except BaseException:
            self.close()
            raise

    def _open(self, camera: str | None, action: str) -> None:
        path = self.path
        self._info = self._described()
        self.format = f"lerobot {self._info['codebase_version']}"
        self.metadata = {"fps": self._fps}
        self.left_out: dict[str, str] = {}
        self._open_features(camera, action)

        episodes = list(self._episodes_v3() if self._info["codebase_version"] == "v3.0" else self._episodes_v2())
        if not episodes:
            raise ValueError(f"{path} has no episodes")
        total = self._info.get("total_episodes", len(episodes))
        if total != len(episodes):
            raise ValueError(f"{path}/meta/info.json says {total} episodes, the list of episodes has {len(episodes)}")
        if len({episode.number for episode in episodes}) != len(episodes):
            raise ValueError(f"{path} must list each episode once, it has some twice")
        by_file: dict[Path, list[_Episode]] = {}
        for episode in episodes:
            by_file.setdefault(episode.data, []).append(episode)
        for file, here in by_file.items():
            self._look_at(file, here)
        self._episodes = [episode for episode in episodes if episode.length >= 2]
        if not self._episodes:
            raise ValueError(f"{path} has no episode of at least 2 frames")
        if len(self._episodes) < len(episodes):
            short = len(episodes) - len(self._episodes)
            self.left_out["episodes"] = f"{short} of {len(episodes)} have fewer than 2 frames"
        self.lengths = np.array([episode.length for episode in self._episodes], np.int64)
        self._open_frames()
        files = {file for e in self._episodes for file in (e.data, e.video) if file is not None}
        self.bytes = sum(file.stat().st_size for file in files)

    def frames(self, episode: int) -> np.ndarray:
        e, what = self._episodes[episode], self._what(episode)
        if e.video is None:
            blobs = self._rows(self._camera, episode).to_pylist()
            pictures = [blob.get("bytes") if isinstance(blob, dict) else blob for blob in blobs]
            return pictures_of(pictures, what, self.height, self.width)
        try:
            frames = video_files.frames(e.video, count=e.length, first_time=e.first_time, fps=self._fps)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        return frames_of(frames, what, (e.length, self.height, self.width))

    def actions(self, episode: int) -> np.ndarray:
        return actions_of(self._numbers(self._action, episode), self._what(episode))

    def column(self, name: str, episode: int) -> np.ndarray:
        return self._numbers(name, episode).astype(np.float64)

    def close(self) -> None:
        if self._table_open is not None:
            self._table_open.parquet.close()
        self._table_open, self._groups = None, {}

    def _what(self, episode: int) -> str:
        return f"{self.path} episode {self._episodes[episode].number}"

    def _described(self) -> dict[str, Any]:
        """`meta/info.json`, as far as it is used, checked."""
        file = self.path / "meta/info.json"
        if not file.is_file():
            raise ValueError(f"{self.path} is of a version before v2.0; lerobot's own scripts convert it")
        info = _json(file.read_text("utf-8", errors="replace"), str(file))
        version, features, fps = info.get("codebase_version"), info.get("features"), info.get("fps")
        if version not in VERSIONS:
            raise ValueError(f"{file}: codebase_version must be one of {', '.join(VERSIONS)}, got {version!r}")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1e6:
            raise ValueError(f"{file}: fps must be a number above 0, got {repr(fps)[:100]}")
        self._fps = float(fps)
        described = isinstance(features, dict) and all(
            isinstance(feature, dict)
            and isinstance(feature.get("dtype"), str)
            and (feature["dtype"] not in _NUMBERS or _is_shape(feature.get("shape")))
            for feature in features.values()
        )
        if not described:
            raise ValueError(f"{file}: features must give each feature a dtype and a shape, got {str(features)[:300]}")
        for key in ("data_path", "video_path"):
            if not isinstance(info.get(key), str | None):
                raise ValueError(f"{file}: {key} must be text, got {info[key]!r}")
        return info

    def _open_features(self, camera: str | None, action: str) -> None:
        """What becomes frames, actions and columns, and why the rest does not."""
        features = self._info["features"]
        pictures = {name: feature for name, feature in features.items() if feature["dtype"] in ("image", "video")}
        depth = {name for name, feature in pictures.items() if _is_depth(feature)}
        cameras = [name for name in pictures if name not in depth]
        if camera is None and len(cameras) == 1:
            camera = cameras[0]
        if camera not in cameras:
            wanted = "camera must be given" if camera is None and cameras else f"no camera {camera!r}"
            raise ValueError(f"{self.path}: {wanted}; it has {', '.join(cameras) or 'none'}")
        self._camera, self._is_video = camera, features[camera]["dtype"] == "video"
        self.columns = {}
        for name, feature in features.items():
            dtype = feature["dtype"]
            if name in _OWN:
                continue
            if name in pictures:
                if name != camera:
                    self.left_out[name] = "depth" if name in depth else "another camera"
                continue
            why = numeric(np.dtype(dtype), tuple(feature["shape"])) if dtype in _NUMBERS else f"{dtype} is no number"
            if why is not None:
                self.left_out[name] = why
            else:
                self.columns[name] = int(np.prod(feature["shape"], dtype=int))
        if action not in self.columns:
            why = f" that can be read: {self.left_out[action]}" if action in self.left_out else ""
            raise ValueError(
                f"{self.path} has no feature of actions {action!r}{why}; it has {', '.join(self.columns) or 'none'}"
            )
        self._action, self.action_dim = action, self.columns.pop(action)

    def _episodes_v2(self) -> Iterator[_Episode]:
        file = self.path / "meta/episodes.jsonl"
        size = self._info.get("chunks_size")
        if type(size) is not int or size < 1:
            raise ValueError(f"{self.path}/meta/info.json: chunks_size must be an integer above 0, got {size!r}")
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        with open(file, encoding="utf-8", errors="replace") as lines:
            for k, line in enumerate(lines):
                if not line.strip():
                    continue
                entry = _json(line, f"{file} line {k + 1}")
                place = (entry.get("episode_index"), entry.get("length"))
                number, length = _counts(place, f"{file} line {k + 1}: episode_index and length")
                values = {"episode_chunk": number // size, "episode_index": number, "video_key": self._camera}
                episode = _Episode(number, length, self._inside("data_path", values))
                if self._is_video:
                    episode.video = self._inside("video_path", values)
                yield episode

    def _episodes_v3(self) -> Iterator[_Episode]:
        keys = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if self._is_video:
            keys += [f"videos/{self._camera}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        files = sorted(self.path.glob("meta/episodes/*/*.parquet"))
        if not files:
            raise ValueError(f"{self.path}/meta/episodes is missing, or empty")
        for file in files:
            rows = self._table(file, keys).to_pydict()
            for number, length, *places in zip(*(rows[key] for key in keys), strict=True):
                what = f"{file} episode {number}"
                number, length = _counts((number, length), f"{what}: episode_index and length")
                chunk, index = _counts(places[:2], f"{what}: chunk_index and file_index of data")
                episode = _Episode(
                    number, length, self._inside("data_path", {"chunk_index": chunk, "file_index": index})
                )
                if self._is_video:
                    chunk, index = _counts(places[2:4], f"{what}: chunk_index and file_index of {self._camera}")
                    values = {"video_key": self._camera, "chunk_index": chunk, "file_index": index}
                    episode.video, episode.first_time = self._inside("video_path", values), places[4]
                    if not isinstance(places[4], float) or not 0 <= places[4] < math.inf:
                        raise ValueError(f"{what}: from_timestamp must be seconds of at least 0, got {places[4]!r}")
                yield episode

    def _inside(self, key: str, values: dict[str, Any]) -> Path:
        """The file that a template of `meta/info.json` names: `str.format` would also follow attributes."""
        template = self._info.get(key)
        file = f"{self.path}/meta/info.json"
        if template is None:
            raise ValueError(f"{file} has no {key}")

        def put(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise ValueError(f"{file}: {key} may name {', '.join(values)}, got {template!r}")
            return str(values[match[1]]).zfill(int(match[2] or 0))

        field = r"\{(\w+)(?::0(\d)d)?\}"
        if re.search(r"[{}]", re.sub(field, "", template)):
            raise ValueError(f"{file}: {key} may name {', '.join(values)} in braces, got {template!r}")
        name = re.sub(field, put, template)
        parts = PureWindowsPath(name)  # the stricter: both slashes divide, and drives are roots
        if parts.anchor or ".." in parts.parts or "\0" in name or not 0 < len(name) < 256:
            raise ValueError(f"{file}: {key} must stay in the folder, got {name!r}")
        return self.path / name

    def _look_at(self, file: Path, episodes: list[_Episode]) -> None:
        """Finds the rows of the episodes in their file, and checks that they are as the list of episodes says."""
        self._check_columns(file, [self._action, *self.columns, *(() if self._is_video else (self._camera,))])
        own = self._table(file, ["episode_index", "frame_index", "timestamp"])
        numbers, indices, times = (
            rows_of(column, f"{name} of {file}")[:, 0]
            for name, column in zip(own.column_names, own.columns, strict=True)
        )
        if numbers.dtype.kind not in "iu":
            raise ValueError(f"episode_index of {file} must be integers, got {numbers.dtype}")
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        counts = np.diff(starts, append=len(numbers))
        found = {int(numbers[start]): (int(start), int(n)) for start, n in zip(starts, counts, strict=True)}
        if len(found) != len(starts):
            raise ValueError(f"{file} must have the rows of an episode together; it has some twice")
        for e in episodes:
            e.row, length = found.get(e.number, (0, 0))
            if length != e.length:
                raise ValueError(
                    f"{file} has {length} rows of episode {e.number}, the list of episodes says {e.length}"
                )
            if not length:
                continue
            rows = slice(e.row, e.row + length)
            steps = np.arange(length)
            if (indices[rows] != steps).any():
                raise ValueError(f"{file} must have the frames of episode {e.number} in order, from frame_index 0")
            first = float(times[e.row])
            if self._is_video and not (np.abs(times[rows] - first - steps / self._fps) < 0.5 / self._fps).all():
                raise ValueError(
                    f"{file}: timestamps of episode {e.number} are not those of {self._fps:g} frames a second"
                )
            e.first_time += first

    def _open_frames(self) -> None:
        """Size of the frames, and whether all videos are there with enough of them."""
        if not self._is_video:
            picture = self._rows(self._camera, 0)[0].as_py()
            blob = picture.get("bytes") if isinstance(picture, dict) else picture
            self.height, self.width, kind = picture_size(blob, f"frame 0 of {self._what(0)}")
            self.lossless = kind == "PNG"
            return
        self.lossless = False
        sizes: dict[Path, tuple[int, int, float, int | None]] = {}
        for k, e in enumerate(self._episodes):
            assert e.video is not None
            if e.video not in sizes:
                if not e.video.is_file():
                    raise ValueError(f"{self._what(k)} has no video: {e.video} is missing")
                sizes[e.video] = video_files.size(e.video)
            height, width, fps, count = sizes[e.video]
            if k == 0:
                self.height, self.width = height, width
            if (height, width) != (self.height, self.width):
                raise ValueError(f"{e.video} is {height}x{width}, the first video {self.height}x{self.width}")
            end = e.first_time + (e.length - 1) / self._fps
            if count is not None and fps and end * fps > count - 0.5:
                raise ValueError(
                    f"{e.video} ends after {count} frames, at {count / fps:.3f} s; {self._what(k)} wants a frame at "
                    f"{end:.3f} s"
                )

    def _numbers(self, name: str, episode: int) -> np.ndarray:
        what = f"{name} of {self._what(episode)}"
        values = rows_of(self._rows(name, episode), what)
        width = self.action_dim if name == self._action else self.columns[name]
        if values.shape[1] != width:
            raise ValueError(f"{what} must be {width} wide, as info.json says, got {values.shape[1]}")
        return values

    def _rows(self, name: str, episode: int) -> Any:
        """A column of one episode. The row groups read last are kept: those of other programs have many episodes."""
        e = self._episodes[episode]
        ends = self._opened(e.data).ends
        first, last = (int(np.searchsorted(ends, row, side="right")) for row in (e.row, e.row + e.length - 1))
        names = (name,) if name == self._camera else (self._action, *self.columns)
        key = (e.data, first, last)
        if self._groups.get(names, (None, None))[0] != key:
            self._groups[names] = (key, self._table(e.data, list(names), *range(first, last + 1)))
        start = e.row - (int(ends[first - 1]) if first else 0)
        return self._groups[names][1].column(name).slice(start, e.length)

    def _table(self, file: Path, names: list[str], *groups: int) -> Any:
        """Columns of row groups of a file, or of all of it."""
        self._check_columns(file, names)
        parquet = self._opened(file).parquet
        with _readable(file):
            table = parquet.read_row_groups(list(groups), names) if groups else parquet.read(names)
            table.validate(full=True)
        return table.select(names)

    def _check_columns(self, file: Path, names: list[str]) -> None:
        there = self._opened(file).names
        for name in names:
            if name not in there:
                raise ValueError(f"{file} has no column {name!r}; it has {', '.join(there)}")

    def _opened(self, file: Path) -> _Table:
        if self._table_open is None or self._table_open.file != file:
            self.close()
            self._table_open = _Table(file)
        return self._table_open


class _Table:
    """A parquet file, open: `names` of its columns, `ends` of its row groups in rows."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        self.file = file
        with _readable(file):
            self.parquet = needed("pyarrow.parquet", "reading LeRobot's data sets").ParquetFile(file)
            self.names = self.parquet.schema_arrow.names
            groups = self.parquet.metadata
            self.ends = np.cumsum([groups.row_group(k).num_rows for k in range(groups.num_row_groups)], dtype=np.int64)


def write(
    data: Dataset,
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    task: str = "",
    robot_type: str | None = None,
    camera: str = "observation.images.camera",
    columns: Iterable[str] | None = None,
    video: bool = True,
    crf: int = 18,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes the episodes of a data set as a LeRobot data set, v3.0, which `LeRobotDataset(repo_id, root=path)` loads.

    LeRobot has an action in every row: the last one of an episode repeats the one before, and `Reader` drops it again.
    Columns are float32 there, as all that its policies take. `state` is called `observation.state`, `/` in a name `.`.

    Args:
        data: The data set.
        path: Folder to make; there is all of it, or nothing.
        fps: Frames a second; what the data set has as metadata `fps` when not given.
        task: What is done in it, in words.
        robot_type: What it is done by.
        camera: Name of the feature of frames.
        columns: Names of the columns to write; all by default.
        video: As H.264, which loses a little of each frame; else as PNG within the parquet, bit for bit.
        crf: Quality of the video, 0 the best to 51.
        progress: Called with the frames written and those there are, after each episode.

    Raises:
        FileExistsError: Something is at `path`.
        ModuleNotFoundError: pyarrow, or PyAV for video, or Pillow for PNG, is not installed.
        ValueError: `fps` is neither given nor known, or names clash with LeRobot's own.
    """
    needed("pyarrow.parquet", "writing LeRobot's data sets")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; a LeRobot data set is written where nothing is")
    fps = data.metadata.get("fps") if fps is None else fps
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise ValueError(f"fps must be a number above 0, and {data.path} does not say it; got {fps!r}")
    if not len(data):
        raise ValueError(f"{data.path} has no episodes to write")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", camera):
        raise ValueError(
            f"camera must be of letters, digits, '.', '_' and '-', as in observation.images.top, got {camera!r}"
        )
    chosen = list(data.columns if columns is None else columns)
    unknown = [name for name in chosen if name not in data.columns]
    if unknown:
        raise ValueError(f"columns must be of {', '.join(data.columns) or 'none'}, got {unknown[0]!r}")
    names = {name: "observation.state" if name == "state" else name.replace("/", ".") for name in chosen}
    taken = ["action", "task", camera, *_OWN, *names.values()]
    clash = sorted({name for name in taken if taken.count(name) > 1})
    if clash:
        raise ValueError(f"columns must not clash with each other or with LeRobot's own: {', '.join(clash)}")

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        writer = _Writer(data, temporary, fps, task, robot_type, camera, names, video, crf)
        for episode in range(len(data)):
            writer.add(episode)
            if progress is not None:
                progress(writer.frames, data.frame_count)
        writer.finish()
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Writer:
    """A LeRobot data set in the making. The numbers of many episodes share a file, each episode has its own video."""

    def __init__(
        self,
        data: Dataset,
        root: Path,
        fps: float,
        task: str,
        robot_type: str | None,
        camera: str,
        names: dict[str, str],
        video: bool,
        crf: int,
    ) -> None:
        import pyarrow as pa

        self.data, self.root, self.fps, self.task, self.robot_type = data, root, fps, task, robot_type
        self.camera, self.names, self.video, self.crf = camera, names, video, crf
        self.frames, self.place = 0, (0, 0)
        self.parquet: Any = None
        self.file = root
        self.episodes: dict[str, list[Any]] = {}
        self.statistics: list[dict[str, dict[str, np.ndarray]]] = []
        even = data.height % 2 == data.width % 2 == 0
        self.pixel_format = "yuv420p" if even else "yuv444p"

        widths = {**{names[name]: data.columns[name] for name in names}, "action": data.action_dim}
        picture = {"dtype": "video" if video else "image", "shape": [data.height, data.width, 3]}
        self.features: dict[str, dict[str, Any]] = {
            camera: {**picture, "names": ["height", "width", "channels"]},
            **{name: {"dtype": "float32", "shape": [width], "names": None} for name, width in widths.items()},
            **{name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _OWN.items()},
        }
        fields: list[Any] = []
        known: dict[str, Any] = {}  # as Arrow has them, and as Hugging Face's `datasets` describes them
        for name, feature in self.features.items():
            if name == camera:
                if not video:
                    fields.append(pa.field(name, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
                    known[name] = {"_type": "Image"}
                continue
            kind, length = pa.type_for_alias(feature["dtype"]), feature["shape"][0]
            known[name] = {"dtype": feature["dtype"], "_type": "Value"}
            if length > 1:
                kind, known[name] = pa.list_(kind, length), {"feature": known[name], "length": length, "_type": "List"}
            fields.append(pa.field(name, kind))
        self.schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": known}})})

    def add(self, episode: int) -> None:
        """Writes one episode."""
        frames, actions = self.data.frames(episode), self.data.actions(episode)
        count, steps = len(frames), np.arange(len(frames))
        values = {self.names[name]: self.data.column(name, episode).astype(np.float32) for name in self.names}
        values["action"] = np.concatenate([actions, actions[-1:]])
        own = (steps / self.fps, steps, np.full(count, episode), self.frames + steps, np.zeros(count))
        for (name, dtype), numbers in zip(_OWN.items(), own, strict=True):
            values[name] = numbers.astype(dtype)[:, None]
        place = self._add_rows(values, frames)
        statistics = {self.camera: _picture_statistics(frames), **{k: _statistics(v) for k, v in values.items()}}
        self.statistics.append(statistics)
        row = {
            "episode_index": episode,
            "tasks": [self.task],
            "length": count,
            "data/chunk_index": place[0],
            "data/file_index": place[1],
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + count,
            **(self._add_video(episode, frames) if self.video else {}),
            **{f"stats/{k}/{key}": v.tolist() for k, found in statistics.items() for key, v in found.items()},
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, value in row.items():
            self.episodes.setdefault(key, []).append(value)
        self.frames += count

    def finish(self) -> None:
        """Writes what describes the episodes."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.parquet is not None:
            self.parquet.close()
        meta = self.root / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(self.episodes), meta / "episodes/chunk-000/file-000.parquet")
        pq.write_table(_tasks(self.task), meta / "tasks.parquet")
        merged = {name: _merged([s[name] for s in self.statistics]) for name in self.features}
        statistics = {name: {key: value.tolist() for key, value in found.items()} for name, found in merged.items()}
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self.data),
            "total_frames": self.frames,
            "total_tasks": 1,
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{len(self.data)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH if self.video else None,
            "features": self.features,
        }
        for name, content in (("info", info), ("stats", statistics)):
            (meta / f"{name}.json").write_text(json.dumps(content, indent=4, ensure_ascii=False), "utf-8")

    def _add_rows(self, values: dict[str, np.ndarray], frames: np.ndarray) -> tuple[int, int]:
        """Appends to the current file of rows, or begins the next one; returns its chunk and number."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = []
        for field in self.schema:
            if field.name == self.camera:
                pictures = [{"bytes": png(frame), "path": f"frame-{k:06d}.png"} for k, frame in enumerate(frames)]
                arrays.append(pa.array(pictures, field.type))
                continue
            flat = pa.array(values[field.name].reshape(-1))
            listed = pa.types.is_fixed_size_list(field.type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type) if listed else flat)
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        if self.parquet is not None and self.file.stat().st_size + table.nbytes > _DATA_MB * 2**20:
            self.parquet.close()
            self.parquet, number = None, self.place[0] * _FILES_PER_CHUNK + self.place[1] + 1
            self.place = divmod(number, _FILES_PER_CHUNK)
        if self.parquet is None:
            self.file = self.root / _DATA_PATH.format(chunk_index=self.place[0], file_index=self.place[1])
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.parquet = pq.ParquetWriter(self.file, self.schema)
        self.parquet.write_table(table)
        return self.place

    def _add_video(self, episode: int, frames: np.ndarray) -> dict[str, Any]:
        chunk, number = divmod(episode, _FILES_PER_CHUNK)
        file = self.root / _VIDEO_PATH.format(video_key=self.camera, chunk_index=chunk, file_index=number)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Policies train on random frames: every second one is a key frame, as in what LeRobot writes.
        video_files.write(file, frames, self.fps, crf=self.crf, pixel_format=self.pixel_format, key_every=2)
        self.features[self.camera]["info"] = {
            "video.height": self.data.height,
            "video.width": self.data.width,
            "video.codec": "h264",
            "video.pix_fmt": self.pixel_format,
            "video.is_depth_map": False,
            "video.fps": round(self.fps),
            "video.channels": 3,
            "has_audio": False,
        }
        places = {"chunk_index": chunk, "file_index": number, "from_timestamp": 0.0}
        places["to_timestamp"] = len(frames) / self.fps
        return {f"videos/{self.camera}/{key}": value for key, value in places.items()}


def _tasks(task: str) -> Any:
    """The table of tasks as pandas writes it: LeRobot looks tasks up by its index."""
    import pyarrow as pa

    index = "__index_level_0__"
    kinds = (("task_index", "task_index", "int64", "int64"), (None, index, "unicode", "object"))
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, field, kind, numpy in kinds
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array([0], pa.int64()), index: pa.array([task], pa.large_string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of rows (N, C); each (C,), `count` (1,)."""
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0, dtype=np.float64),
        "std": rows.std(axis=0, dtype=np.float64),
        "count": np.array([len(rows)]),
        **{key: np.quantile(rows.astype(np.float64), share, axis=0) for key, share in _QUANTILES.items()},
    }


def _picture_statistics(frames: np.ndarray) -> dict[str, np.ndarray]:
    """The same of the channels of frames (N, H, W, 3), in [0, 1]: each (3, 1, 1), `count` of frames (1,)."""
    counts = np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])
    levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    below = np.cumsum(shares, axis=1)
    mean = shares @ levels
    found = {
        "min": levels[np.argmax(counts > 0, axis=1)],
        "max": levels[255 - np.argmax(counts[:, ::-1] > 0, axis=1)],
        "mean": mean,
        "std": np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1)),
        **{key: levels[np.argmax(below >= share, axis=1)] for key, share in _QUANTILES.items()},
    }
    order = ("min", "max", "mean", "std", "count", *_QUANTILES)
    found["count"] = np.array([len(frames)])
    return {key: found[key] if key == "count" else found[key].reshape(3, 1, 1) for key in order}


def _merged(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of all episodes from those of each; quantiles are averaged, as LeRobot does."""
    each = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    total = each["count"].sum(axis=0)
    weights = each["count"].reshape(-1, *[1] * (each["mean"].ndim - 1)) / total[0]
    mean = (weights * each["mean"]).sum(axis=0)
    return {
        "min": each["min"].min(axis=0),
        "max": each["max"].max(axis=0),
        "mean": mean,
        "std": np.sqrt((weights * (each["std"] ** 2 + (each["mean"] - mean) ** 2)).sum(axis=0)),
        "count": total,
        **{key: (weights * each[key]).sum(axis=0) for key in _QUANTILES},
    }


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    pyarrow = needed("pyarrow", "reading LeRobot's data sets")
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} is no parquet file, or a damaged one: {error}") from error


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, got {text[:100]!r}")
    return value


def _counts(values: Any, what: str) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{what} must be integers of at least 0, got {', '.join(map(repr, values))}")
    return tuple(values)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(side) is int and side > 0 for side in value)


def _is_depth(feature: dict[str, Any]) -> bool:
    info = feature.get("info") or feature.get("video_info")
    return isinstance(info, dict) and bool(info.get("video.is_depth_map") or info.get("is_depth_map"))
