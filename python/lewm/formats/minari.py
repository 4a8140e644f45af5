"""Minari data sets in its HDF5 storage, read by the minari library: a folder `NAME-v0` with `data/metadata.json`.

Observations are N, actions N-1, as in a store. Rewards, terminations, truncations and infos are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from lewm.formats import Source, actions_of, frames_of, needed, numeric

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
        described = _described(folder)
        storage = needed("minari.dataset.minari_storage", "reading Minari")
        needed("h5py", "reading Minari")
        try:  # both spaces are there: else it would make the environment that the data set names
            self._storage = storage.MinariStorage.read(folder)
            self._keys = {"/".join(keys): keys for keys, _ in _leaves(self._storage.observation_space)}
            entries = {"/".join(keys): entry for keys, entry in _leaves(self._storage.observation_space)}
            space = self._storage.action_space
        except Exception as error:  # of whatever it makes of such a description
            raise ValueError(f"{path} is a damaged Minari data set: {_named(error)}") from error
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
        jpeg = getattr(storage, "is_image_space", lambda _: False)  # older releases know none
        self.lossless = not (described.get("jpeg_encoding", True) and jpeg(entries[camera]))
        self.left_out = dict.fromkeys(("rewards", "terminations", "truncations"), _NOT_READ)
        self.left_out["infos"] = "not read from Minari"
        self.columns = {}
        for name, entry in entries.items():
            why = _no_column(entry)
            if name in cameras:
                why = "another camera"
            if why is None:
                self.columns[name] = int(np.prod(entry.shape, dtype=int))
            elif name != camera:
                self.left_out[name] = why
        self.lengths = self._lengths()
        self._read: tuple[int, dict[str, Any]] | None = None

    def frames(self, episode: int) -> np.ndarray:
        frames = self._entry(self._camera, episode)
        return frames_of(frames, self._what(episode), (int(self.lengths[episode]), self.height, self.width))

    def actions(self, episode: int) -> np.ndarray:
        rows = np.asarray(self._episode(episode)["actions"])
        wanted = (int(self.lengths[episode]) - 1, self.action_dim)
        if rows.shape != wanted:
            raise ValueError(f"actions of {self._what(episode)} must be of shape {wanted}, got {rows.shape}")
        return actions_of(np.concatenate([rows, rows[-1:]]), self._what(episode))

    def column(self, name: str, episode: int) -> np.ndarray:
        rows = np.asarray(self._entry(name, episode))
        wanted = (int(self.lengths[episode]), self.columns[name])
        if rows.dtype.kind not in "fiub" or rows.ndim not in (1, 2) or rows.reshape(len(rows), -1).shape != wanted:
            raise ValueError(
                f"{name} of {self._what(episode)} must be numbers of shape {wanted}, got {rows.dtype} of {rows.shape}"
            )
        return rows.reshape(wanted).astype(np.float64)

    def _what(self, episode: int) -> str:
        return f"{self.path} episode {episode}"

    def _lengths(self) -> np.ndarray:
        try:
            count = int(self._storage.total_episodes)
            steps = [int(found["total_steps"]) for found in self._storage.get_episode_metadata(range(count))]
        except Exception as error:
            raise ValueError(f"{self.path} is a damaged Minari data set: {_named(error)}") from error
        if not steps or min(steps) < 1:
            raise ValueError(f"{self.path} must have episodes of at least 1 step, got {min(steps, default='none')}")
        return np.array(steps, np.int64) + 1

    def _entry(self, name: str, episode: int) -> Any:
        value = self._episode(episode)["observations"]
        try:
            for key in self._keys[name]:
                value = value[key]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._what(episode)} has no observation {name!r}") from error
        return value

    def _episode(self, episode: int) -> dict[str, Any]:
        if self._read is None or self._read[0] != episode:
            self._read = None
            try:
                (found,) = self._storage.get_episodes([episode])
            except Exception as error:
                raise ValueError(f"{self._what(episode)} cannot be read, it is damaged: {_named(error)}") from error
            self._read = episode, found
        return self._read[1]


def _folder(path: Path) -> Path | None:
    for folder in (path / "data", path):
        if (folder / "metadata.json").is_file() and (folder / _FILE).is_file():
            return folder
    return None


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / "metadata.json").read_text())
        names = ("observation_space", "action_space", "data_format", "total_episodes")
        missing = [name for name in names if name not in described]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}/metadata.json is damaged: {error}") from error
    if missing:
        raise ValueError(f"{folder}/metadata.json lacks {', '.join(missing)}; environments that it names are not made")
    if described["data_format"] != "hdf5":
        raise ValueError(f"{folder} is in Minari's storage {described['data_format']!r}, want 'hdf5'")
    return described


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


def _named(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
