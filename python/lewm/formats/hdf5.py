"""The official HDF5 file of le-wm and stable-worldmodel: a data set per column, episodes one after the other.

Row t holds the frame and the action that leads to the frame of row t+1; the action of an episode's last row, mostly
NaN, leads nowhere. `ep_len` (E,) and `ep_offset` (E,) say which rows are an episode's. Columns in groups have names
with `/`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lewm.formats import Source, actions_of, frames_of, needed, numeric
from lewm.memory import check_fits

if TYPE_CHECKING:
    from lewm.data import Dataset

_MAGIC = b"\x89HDF\r\n\x1a\n"
_ENDS = ("ep_len", "ep_offset")
# What h5py raises for a damaged file: also of a header that says what cannot be.
DAMAGE = (OSError, RuntimeError, KeyError, TypeError, OverflowError)


def recognised(path: Path) -> bool:
    """Whether this is an HDF5 file, or one by its name."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix.lower() in (".h5", ".hdf5") or file.read(len(_MAGIC)) == _MAGIC


class Reader(Source):
    """See `lewm.formats.Source`.

    Args:
        path: The file.
        camera: Column of frames, uint8 of shape (rows, H, W, 3); "pixels" where it is there, else the only such.
        action: Column of actions; "action" when not given.
    """

    def __init__(self, path: Path, *, camera: str | None = None, action: str | None = None) -> None:
        self.path, self.format, self.lossless, self.bytes = path, "hdf5", True, path.stat().st_size
        h5py = needed("h5py", "reading HDF5")
        try:
            self._file = h5py.File(path, "r")
        except DAMAGE as error:
            raise ValueError(f"{path} is no HDF5 file, or a damaged one: {error}") from error
        try:
            self._open(camera, action or "action")
        except BaseException:
            self.close()
            raise

    def _open(self, camera: str | None, action: str) -> None:
        try:
            found = dict(_data_sets(self._file))
        except DAMAGE as error:
            raise ValueError(f"{self.path} is a damaged HDF5 file: {error}") from error
        lengths, offsets = (self._ends(found, name) for name in _ENDS)
        if lengths.shape != offsets.shape:
            raise ValueError(f"{self.path}: ep_len has {len(lengths)} episodes, ep_offset {len(offsets)}")

        self._frames = found.pop(self._camera(found, camera))
        rows, self.height, self.width, _ = map(int, self._frames.shape)
        if action not in found:
            raise ValueError(f"{self.path} has no column of actions {action!r}; it has {', '.join(found) or 'none'}")
        actions = found.pop(action)
        if actions.ndim not in (1, 2) or actions.dtype.kind not in "fiu" or len(actions) != rows or 0 in actions.shape:
            raise ValueError(
                f"{action} of {self.path} must be numbers of shape ({rows}, A), as many as frames, got {actions.dtype} "
                f"of shape {actions.shape}"
            )
        self.action_dim = 1 if actions.ndim == 1 else actions.shape[1]
        order = np.argsort(offsets, kind="stable")
        ends = (offsets + lengths)[order]
        wrong = (
            (lengths < 0).any() or (offsets < 0).any() or (ends > rows).any() or (ends[:-1] > offsets[order][1:]).any()
        )
        if wrong or not len(lengths):
            raise ValueError(
                f"{self.path}: ep_len and ep_offset must say which of the {rows} rows are whose, without overlap; got "
                f"{len(lengths)} episodes of {int(lengths.sum())} rows that end at row {int(ends.max(initial=0))}"
            )

        self.left_out = {}
        self.columns, self._columns = {}, {}
        for name, data in found.items():
            why = numeric(data.dtype, data.shape[1:]) if data.ndim else "it has no rows"
            if data.ndim == 4 and data.dtype == np.uint8:
                why = "another camera"
            elif why is None and len(data) != rows:
                why = f"it has {len(data)} rows, {self._frames.name[1:]} {rows}"
            if why is None:
                self.columns[name], self._columns[name] = int(np.prod(data.shape[1:], dtype=int)), data
            else:
                self.left_out[name] = why
        for data in (self._frames, actions, *self._columns.values()):
            _check_filters(self.path, data)
        kept = lengths >= 2
        if not kept.all():
            self.left_out["episodes"] = f"{np.count_nonzero(~kept)} of {len(kept)} have fewer than 2 frames"
        if not kept.any():
            raise ValueError(f"{self.path} has no episode of at least 2 frames")
        self.lengths, self._offsets = lengths[kept], offsets[kept]
        self._actions = self._read(actions, slice(None), "actions").reshape(rows, -1)
        for episode in range(len(self)):
            self.actions(episode)  # what is not finite is said now
        self.metadata = _attributes(self._file, actions)

    def frames(self, episode: int) -> np.ndarray:
        what = f"{self.path} episode {episode}"
        frames = self._read(self._frames, self._rows(episode), f"frames of episode {episode}")
        return frames_of(frames, what, (int(self.lengths[episode]), self.height, self.width))

    def actions(self, episode: int) -> np.ndarray:
        return actions_of(self._actions[self._rows(episode)], f"{self.path} episode {episode}")

    def column(self, name: str, episode: int) -> np.ndarray:
        rows = self._read(self._columns[name], self._rows(episode), f"{name} of episode {episode}")
        return rows.reshape(len(rows), -1).astype(np.float64)

    def close(self) -> None:
        self._file.close()

    def _rows(self, episode: int) -> slice:
        return slice(int(self._offsets[episode]), int(self._offsets[episode] + self.lengths[episode]))

    def _ends(self, found: dict[str, Any], name: str) -> np.ndarray:
        if name not in found:
            raise ValueError(f"{self.path} has no {name}, which says where episodes begin; it has {', '.join(found)}")
        data = found.pop(name)
        if data.dtype.kind not in "iu" or data.ndim != 1:
            raise ValueError(f"{name} of {self.path} must be integers (E,), got {data.dtype} of shape {data.shape}")
        return self._read(data, slice(None), name).astype(np.int64)

    def _camera(self, found: dict[str, Any], camera: str | None) -> str:
        cameras = [
            name for name, data in found.items() if data.ndim == 4 and data.shape[-1] == 3 and 0 not in data.shape
        ]
        if camera is None:
            camera = "pixels" if "pixels" in found or len(cameras) != 1 else cameras[0]
        if camera not in found:
            raise ValueError(f"{self.path} has no camera {camera!r}; it has {', '.join(cameras) or 'none'}")
        data = found[camera]
        if camera not in cameras or data.dtype != np.uint8:
            raise ValueError(
                f"{camera} of {self.path} must be uint8 of shape (rows, H, W, 3), got {data.dtype} of {data.shape}"
            )
        return camera

    def _read(self, data: Any, rows: slice, what: str) -> np.ndarray:
        length = len(range(*rows.indices(len(data)))) * int(np.prod(data.shape[1:], dtype=float)) * data.dtype.itemsize
        check_fits(length, f"reading {what} of {self.path}", "is that what the file is to hold?")
        try:
            return data[rows]
        except DAMAGE as error:
            raise ValueError(f"{what} of {self.path} cannot be read, the file is damaged: {error}") from error


def write(data: Dataset, path: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None) -> None:
    """Writes the episodes of a data set as stable-worldmodel's `HDF5Dataset` and le-wm read them.

    Bounds of actions and frames a second are attributes, which those do not look at and `Reader` does.

    Args:
        data: The data set.
        path: File to write; there is all of it, or nothing.
        progress: Called with the frames written and those there are, after each episode.

    Raises:
        ValueError: A column has a name that the layout needs.
    """
    h5py = needed("h5py", "writing HDF5")
    clash = {"pixels", "action", *_ENDS} & data.columns.keys()
    if clash:
        raise ValueError(f"columns of {data.path} must not be called {', '.join(sorted(clash))} in HDF5")
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        # The oldest layout that is read while it is written, as HDF5Dataset opens it.
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            _write(data, file, progress)
        os.chmod(temporary, 0o644)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(data: Dataset, file: Any, progress: Callable[[int, int], object] | None) -> None:
    rows = data.frame_count
    columns = {
        "pixels": ((data.height, data.width, 3), np.uint8),
        "action": ((data.action_dim,), np.float32),
        **{name: ((width,), np.float64) for name, width in data.columns.items()},
    }
    made = {
        name: file.create_dataset(name, (rows, *shape), dtype, maxshape=(None, *shape), chunks=(1, *shape))
        for name, (shape, dtype) in columns.items()
    }
    lengths = data.lengths
    offsets = np.cumsum(lengths) - lengths
    file.create_dataset("ep_len", data=lengths.astype(np.int32), maxshape=(None,))
    file.create_dataset("ep_offset", data=offsets, maxshape=(None,))
    for name in ("low", "high"):
        if data.metadata.get(f"action_{name}") is not None:
            made["action"].attrs[name] = np.array(data.metadata[f"action_{name}"], np.float64)
    if data.metadata.get("fps") is not None:
        file.attrs["fps"] = float(data.metadata["fps"])
    last = np.full((1, data.action_dim), np.nan, np.float32)
    for episode, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        place = slice(start, start + length)
        made["pixels"][place] = data.frames(episode)
        made["action"][place] = np.concatenate([data.actions(episode), last])
        for name in data.columns:
            made[name][place] = data.column(name, episode)
        if progress is not None:
            progress(int(start + length), rows)


def _data_sets(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and data set of all in a file."""
    import h5py

    for name in group:
        item = own(group, name)
        if isinstance(item, h5py.Group):
            if prefix.count("/") > 8:
                raise ValueError(f"{group.file.filename}: groups within groups, down to {prefix}{name}")
            yield from _data_sets(item, f"{prefix}{name}/")
        elif isinstance(item, h5py.Dataset):
            yield prefix + name, item


def own(group: Any, name: str) -> Any:
    """What `group` holds as `name`; nothing that it only names, which may be in another file.

    Raises:
        KeyError: It holds no such thing.
        ValueError: It is a link, or its numbers are in another file.
    """
    import h5py

    what = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
    if not isinstance(group, h5py.Group) or name not in group:
        raise KeyError(name)
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{what} is a link, want data in the file itself")
    item = group[name]
    if isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
        raise ValueError(f"{what} is in another file")
    return item


def _check_filters(path: Path, data: Any) -> None:
    """Refuses compression that cannot be undone here; hdf5plugin, where it is installed, knows more than h5py."""
    import h5py

    properties = data.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    missing = [(code, name) for code, _, _, name in filters if not h5py.h5z.filter_avail(code)]
    if not missing:
        return
    with contextlib.suppress(ImportError):
        import_module("hdf5plugin")
    for code, name in missing:
        if not h5py.h5z.filter_avail(code):
            raise ModuleNotFoundError(
                f"{data.name} of {path} is compressed by filter {code} ({name.decode(errors='replace') or 'unnamed'}), "
                "which h5py alone does not know: pip install hdf5plugin"
            )


def _attributes(file: Any, actions: Any) -> dict[str, Any]:
    """What `write` noted."""
    found: dict[str, Any] = {}
    for name in ("low", "high"):
        values = np.asarray(actions.attrs.get(name, []))
        if values.dtype.kind == "f" and values.shape == (actions.shape[1:] or (1,)) and np.isfinite(values).all():
            found[f"action_{name}"] = values.tolist()
    fps = np.asarray(file.attrs.get("fps", 0))
    if fps.dtype.kind in "fiu" and fps.shape == () and 0 < fps < np.inf:
        found["fps"] = float(fps)
    return found
