"""`lewm.convert`: episodes of other programs become a store, and a store becomes what other programs read.

What is made grows in a folder `.NAME.converting` beside the destination, and is moved there when it is whole and every
byte of it was read again. An interrupted conversion goes on in that folder after its last episode, if neither source
nor options have changed. Frames that are lossless at the source stay so, bit for bit, unless another size is asked for.

A column with a number that is not finite, in any episode, is left out, for a store has finite numbers; an action that
is not finite is an error. Both are found before anything is written.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lewm._core import Store, StoreError, StoreWriter, __version__, repair_store, verify_store
from lewm.checks import integer
from lewm.data import Dataset
from lewm.formats import Source, module_of, opened
from lewm.formats.arrays import Reader as ArrayReader
from lewm.formats.store import Reader as StoreReader
from lewm.formats.store import recognised as is_store
from lewm.memory import check_fits
from lewm.model_file import write_atomically
from lewm.pixels import fitted

Progress = Callable[[int, int, str], object]
_OPTIONS = ("format", "camera", "action", "low", "high", "bounds", "size", "episodes", "fps")
_LIBRARIES = {
    "hdf5": ("h5py",),
    "lance": ("pylance", "pyarrow", "av", "pillow"),
    "lerobot": ("pyarrow", "av", "pillow"),
    "minari": ("minari", "h5py"),
    "swm_video": ("av",),
    "videos": ("av",),
}
_SAMPLE = (3, 128)  # episodes, and frames of each, that an estimate is made from


def convert(
    src: str | os.PathLike[str] | Source,
    dst: str | os.PathLike[str],
    *,
    format: str | None = None,
    camera: str | None = None,
    action: str | None = None,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    bounds: str | None = None,
    size: int | None = None,
    episodes: int | Sequence[int] | None = None,
    fps: float | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Converts recorded episodes. The destination is made whole or not at all, and never replaced.

    Called again after an interruption, it goes on after the last episode that was written.

    Args:
        src: Official HDF5, stable-worldmodel's Lance or video, LeRobot v2.1 or v3, Minari, a folder of videos with
            their actions (see `lewm.formats`), a `.lewm` store, or an open `lewm.formats.Source`, which is closed.
        dst: What to make, told by its name: `NAME.lewm` a store, `NAME.h5` or `NAME.hdf5` the official HDF5, a name
            without suffix the folder of a LeRobot data set, whose video loses a little of each frame.
        format: One of `lewm.formats.FORMATS`; told by what is at `src` when not given.
        camera: Name of the image column, where there are several.
        action: Name of the action column, where it is not the format's usual one.
        low, high: Raw bounds of actions, a number or A of them, which planning keeps to; those of the source, where it
            has some, when not given.
        bounds: "data" takes the least and greatest recorded actions for bounds. A store needs bounds.
        size: Side of the frames in pixels; square frames are averaged by area to it, as a model does itself.
        episodes: How many, the first ones, or the numbers of those to convert; all when not given.
        fps: Frames a second; those of the source, where it says, when not given. LeRobot needs them.
        restart: Throw away what an interrupted conversion to `dst` has left.
        progress: Called as `progress(done, total, what)` with frames or bytes of the step `what`.

    Returns:
        What was made and what was left out.

    Raises:
        FileExistsError: `dst` is there.
        ValueError: The source is none of the formats or damaged, an argument cannot be, bounds are missing, or what an
            interrupted conversion has left is of another source or other options.
        OSError: The disk has less room than this needs, or refuses.
    """
    options = {name: value for name, value in locals().items() if name in _OPTIONS}
    with Conversion(src, dst, **options, restart=restart, progress=progress) as conversion:
        return conversion.run()


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take, measured on a few of its episodes.

    Attributes:
        source, format: What is read.
        destination, kind: What is made.
        episodes, frames: Of the source, as far as they are wanted.
        done: Episodes that an interrupted conversion has written already.
        read, written: Bytes of source and destination.
        needed, free: Bytes on the disk of the destination: needed while converting, and free now.
        ratio: Bytes of the frames as they are in memory, to `written`.
        seconds: From now to the end.
        left_out: What of the source is not read, and why.
        notes: What else a user should know.
    """

    source: str
    format: str
    destination: str
    kind: str
    episodes: int
    frames: int
    done: int
    read: int
    written: int
    needed: int
    free: int
    ratio: float
    seconds: float
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        done = f", {self.done} of them written already" if self.done else ""
        lines = [
            f"{self.source} ({self.format}): {self.episodes:,} episodes, {self.frames:,} frames{done}; "
            f"{_size(self.read)}",
            f"{self.destination} ({self.kind}): about {_size(self.written)}, frames in memory {self.ratio:.1f} times "
            f"that; about {_duration(self.seconds)}; {_size(self.needed)} of {_size(self.free)} free are needed",
        ]
        return "\n".join([*lines, *_remarks(self.left_out, self.notes)])


@dataclass(frozen=True)
class Report:
    """What a conversion has made.

    Attributes:
        path, kind: Of the destination.
        episodes, frames: That it holds.
        written: Its bytes.
        ratio: Bytes of the frames as they are in memory, to `written`.
        seconds: That this call took.
        lossless: Its frames are, bit for bit, those that were recorded, as far as the source tells.
        psnr: Least and mean PSNR of its episodes against what they were made from, in dB, where it is video.
        left_out, notes: As in `Estimate`.
    """

    path: Path
    kind: str
    episodes: int
    frames: int
    written: int
    ratio: float
    seconds: float
    lossless: bool
    psnr: tuple[float, float] | None
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        kept = "lossless" if self.lossless else "not lossless"
        if self.psnr is not None:
            kept += f", PSNR of an episode {self.psnr[0]:.1f} dB or more, {self.psnr[1]:.1f} dB in the mean"
        lines = [
            f"{self.path} ({self.kind}): {self.episodes:,} episodes, {self.frames:,} frames, {_size(self.written)}, "
            f"frames in memory {self.ratio:.1f} times that; {kept}; every byte verified; {_duration(self.seconds)}"
        ]
        return "\n".join([*lines, *_remarks(self.left_out, self.notes)])


class Conversion:
    """One conversion: what `convert` does, with an estimate before it. A context manager; arguments as there."""

    def __init__(
        self,
        src: str | os.PathLike[str] | Source,
        dst: str | os.PathLike[str],
        *,
        restart: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        self.dst = Path(dst).absolute()
        self.kind = _kind(self.dst)
        _check_free(self.dst)
        unknown = options.keys() - set(_OPTIONS)
        if unknown:
            raise TypeError(f"options must be {', '.join(_OPTIONS)}, got {', '.join(sorted(unknown))}")
        self._options = {name: options.get(name) for name in _OPTIONS}
        self.progress = progress
        self._restart = restart
        self._estimate: Estimate | None = None
        self._work = self.dst.parent / f".{self.dst.name}.converting"
        self._src = None if isinstance(src, Source) else Path(src)
        self._identity = None if self._src is None or not self._src.exists() else _identity(self._src)
        if self._src is not None and self._src.resolve() in self.dst.resolve().parents:
            raise ValueError(f"dst must not be within the source: {self.dst}")
        reading = {name: options[name] for name in ("camera", "action") if options.get(name) is not None}
        if isinstance(src, Source):
            self.source = src
        elif is_store(Path(src)) and options.get("format") is None:
            if reading:
                raise ValueError(f"{' and '.join(reading)} must not be given for a store: {src}")
            self.source = StoreReader(Path(src))
        else:
            self.source = opened(Path(src), options.get("format"), **reading)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the source."""
        self.source.close()

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def estimate(self) -> Estimate:
        """Converts a few frames of a few episodes into a temporary folder, and says what all of it will take.

        Raises:
            OSError: It will not fit on the disk of the destination.
        """
        wanted, (count, most) = self._episodes, _SAMPLE
        picked = sorted({wanted[int(i)] for i in np.linspace(0, len(wanted) - 1, count)})
        size = stored = sampled = read = 0
        reading = 0.0
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            with self._writer(Path(folder, "sample.lewm")) as writer:
                for episode in picked:
                    before = time.perf_counter()
                    frames, actions, columns = self._read(episode)
                    reading += time.perf_counter() - before
                    read += len(frames)
                    kept = min(len(frames), most)
                    writer.append(
                        self._fitted(frames[:kept]),
                        actions[: kept - 1],
                        {name: rows[:kept] for name, rows in columns.items()},
                    )
                    sampled += kept
            verify_store(Path(folder, "sample.lewm"))
            size = stored = _bytes(Path(folder, "sample.lewm"))
            if self.kind != "store":
                data = Dataset(Path(folder, "sample.lewm"))
                self._export(data, Path(folder, "sample"), None)
                self._compare(data, Path(folder, "sample"), None)
                size = _bytes(Path(folder, "sample"))
            working = time.perf_counter() - started - reading
        total = int(self._lengths.sum())
        left = total - int(self._lengths[: self._done].sum())
        written = round(size / sampled * total)
        needed = round(stored / sampled * left if self._through_store else 0)
        needed += written if self.kind != "store" else 0
        free = shutil.disk_usage(self.dst.parent).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"converting {self.source.path} needs about {_size(needed)}, and {_size(free)} are free on the disk of",
                str(self.dst),
            )
        self._estimate = Estimate(
            source=str(self.source.path),
            format=self.source.format,
            destination=str(self.dst),
            kind=self.kind,
            episodes=len(wanted),
            frames=total,
            done=self._done,
            read=self.source.bytes,
            written=written,
            needed=needed,
            free=free,
            ratio=total * self._height * self._width * 3 / max(1, written),
            seconds=left * (reading / read + working / sampled),
            left_out=self.left_out,
            notes=self.notes,
        )
        return self._estimate

    def run(self) -> Report:
        """Converts.

        Raises:
            OSError: The disk or another process that makes the same is in the way. What was written is kept.
            ValueError: An episode is damaged, or the source has changed meanwhile. Nothing is left.
        """
        started = time.perf_counter()
        if self._estimate is None:
            self.estimate()  # refuses what does not fit
        with _locked(self._work):
            self._done = self._recovered()
            try:
                made, psnr = self._make()
                _check_free(self.dst)
                os.rename(made, self.dst)
                _sync(self.dst.parent)
            except BaseException as error:
                if self._record is None or isinstance(error, ValueError | StoreError):
                    _cleared(self._work)
                raise
            _cleared(self._work)
        frames, written = int(self._lengths.sum()), _bytes(self.dst)
        return Report(
            path=self.dst,
            kind=self.kind,
            episodes=len(self._episodes),
            frames=frames,
            written=written,
            ratio=frames * self._height * self._width * 3 / written,
            seconds=time.perf_counter() - started,
            lossless=self._lossless and psnr is None,
            psnr=psnr,
            left_out=self.left_out,
            notes=self.notes,
        )

    def _prepare(self) -> None:
        """Checks arguments and all that is small: actions and columns of every episode."""
        source, options = self.source, self._options
        self._episodes = _chosen(options["episodes"], len(source))
        self._lengths = source.lengths[self._episodes]
        self._height, self._width = source.height, source.width
        if options["size"] is not None:
            self._height = self._width = integer("size", options["size"], 1, 4097)
            fitted(np.zeros((1, source.height, source.width, 3), np.uint8), self._height, f"frames of {source.path}")
        longest = int(self._lengths.max())
        check_fits(
            2 * longest * source.height * source.width * 3,
            f"an episode of {longest} frames of {source.path}",
            "leave it out: episodes=",
        )
        self._lossless = source.lossless and (self._height, self._width) == (source.height, source.width)
        least, greatest = self._scan()
        low, high = self._bounds(least, greatest)
        self.notes = ()
        if low is not None and high is not None:
            narrow = low.astype(np.float32), high.astype(np.float32)  # as recorded actions are
            outside = int(((least < narrow[0]) | (greatest > narrow[1])).any(axis=1).sum())
            if outside:
                self.notes = (f"{outside} of {len(least)} episodes have actions outside the bounds",)
        fps = options["fps"] if options["fps"] is not None else source.metadata.get("fps")
        if fps is not None and not 0 < fps < np.inf:
            raise ValueError(f"fps must be above 0 and finite, got {fps!r}")
        if self.kind == "lerobot" and fps is None:
            raise ValueError(f"{source.path} does not say how many frames a second it has, which LeRobot needs: fps=")
        given = json.loads(json.dumps(options, default=_plain))
        self._record = None if self._identity is None else {"source": self._identity, "options": given}
        self._through_store = self.kind == "store" or not (
            isinstance(source, StoreReader) and all(value is None for value in options.values())
        )
        own = source.metadata if isinstance(source, StoreReader) else {}
        made_from = {
            **(self._identity or {}),
            "format": source.format,
            "options": {name: value for name, value in given.items() if value is not None},
            "lossless": self._lossless,
            "left_out": self.left_out,
            "versions": _versions(source.format),
        }
        if (self._height, self._width) != (source.height, source.width):
            made_from["resized_from"] = [source.height, source.width]
        if own.get("source"):
            made_from["source"] = own["source"]
        bounds = {} if low is None or high is None else {"action_low": low.tolist(), "action_high": high.tolist()}
        rate = {} if fps is None else {"fps": fps}
        side = {"pixels": {**own.get("pixels", {}), "size": self._height}} if self._height == self._width else {}
        created = {"created_by": f"lewm-fast {__version__}"}
        self.metadata = {**own, **source.metadata, **bounds, **rate, **side, "source": made_from, **created}
        self._done = self._written()

    def _say(self, done: int, total: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, total, what)

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest actions of each episode (E, A); `columns` and `left_out`, after a look at all numbers."""
        source = self.source
        self.left_out = dict(source.left_out)
        self._columns = dict(source.columns)
        least, greatest = [], []
        for place, episode in enumerate(self._episodes):
            actions = source.actions(episode)
            if actions.shape != (source.lengths[episode] - 1, source.action_dim):
                raise ValueError(f"actions of {source.path} episode {episode} are of shape {actions.shape}")
            least.append(actions.min(axis=0))
            greatest.append(actions.max(axis=0))
            for name in list(self._columns):
                bad = np.flatnonzero(~np.isfinite(source.column(name, episode)).all(axis=1))
                if len(bad):
                    del self._columns[name]
                    self.left_out[name] = f"not finite, in episode {episode} at row {bad[0]}"
            self._say(place + 1, len(self._episodes), "episodes checked")
        return np.array(least), np.array(greatest)

    def _bounds(self, least: np.ndarray, greatest: np.ndarray) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        low, high, how = (self._options[name] for name in ("low", "high", "bounds"))
        width, src = self.source.action_dim, self.source.path
        if how not in (None, "data"):
            raise ValueError(f"bounds must be 'data' or not given, got {how!r}")
        if (low is None) != (high is None) or (how is not None and low is not None):
            raise ValueError(f"low and high must be given both, and without bounds; got {low!r}, {high!r}, {how!r}")
        if how == "data":
            low, high = least.min(axis=0), greatest.max(axis=0)
        if low is None:
            low, high = (self.source.metadata.get(f"action_{name}") for name in ("low", "high"))
        if low is None or high is None:
            if self.kind != "store":
                return None, None
            raise ValueError(
                f"{src} does not tell the bounds of its {width} actions, which planning keeps to: give low= and high= "
                "(--low and --high) in raw units, or bounds='data' (--bounds data) for the least and greatest recorded"
            )
        found = []
        for name, value in (("low", low), ("high", high)):
            try:
                found.append(np.broadcast_to(np.asarray(value, np.float64), (width,)).copy())
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be a number or {width} of them, got {value!r}") from None
        if not (np.isfinite(found).all() and (found[0] < found[1]).all()):
            raise ValueError(f"low must be below high in each action, got {found[0].tolist()}, {found[1].tolist()}")
        return found[0], found[1]

    def _written(self) -> int:
        """Episodes that an interrupted conversion of the same has written."""
        try:
            there = json.loads((self._work / "record.json").read_text())
        except (OSError, ValueError):
            return 0
        if self._restart or self._record is None or not isinstance(there, dict):
            return 0
        if there != self._record:
            parts = [name for name in ("source", "options") if there.get(name) != self._record[name]]
            what = " and ".join({"source": "the source has changed", "options": "the options differ"}[p] for p in parts)
            raise ValueError(
                f"{self._work} holds part of another conversion to {self.dst.name}: {what}; restart=True (--restart) "
                "throws it away"
            )
        try:
            return min(len(Store(self._work / "store.lewm")), len(self._episodes)) if self._through_store else 0
        except (OSError, StoreError):
            return 0

    def _recovered(self) -> int:
        """The same, after a look for what a killed process wrote and did not come to commit."""
        store = self._work / "store.lewm"
        if self._written():  # again: another process may have come between
            repair_store(store, progress=lambda done, all: self._say(done, all, "bytes checked"))
            shutil.rmtree(store / "damaged", ignore_errors=True)
        return self._written()

    def _make(self) -> tuple[Path, tuple[float, float] | None]:
        """Makes all of it in the work folder; gives where, and the PSNR, where it is not lossless."""
        store, export = self._work / "store.lewm", self._work / "export"
        _cleared(self._work, ("record.json", store.name) if self._done else ())
        write_atomically(self._work / "record.json", json.dumps(self._record).encode())
        if self._through_store:
            self._fill(store)
        psnr = None
        if self.kind != "store":
            data = Dataset(store) if self._through_store else self.source.data  # type: ignore[attr-defined]
            self._export(data, export, self._say)
            psnr = self._compare(data, export, self._say)
        if self._src is not None and _identity(self._src) != self._identity:
            raise ValueError(f"{self._src} has changed while it was converted")
        made = store if self.kind == "store" else export
        for path in (*made.rglob("*"), made):
            _sync(path)
        return made, psnr

    def _fill(self, store: Path) -> None:
        total = int(self._lengths.sum())
        done = int(self._lengths[: self._done].sum())
        with self._writer(store) as writer:
            for place in range(self._done, len(self._episodes)):
                frames, actions, columns = self._read(self._episodes[place])
                writer.append(self._fitted(frames), actions, columns)
                done += len(frames)
                self._say(done, total, "frames converted")
        episodes, frames, damage, _ = verify_store(store, lambda done, all: self._say(done, all, "bytes verified"))
        if damage or (episodes, frames) != (len(self._episodes), total):
            raise StoreError(
                f"{store} does not hold what was written: {'; '.join(damage) or f'{episodes} episodes of {frames}'}"
            )

    def _writer(self, path: Path) -> StoreWriter:
        size = {"height": self._height, "width": self._width, "action_dim": self.source.action_dim}
        return StoreWriter(path, **size, columns=self._columns, metadata=json.dumps(self.metadata))

    def _read(self, episode: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        source = self.source
        columns = {name: source.column(name, episode) for name in self._columns}
        return source.frames(episode), source.actions(episode), columns

    def _fitted(self, frames: np.ndarray) -> np.ndarray:
        return frames if self._options["size"] is None else fitted(frames, self._height, "frames")

    def _export(self, data: Dataset, path: Path, say: Progress | None) -> None:
        settings = {"fps": self.metadata["fps"]} if self.kind == "lerobot" else {}

        def progress(done: int, total: int) -> None:
            if say is not None:
                say(done, total, "frames exported")

        module_of(self.kind).write(data, path, progress=progress, **settings)

    def _compare(self, data: Dataset, path: Path, say: Progress | None) -> tuple[float, float] | None:
        """Reads all of an export again; PSNR of its episodes, least and mean, where it is not lossless."""
        found: list[float] = []
        with opened(path, self.kind) as made:
            if made.lengths.tolist() != data.lengths.tolist():
                raise StoreError(f"{path} does not hold the {len(data)} episodes that were written")
            for episode in range(len(data)):
                frames, wanted = made.frames(episode), data.frames(episode)
                if not made.lossless:
                    squares = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(frames, wanted, strict=True)]
                    found.append(float(10 * np.log10(255**2 / max(np.mean(squares), 1e-9))))
                    frames = wanted
                # A column may be kept in a narrower type.
                same = np.array_equal(frames, wanted) and np.array_equal(made.actions(episode), data.actions(episode))
                for name in data.columns.keys() & made.columns.keys():
                    rows = (each.column(name, episode).astype(np.float32) for each in (data, made))
                    same = same and np.array_equal(*rows)
                if not same:
                    raise StoreError(f"episode {episode} of {path} does not hold what was written")
                if say is not None:
                    say(episode + 1, len(data), "episodes verified")
        return (min(found), float(np.mean(found))) if found else None


def open_dataset(src: str | os.PathLike[str], store: str | os.PathLike[str] | None = None, **options: Any) -> Dataset:
    """`lewm.Dataset.open`."""
    src = Path(src)
    if is_store(src):
        if options or store is not None:
            raise ValueError(f"{src} is a store, which is opened as it is; got {', '.join(options) or 'store'} besides")
        return Dataset(src)
    path = Path(store) if store is not None else src.with_name((src.name if src.is_dir() else src.stem) + ".lewm")
    if not path.exists():
        convert(src, path, **options)
        return Dataset(path)
    data = Dataset(path)
    if not src.exists():
        raise FileNotFoundError(f"no such file or folder: {src}; {path} is there, lewm.Dataset opens it alone")
    made_from = data.metadata.get("source") or {}
    given = {name: value for name, value in options.items() if name in _OPTIONS and value is not None}
    wanted = {**_identity(src), "options": json.loads(json.dumps(given, default=_plain))}
    differing = [name for name, value in wanted.items() if made_from.get(name) != value]
    if differing:
        what = "with other options" if differing == ["options"] else "from another source, or that has changed since"
        raise ValueError(
            f"{path} was made {what}: {made_from.get('name')!r}, options {made_from.get('options')}; want "
            f"{src.name!r}, options {wanted['options']}. Remove it, or name another store="
        )
    return data


def dataset_from_arrays(
    frames: np.ndarray,
    actions: ArrayLike,
    episode_ends: ArrayLike,
    path: str | os.PathLike[str],
    *,
    low: ArrayLike,
    high: ArrayLike,
    columns: dict[str, ArrayLike] | None = None,
    fps: float | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """`lewm.Dataset.from_arrays`."""
    if Path(path).suffix != ".lewm":
        raise ValueError(f"path must end in .lewm, got {os.fspath(path)!r}")
    source = ArrayReader(frames, actions, episode_ends, columns or {})
    convert(source, path, low=low, high=high, fps=fps, progress=progress)
    return Dataset(path)


def _kind(dst: Path) -> str:
    suffixes = {".lewm": "store", ".h5": "hdf5", ".hdf5": "hdf5", "": "lerobot"}
    if dst.suffix.lower() not in suffixes:
        raise ValueError(
            f"dst must end in .lewm (a store), .h5 or .hdf5, or have no suffix (the folder of a LeRobot data set), got "
            f"{dst.name!r}"
        )
    return suffixes[dst.suffix.lower()]


def _check_free(dst: Path) -> None:
    if dst.exists() or dst.is_symlink():
        raise FileExistsError(f"{dst} is there already; it is not replaced: remove it, or choose another name")
    if not dst.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {dst.parent}")


def _chosen(episodes: Any, count: int) -> list[int]:
    if episodes is None:
        return list(range(count))
    if np.ndim(episodes) == 0:
        return list(range(integer("episodes", episodes, 1, count + 1)))
    chosen = [integer("episodes", episode, 0, count) for episode in episodes]
    if not chosen:
        raise ValueError("episodes must be at least 1, got none")
    return chosen


def _identity(path: Path) -> dict[str, Any]:
    """What tells a source from another, or from itself after a change: names, sizes and times of its files."""
    digest, total, count = hashlib.sha256(), 0, 0
    for file in [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file()):
        state = file.stat()
        digest.update(
            f"{file.relative_to(path).as_posix()}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="replace")
        )
        total, count = total + state.st_size, count + 1
    return {"name": path.absolute().name, "files": count, "bytes": total, "digest": digest.hexdigest()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"options must be plain numbers and text, got {value!r}")


def _versions(format: str) -> dict[str, str]:
    found = {"lewm-fast": __version__}
    for library in next((names for name, names in _LIBRARIES.items() if format.startswith(name)), ()):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """`folder`, made if it is not there, for this process alone."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as closing:
        closing.callback(_unlocked, folder)  # after the file is closed
        file = closing.enter_context(open(folder / "lock", "a+b"))
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"another process is converting in {folder}") from error
        yield


def _unlocked(folder: Path) -> None:
    """Removes a work folder that has nothing but its lock."""
    with suppress(OSError):  # another process may have come meanwhile
        if [path.name for path in folder.iterdir()] == ["lock"]:
            (folder / "lock").unlink()
            folder.rmdir()


def _cleared(folder: Path, kept: Sequence[str] = ()) -> None:
    """Removes what is in a work folder, but for its lock."""
    for path in [path for path in folder.iterdir() if path.name not in ("lock", *kept)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    """What is in a file, or the names in a folder, is on the disk, where the system has such a call."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _remarks(left_out: dict[str, str], notes: Sequence[str]) -> list[str]:
    return [*(f"left out: {name}: {why}" for name, why in left_out.items()), *(f"note: {note}" for note in notes)]
