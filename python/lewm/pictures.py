"""Pictures of a run: loss curves and latent space (`report.png`), one planned episode (`episode.gif`)."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as imageio
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lewm import latents
from lewm.data import Dataset
from lewm.model import Model
from lewm.planner import Planner, plan

RED, BLUE, GREY = "#cf4a38", "#3a80bd", "#8f8f8f"  # seen on light and on dark


_PER_EPISODE = 40  # frames drawn of one


@dataclass
class Episode:
    """One planned episode, kept for drawing.

    Attributes:
        frames: (N, size, size, 3) uint8, the first before any action.
        goal: (size, size, 3) uint8.
        real: (N,) squared latent distance of each frame to the goal.
        imagined: Per plan, (step it was made at, (H + 1,) squared latent distances along it).
        block: Actions per imagined step.
        success: Whether the goal was reached.
    """

    frames: np.ndarray
    goal: np.ndarray
    real: np.ndarray
    imagined: list[tuple[int, np.ndarray]]
    block: int
    success: bool


def draw_report(
    run: str | os.PathLike[str],
    model: Model,
    data: Dataset,
    path: str | os.PathLike[str],
    heading: str = "",
    frames: int = 1500,
) -> None:
    """Draws loss curves and the first two principal components of held-out latents, coloured by position.

    Args:
        run: Run folder with `metrics.csv`.
        model: The trained model.
        data: Store with a `state` column; its held-out episodes (all, if none are recorded) are drawn.
        path: PNG to write.
        heading: First line of the figure.
        frames: How many latents are drawn at most.
    """
    columns = read_metrics(run)
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    (top_left, top_middle, top_right), (bottom_left, bottom_middle, bottom_right) = figure.subplots(2, 3)
    figure.suptitle(heading, fontsize=11)
    for axes, names, title in (
        (top_left, (("prediction", RED), ("validation_prediction", BLUE)), "prediction loss"),
        (top_middle, (("sigreg", RED),), "SIGReg"),
        (top_right, (("probe_r2", RED), ("distance_correlation", BLUE)), "what predicts planning success"),
    ):
        for name, colour in names:
            steps, values = columns.get(name, ([], []))
            axes.plot(steps, values, color=colour, label=name, marker="o" if len(steps) < 20 else None, lw=1.3, ms=3)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=8, frameon=False)
    top_left.set_yscale("log")
    top_middle.set_yscale("log")
    top_right.set_ylim(-0.1, 1.05)

    z, episodes, rows = latents.scattered(
        model, data, latents.held_out(model, data), frames=frames, per_episode=_PER_EPISODE
    )
    state, (scores, share) = states(data, episodes, rows), principal(z)
    for axes, values, what in ((bottom_left, state[:, 0], "state 0"), (bottom_middle, state[:, 1], "state 1")):
        dots = axes.scatter(*scores.T[:2], c=values, s=6, cmap="viridis", lw=0)
        figure.colorbar(dots, ax=axes, label=what)
        axes.set(title=f"latents, coloured by {what}", xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1]:.0%})")
    bottom_right.bar(np.arange(1, len(share) + 1), share, color=BLUE)
    bottom_right.set(title="variance by principal component", xlabel="component", ylabel="share")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(os.fspath(path))


def read_metrics(run: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every column of a run's `metrics.csv`: the steps at which it has a number (n,) int64, and these (n,) float64.

    A last line that is not whole, as a run leaves it that is being written or was killed, is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a table of numbers over `step`.
    """
    path = Path(run) / "metrics.csv"
    text = path.read_text(encoding="utf-8", errors="replace")
    found: dict[str, tuple[list[int], list[float]]] = {}
    try:
        for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
            step = int(row["step"])
            for name, value in row.items():
                steps, values = found.setdefault(name, ([], []))
                if value and math.isfinite(number := float(value)):
                    steps.append(step)
                    values.append(number)
        return {name: (np.array(steps, np.int64), np.array(values)) for name, (steps, values) in found.items()}
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise ValueError(f"{path} must be a table of numbers over step, as lewm train writes it: {error!r}") from None


def states(data: Dataset, episodes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The `state` (N, C) float64 of frames: of row `rows[i]` of episode `episodes[i]`, both (N,)."""
    found = np.empty((len(rows), data.columns["state"]))
    for episode in np.unique(episodes):
        which = episodes == episode
        found[which] = data.column("state", int(episode))[rows[which]]
    return found


def principal(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, K) of latents (N, D) on their principal components, and each one's share (K,) of the variance."""
    centred = z - z.mean(0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    return centred @ directions.T, spread**2 / max(float((spread**2).sum()), np.finfo(np.float32).tiny)


def play(
    model: Model,
    env_id: str,
    state: np.ndarray,
    goal_state: np.ndarray,
    goal: np.ndarray,
    *,
    planner: Planner | None = None,
    budget: int = 50,
    seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
) -> Episode:
    """Steers one environment from `state` to the picture `goal`, executing whole plans, and keeps what was imagined.

    It ends with the plan that reaches the goal, or with the budget.

    Args:
        model: What plans.
        env_id: A gymnasium id whose environment draws itself and resets to `state` and `goal`.
        state, goal_state: As in the environment's reset options.
        goal: (H, W, 3) uint8 picture of the goal.
        planner: By default the model's.
        budget: Environment steps at most.
        seed: Of the planner's noise.
        env_kwargs: Further arguments for the environment.
    """
    size = model.config.image_size
    env = gymnasium.make(env_id, **{**(env_kwargs or {}), "obs_type": "pixels", "size": size})
    obs, _ = env.reset(seed=0, options={"state": state, "goal": goal_state})
    target = model.encode(goal)
    frames, imagined, actions, success = [obs], [], [], False
    while len(frames) <= budget:
        if not len(actions):
            if success:  # the rest of the plan that got there is worth seeing
                break
            found = plan(
                frames[-1],
                target,
                model=model,
                planner=planner,
                seed=seed,
                plan_index=len(imagined),
                return_rollout=True,
            )
            imagined.append((len(frames) - 1, np.square(found.imagined - target).sum(-1)))
            actions = found.actions
        obs, _, reached, _, _ = env.step(actions[0])
        success |= reached
        actions = actions[1:]
        frames.append(obs)
    env.close()
    frames = np.stack(frames)
    real = np.square(model.encode(frames) - target).sum(-1)
    return Episode(frames, goal, real, imagined, model.config.action_block, bool(success))


def draw_episode(episode: Episode, path: str | os.PathLike[str], fps: int = 12) -> None:
    """Writes the episode as a GIF: the agent, the goal, and the latent distance as imagined and as it came.

    Args:
        episode: From `play`.
        path: GIF to write.
        fps: Frames per second.
    """
    pictures = [_panel(episode, step) for step in range(len(episode.frames))]
    pictures += [pictures[-1]] * fps  # rest on the end for a second
    imageio.imwrite(path, np.stack(pictures), extension=".gif", duration=1000 / fps, loop=0)


def _panel(episode: Episode, step: int) -> np.ndarray:
    figure = Figure(figsize=(8.2, 2.5), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    now, goal, chart = figure.subplots(1, 3, width_ratios=(1, 1, 1.7))
    for axes, picture, title in ((now, episode.frames[step], f"step {step}"), (goal, episode.goal, "goal")):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=9)
    for start, distances in episode.imagined:
        if start <= step:
            steps = start + episode.block * np.arange(len(distances))
            chart.plot(steps, distances, "--o", color=GREY, ms=3, lw=1, label="imagined" if start == 0 else None)
    chart.plot(episode.real[: step + 1], color=RED, lw=1.8, label="real")
    highest = max(episode.real.max(), *(d.max() for _, d in episode.imagined))
    chart.set(xlim=(0, len(episode.frames) - 1), ylim=(0, 1.05 * highest), xlabel="environment step")
    chart.set_title("squared latent distance to the goal", fontsize=9)
    chart.legend(fontsize=7, frameon=False, loc="upper right")
    chart.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def heading_of(result: dict[str, Any], seconds: float) -> str:
    """One line over a report: success beside the random floor."""
    low, high = result["interval"]
    return (
        f"{result['protocol']['name']}: {result['success_rate']:.1%} of {result['n']} [{low:.1%}, {high:.1%}], "
        f"random actions {result['random_floor']:.1%}; trained in {seconds:.0f} s"
    )
