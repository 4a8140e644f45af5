"""The main job, end to end: collect, train, evaluate, and pictures of it, on an ordinary CPU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lewm.collector import collect
from lewm.envs.two_room import DOOR
from lewm.evaluation import PROTOCOLS, evaluate, make_tasks
from lewm.page import report
from lewm.pictures import draw_episode, draw_report, heading_of, play
from lewm.progress import Bar
from lewm.trainer import train

_PROTOCOL = "two-room-25-50"
_EPISODES = 300
_SIZE = 64
_FRAMES = 800  # of the report


def demo(out: str | os.PathLike[str], *, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Trains `tiny` on TwoRoom from pixels and steers it to goal pictures.

    Args:
        out: Folder for `two-room.lewm`, `run/`, `model.safetensors`, `result.json`, `report.png`, `report.html`,
            `episode.gif`. What an earlier demo left there is replaced.
        seed: Of data, training and planning.
        steps: Optimiser steps; the preset's when not given.

    Returns:
        The content of `result.json`.
    """
    console, out = Console(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("two-room.lewm", "run"):
        shutil.rmtree(out / name, ignore_errors=True)

    console.rule("1/4  collect: a noisy scripted policy walks between two rooms")
    env_id = PROTOCOLS[_PROTOCOL].env_id
    with Bar("episodes") as bar:
        data = collect(
            env_id,
            out / "two-room.lewm",
            episodes=_EPISODES,
            size=_SIZE,
            seed=seed,
            progress=bar.collect,
        )
    console.print(f"{len(data)} episodes, {int(data.lengths.sum()):,} frames of {_SIZE}x{_SIZE} pixels")

    console.rule("2/4  train: prediction + lambda * SIGReg, from pixels, end to end")
    overrides: dict[str, Any] = {} if steps is None else {"steps": steps}
    with Bar("steps") as bar:
        model = train(data, preset="tiny", out=out / "run", seed=seed, progress=bar.train, **overrides)
    training = model.meta["training"]
    console.print(
        f"{training['seconds']:.0f} s; held-out prediction loss {training['metrics']['validation_prediction']:.4f}, "
        f"position probe R2 {training['metrics']['probe_r2']:.3f}, "
        f"distance correlation {training['metrics']['distance_correlation']:.2f}",
        soft_wrap=True,
    )
    shutil.copyfile(out / "run" / "model.safetensors", out / "model.safetensors")

    console.rule("3/4  evaluate: steer to pictures of places 25 steps ahead")
    with Bar("pairs") as bar:
        result = evaluate(model, _PROTOCOL, seed=seed, out=out / "run" / "result.json", progress=bar.count).to_dict()

    shutil.copyfile(out / "run" / "result.json", out / "result.json")

    console.rule("4/4  draw")
    draw_report(out / "run", model, data, out / "report.png", heading_of(result, training["seconds"]))
    draw_episode(_best_episode(model, result), out / "run" / "episode.gif")
    shutil.copyfile(out / "run" / "episode.gif", out / "episode.gif")
    report(out / "run", data=data, out=out / "report.html", seed=seed, frames=_FRAMES)

    low, high = result["interval"]
    console.print(
        f"\n[bold]{result['success_rate']:.1%}[/bold] of {result['n']} held-out pairs solved "
        f"(95 % interval {low:.1%} to {high:.1%}); random actions solve {result['random_floor']:.1%}, "
        f"{result['solved_at_start']} were at the goal from the start.\n"
        f"One plan takes {result['plan_ms']['p50']:.0f} ms (p95 {result['plan_ms']['p95']:.0f} ms).\n\n"
        f"Look at [bold]{out}/report.html[/bold] in a browser, at [bold]{out}/report.png[/bold] (losses, latent space) "
        f"and [bold]{out}/episode.gif[/bold].\n"
        f"Numbers: {out}/result.json. Load and plan:\n\n"
        f"    import lewm; model = lewm.load({os.fspath(out / 'model.safetensors')!r})\n"
        f"    action = lewm.plan(obs, goal, model=model).action      # two (64, 64, 3) uint8 pictures\n",
        highlight=False,
        soft_wrap=True,
    )
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def _best_episode(model: Any, result: dict[str, Any]) -> Any:
    """The longest way to a goal in the other room that was solved, steered again for drawing."""
    protocol = PROTOCOLS[_PROTOCOL]
    tasks = make_tasks(protocol, result["n"], model.config.image_size)
    across = (tasks.states[:, 0] < DOOR[0]) != (tasks.goals[:, 0] < DOOR[0])
    far = np.linalg.norm(tasks.states - tasks.goals, axis=1)
    pair = int(np.argmax(far * across * np.asarray(result["success"])))
    return play(
        model, protocol.env_id, tasks.states[pair], tasks.goals[pair], tasks.pictures[pair], budget=protocol.budget
    )
