"""The card of a data set: what it covers and where it came from, numbers (`card.json`) and picture (`card.png`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lewm import envs
from lewm.data import Dataset
from lewm.model_file import write_atomically

_EPISODES = 500  # looked through at most, evenly spread
_FRAMES = 8  # of one episode, shown


def write_card(
    data: Dataset | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    frames_per_second: float | None = None,
) -> dict[str, Any]:
    """Writes `card.json` and `card.png`.

    Args:
        data: A store or its path.
        out: Folder to write to; the store's name with `.card` when not given.
        frames_per_second: How fast it was collected, if that was measured.

    Returns:
        The content of `card.json`: origin, size, fingerprint, and per action and state number mean, standard
        deviation, least and largest, over at most 500 episodes.
    """
    data = data if isinstance(data, Dataset) else Dataset(data)
    if not len(data):
        raise ValueError(f"data must hold episodes, got none in {data.path}")
    folder = data.path.with_suffix(".card") if out is None else Path(out)
    chosen = np.unique(np.linspace(0, len(data) - 1, _EPISODES).astype(int)).tolist()
    actions = np.concatenate([data.actions(e) for e in chosen]).astype(np.float64)
    states = np.concatenate([data.column("state", e) for e in chosen]) if "state" in data.columns else None
    low, high = (np.asarray(data.metadata.get(f"action_{side}", np.nan)) for side in ("low", "high"))
    card = {
        "store": data.path.name,
        "metadata": data.metadata,
        "fingerprint": data.fingerprint(),
        "episodes": len(data),
        "frames": data.frame_count,
        "episode_lengths": _summary(data.lengths.astype(float)[:, None])[0],
        "frame": [data.height, data.width, 3],
        "bytes": sum(file.stat().st_size for file in data.path.iterdir() if file.is_file()),
        "frames_per_second": frames_per_second,
        "episodes_looked_at": len(chosen),
        "actions": _summary(actions),
        "actions_at_a_bound": float(((actions <= low) | (actions >= high)).mean()),
        "states": None if states is None else _summary(states),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "card.json", json.dumps(card, indent=1).encode())
    _draw(card, data, actions, states, folder / "card.png")
    return card


def _summary(rows: np.ndarray) -> list[dict[str, float]]:
    """Of each column."""
    values = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}
    return [{name: float(value[i]) for name, value in values.items()} for i in range(rows.shape[1])]


def _draw(card: dict[str, Any], data: Dataset, actions: np.ndarray, states: np.ndarray | None, path: Path) -> None:
    """Frames of the longest episode, histograms of actions, and where the states are, factor by factor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    factors = {} if states is None else envs.factors(data.metadata.get("env_id"), states)
    columns = max(3, 1 + len(factors))
    figure = Figure(figsize=(3.2 * columns, 5.6), layout="constrained")
    figure.suptitle(
        f"{card['store']}: {card['episodes']:,} episodes, {card['frames']:,} frames, "
        f"{data.metadata.get('env_id', 'unknown environment')}, fingerprint {card['fingerprint'][:12]}",
        fontsize=10,
    )
    grid = figure.add_gridspec(2, columns, height_ratios=(1, 2))
    longest = int(np.argmax(data.lengths))
    shown = np.linspace(0, int(data.lengths[longest]) - 1, _FRAMES).astype(int)
    strip = figure.add_subplot(grid[0, :])
    strip.imshow(np.concatenate(list(data.frames(longest, shown)), axis=1))
    strip.set_title(f"episode {longest}, steps {shown[0]} to {shown[-1]}", fontsize=9)
    strip.axis("off")
    axes = figure.add_subplot(grid[1, 0])
    for i, column in enumerate(actions.T):
        axes.hist(column, bins=60, histtype="step", density=True, label=f"action {i}")
    axes.set_title("actions", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    for place, (name, values) in enumerate(factors.items(), start=1):
        axes = figure.add_subplot(grid[1, place])
        if values.shape[1] == 2:
            axes.hist2d(*values.T, bins=48, cmin=1)
        else:
            for i, column in enumerate(values.T):
                axes.hist(column, bins=60, histtype="step", density=True, label=str(i))
            axes.legend(fontsize=7, frameon=False)
        axes.set_title(name, fontsize=9)
    FigureCanvasAgg(figure).print_png(os.fspath(path))
