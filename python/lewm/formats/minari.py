"""Minari data sets in its HDF5 storage: a folder `NAME-v0` with `data/metadata.json`.

Observations are N, actions N-1, as in a store. Rewards, terminations, truncations and infos are not read. The minari
library says what the spaces are. It is not asked for the episodes: it makes the environment that a description without
spaces names, and one release cannot read pictures of another, which are JPEG in some and plain in others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from lewm.formats import Source, actions_of, frames_of, needed, numeric
from lewm.formats.hdf5 import DAMAGE, own

_FILE = "main_data.hdf5"
_NOT_READ = "one for each action; not read from Minari"


def recognised(path: Path) -> bool:
    """Whether this is the folder of a Minari data set."""
    return _folder(path) is not None


class Reader(Source):
    """See `lewm.formats.Source`.

    Args:
        path: Folder of the data set, or its folder `data`.
        camera: Name of the image among the entries of a Dict observation, with `/` between those of nested ones.
        action: Not for Minari, whose actions have no name.
    """

    def __init__(self, path: Path, *, camera: str | None = None, action: str | None = None) -> None:
        if action is not None:
            raise ValueError(f"action must not be given for Minari, which has one action, got {action!r}")
        folder = _folder(path)
        if folder is None:
            raise ValueError(f"{path} is no Minari data set: it has no data/metadata.json")
        self.path, self.format = path, "minari"
        self.bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        entries, space, count = _described(folder)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"actions of {path} must be continuous, Box of (A,), got {space}")
        self.action_dim = space.shape[0]
        self.metadata = {}
        if np.isfinite(space.low).all() and np.isfinite(space.high).all():
            self.metadata = {"action_low": space.low.tolist(), "action_high": space.high.tolist()}

        cameras = [name for name, entry in entries.items() if _is_image(entry)]
        if camera is None and len(cameras) == 1:
            camera = cameras[0]
        if camera not in cameras:
            listed = ", ".join(name or "the observation" for name in cameras) or "none"
            raise ValueError(
                f"{path} needs camera=, the observation of uint8 (H, W, 3) that the frames are; it has {listed}"
                if camera is None
                else f"{path} has no camera {camera!r}; observations of uint8 (H, W, 3) are {listed}"
            )
        self._camera = camera
        self.height, self.width = entries[camera].shape[:2]
        self.left_out = dict.fromkeys(("rewards", "terminations", "truncations"), _NOT_READ)
        self.left_out["infos"] = "not read from Minari"
        self.columns = {}
        for name, entry in entries.items():
            why = "another camera" if name in cameras else _no_column(entry)
            if why is None:
                self.columns[name] = int(np.prod(entry.shape, dtype=int))
            elif name != camera:
                self.left_out[name] = why
        h5py = needed("h5py", "reading Minari")
        try:
            self._file = h5py.File(folder / _FILE, "r")
        except DAMAGE as error:
            raise ValueError(f"{folder / _FILE} is no HDF5 file, or a damaged one: {error}") from error
        try:
            self.lengths = np.array([self._length(episode) for episode in range(count)], np.int64)
            self.lossless = self._rows(0, "observations", camera).ndim == 4
        except BaseException:
            self.close()
            raise

    def frames(self, episode: int) -> np.ndarray:
        rows, shape = self._rows(episode, "observations", self._camera), (self.height, self.width, 3)
        if rows.ndim != 4:
            Image = needed("PIL.Image", "reading Minari's pictures")
            frames = []
            for row in self._values(episode, rows):
                try:
                    with Image.open(io.BytesIO(np.asarray(row, np.uint8).tobytes()), formats=["JPEG"]) as picture:
                        if picture.size != (self.width, self.height) or picture.mode != "RGB":
                            raise ValueError(f"it is {picture.size} {picture.mode}")
                        frames.append(np.asarray(picture))
                except (OSError, SyntaxError, TypeError, ValueError) as error:
                    text = f"frame {len(frames)} of {self._what(episode)} must be JPEG of RGB {shape}: {error}"
                    raise ValueError(text) from error
            return frames_of(np.array(frames), self._what(episode), (int(self.lengths[episode]), *shape[:2]))
        if rows.shape != (self.lengths[episode], *shape):
            raise ValueError(f"frames of {self._what(episode)} must be of shape {shape} each, got {rows.shape}")
        return frames_of(self._values(episode, rows), self._what(episode), (int(self.lengths[episode]), *shape[:2]))

    def actions(self, episode: int) -> np.ndarray:
        rows = self._rows(episode, "actions", "")
        wanted = (int(self.lengths[episode]) - 1, self.action_dim)
        if rows.shape != wanted:
            raise ValueError(f"actions of {self._what(episode)} must be of shape {wanted}, got {rows.shape}")
        values = self._values(episode, rows)
        return actions_of(np.concatenate([values, values[-1:]]), self._what(episode))

    def column(self, name: str, episode: int) -> np.ndarray:
        rows = self._rows(episode, "observations", name)
        wanted = (int(self.lengths[episode]), self.columns[name])
        if rows.dtype.kind not in "fiub" or rows.shape not in (wanted, wanted[:1] if wanted[1] == 1 else wanted):
            raise ValueError(
                f"{name} of {self._what(episode)} must be numbers of shape {wanted}, got {rows.dtype} of {rows.shape}"
            )
        return self._values(episode, rows).reshape(wanted).astype(np.float64)

    def close(self) -> None:
        self._file.close()

    def _what(self, episode: int) -> str:
        return f"{self.path} episode {episode}"

    def _length(self, episode: int) -> int:
        """Frames of an episode: a step more than it has."""
        steps = self._rows(episode, "actions", "").shape
        if not steps or steps[0] < 1:
            raise ValueError(f"{self._what(episode)} must have at least 1 action, got {steps}")
        return steps[0] + 1

    def _rows(self, episode: int, part: str, name: str) -> Any:
        """The data set of one entry of an episode."""
        keys = [f"episode_{episode}", part, *filter(None, name.split("/"))]
        item = self._file
        try:
            for key in keys:
                item = own(item, key)
            if item.shape is None:
                raise KeyError(name)
            return item
        except (AttributeError, *DAMAGE) as error:
            raise ValueError(f"{self._what(episode)} is damaged: it has no {'/'.join(keys[1:])}") from error

    def _values(self, episode: int, rows: Any) -> np.ndarray:
        try:
            return rows[:]
        except DAMAGE as error:
            raise ValueError(f"{rows.name} of {self._what(episode)} cannot be read, it is damaged: {error}") from error


def _folder(path: Path) -> Path | None:
    for folder in (path / "data", path):
        if (folder / "metadata.json").is_file() and (folder / _FILE).is_file():
            return folder
    return None


def _described(folder: Path) -> tuple[dict[str, spaces.Space], spaces.Space, int]:
    """Entries of the observation, the action space, and how many episodes there are."""
    wanted = ("observation_space", "action_space", "data_format", "total_episodes")
    try:
        described = json.loads((folder / "metadata.json").read_text())
        missing = [name for name in wanted if name not in described]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}/metadata.json is damaged: {error}") from error
    if missing:
        raise ValueError(f"{folder}/metadata.json lacks {', '.join(missing)}; environments that it names are not made")
    if described["data_format"] != "hdf5":
        raise ValueError(f"{folder} is in Minari's storage {described['data_format']!r}, want 'hdf5'")
    made = needed("minari.serialization", "reading Minari").deserialize_space
    try:
        observation, action = (made(described[name]) for name in wanted[:2])
        count = int(described["total_episodes"])
        entries = {"/".join(keys): entry for keys, entry in _leaves(observation)}
    except Exception as error:  # of whatever it makes of such a description
        raise ValueError(f"{folder}/metadata.json is damaged: {type(error).__name__} {error}") from error
    if count < 1:
        raise ValueError(f"{folder} has no episodes")
    return entries, action, count


def _leaves(space: spaces.Space, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], spaces.Space]]:
    """Keys and space of each entry of nested Dicts; no keys for an observation that is none."""
    if not isinstance(space, spaces.Dict):
        yield keys, space
        return
    for key, entry in space.spaces.items():
        yield from _leaves(entry, (*keys, key))


def _is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.shape[2] == 3 and space.dtype == np.uint8


def _no_column(space: spaces.Space) -> str | None:
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return f"{type(space).__name__} is no number"
    return numeric(np.dtype(space.dtype), space.shape)
