"""What a model imagines, beside what happened: open-loop rollouts of recorded clips, and the candidates of a plan.

A clip begins with as many real frames as the model has history. From then on it sees nothing: the recorded actions lead
from latent to latent, and a decoder (`lewm.train_decoder`) makes pictures of them (paper, figures 7, 9 and 11). How far
the imagined latent is from the real one needs no decoder.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from lewm import latents, pixels
from lewm.checks import integer
from lewm.data import Dataset
from lewm.planner import Plan, Planner, plan, planner_of

_RED, _GREEN = "#c8402f", "#3f8f4f"
_LINES = 128  # candidates drawn of an iteration, at most


@dataclass(frozen=True)
class Imagination:
    """A clip as it was and as the model imagined it, `action_block` raw steps apart: n frames.

    Attributes:
        frames: (n, S, S, 3) uint8, what happened, at the model's size.
        context: How many frames the model has seen, the first ones; the rest is imagined.
        z: (n, D) float32 latents of the frames.
        imagined_z: (n, D) float32: those of the context, then the imagined ones.
        reconstructed, imagined: (n, S, S, 3) uint8, the two as the decoder paints them; None without a decoder.
        episode: Number in its store; None if it is from none.
    """

    frames: np.ndarray
    context: int
    z: np.ndarray
    imagined_z: np.ndarray
    reconstructed: np.ndarray | None = None
    imagined: np.ndarray | None = None
    episode: int | None = None

    @property
    def error(self) -> np.ndarray:
        """(n,) squared distance of imagined and real latent, summed over D; 0 over the context."""
        return np.square(self.imagined_z.astype(np.float64) - self.z).sum(-1)

    @property
    def error_still(self) -> np.ndarray:
        """(n,) the same of a model that believes that nothing changes after the context, to compare `error` with."""
        still = self.z.copy()
        still[self.context :] = self.z[self.context - 1]
        return np.square(still.astype(np.float64) - self.z).sum(-1)


def imagine(
    model: Any, frames: np.ndarray, actions: np.ndarray, decoder: Any = None, *, steps: int | None = None
) -> Imagination:
    """Imagines a recorded clip from its first frames and its actions alone (paper, figures 7, 9 and 11).

    Args:
        model: A `lewm.Model` that knows its action statistics.
        frames: (T, H, W, 3) uint8, of every raw step; one in `action_block` is used.
        actions: (T - 1, A_raw) raw actions between them.
        decoder: What paints latents, of this model; None for latents alone.
        steps: Blocks to imagine; by default as many as the clip has after the context of `config.history` frames.

    Raises:
        TypeError: `steps` is not an integer.
        ValueError: The clip is too short, frames or actions are not as described, the decoder is of another model, or
            the model has no action statistics.
    """
    frames, actions = pixels.checked(frames, "frames", (1,)), np.asarray(actions)
    block, width = model.config.action_block, model.config.action_dim
    if actions.shape != (len(frames) - 1, width):
        raise ValueError(
            f"actions must be of shape {(len(frames) - 1, width)}, one between each two of {len(frames)} frames, got "
            f"{actions.shape}"
        )
    count = _count(model, len(frames), steps, "frames")
    raw = actions[: (count - 1) * block].reshape(count - 1, block * width)
    return _imagined(model, frames[: (count - 1) * block + 1 : block], raw, decoder)


def imagine_episodes(
    model: Any, data: Dataset, decoder: Any = None, *, episodes: int = 4, steps: int | None = None, seed: int = 0
) -> list[Imagination]:
    """`imagine` for random episodes that neither the model nor the decoder has learnt from, where there are any.

    Args:
        model, decoder, steps: As in `imagine`.
        data: Where the episodes are.
        episodes: How many, at most.
        seed: Of the choice.

    Returns:
        In the order of their numbers; episodes that are too short for `steps` are left out.

    Raises:
        TypeError: A count is not an integer.
        ValueError: No episode is long enough, or as in `imagine`.
    """
    integer("episodes", episodes, 1)
    integer("seed", seed, 0)
    if data.action_dim != model.config.action_dim:
        raise ValueError(f"data must have actions of width {model.config.action_dim}, got {data.action_dim}")
    model.require_stats()
    block = model.config.action_block
    least = (model.config.history + (1 if steps is None else integer("steps", steps, 1)) - 1) * block + 1
    unseen = latents.held_out(model, data)
    if decoder is not None:
        unseen = np.intersect1d(unseen, latents.held_out(decoder, data))
    unseen = unseen if len(unseen) else np.arange(len(data))
    fitting = unseen[data.lengths[unseen] >= least]
    if not len(fitting):
        longest = int(data.lengths[unseen].max()) if len(unseen) else 0
        raise ValueError(
            f"data must have held-out episodes of at least {least} frames, for {model.config.history} of context and "
            f"{steps or 1} blocks of {block} actions; the longest has {longest}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(fitting)[:episodes])
    found = []
    for episode in map(int, chosen):
        count = _count(model, int(data.lengths[episode]), steps, f"episode {episode}")
        frames = data.frames(episode, np.arange(count) * block)
        raw = data.actions(episode)[: (count - 1) * block].reshape(count - 1, -1)
        found.append(_imagined(model, frames, raw, decoder, episode))
    return found


def _count(model: Any, length: int, steps: int | None, what: str) -> int:
    """Frames, a block apart, of the context and what is imagined after it."""
    block, context = model.config.action_block, model.config.history
    there = (length - 1) // block + 1 - context  # blocks after the context
    if there < 1:
        raise ValueError(
            f"{what} must hold at least {context * block + 1} frames, {context} of context and one to imagine, each a "
            f"block of {block} actions after the one before; got {length}"
        )
    if steps is not None and integer("steps", steps, 1) > there:
        raise ValueError(f"steps must be at most {there}, the blocks after the context in {what}, got {steps}")
    return context + (there if steps is None else steps)


def _imagined(model: Any, frames: np.ndarray, raw: np.ndarray, decoder: Any, episode: int | None = None) -> Imagination:
    """From frames (n, H, W, 3) a block apart, and the raw blocks (n - 1, A) between them."""
    _check_decoder(decoder, model)
    if not np.isfinite(raw).all():
        raise ValueError("actions must be finite, got NaN or infinity")
    blocks = np.asarray(model.normalise(raw), np.float32)[None]
    context = model.config.history
    frames = pixels.fitted(frames, model.config.image_size, "frames")
    z = np.asarray(model.encode(frames), np.float32)
    past = blocks[:, : context - 1] if context > 1 else None
    imagined = np.asarray(model.rollout(z[None, :context], blocks[:, None, context - 1 :], past)[0, 0], np.float32)
    pictures = (None, None) if decoder is None else (decoder(z), decoder(imagined))
    return Imagination(frames, context, z, imagined, *pictures, episode=episode)


def _check_decoder(decoder: Any, model: Any) -> None:
    if decoder is not None and decoder.model != model.hash():
        raise ValueError(f"decoder must be of this model ({model.hash()[:12]}), got one of {decoder.model[:12]}")


def table(found: list[Imagination]) -> list[dict[str, float]]:
    """Means over clips, by blocks after the context.

    Returns:
        For each number of blocks: `blocks`; `clips`, how many go so far; `error` and `error_still`, squared latent
        distances; and if there are pictures, the PSNR (dB) against what happened, `psnr_reconstructed`
        and `psnr_imagined`.
    """
    from lewm.decoder import psnr

    rows = []
    for block in range(1, max(len(clip.z) - clip.context for clip in found) + 1):
        clips = [(clip, clip.context + block - 1) for clip in found if clip.context + block <= len(clip.z)]
        row: dict[str, float] = {"blocks": block, "clips": len(clips)}
        for name in ("error", "error_still"):
            row[name] = float(np.mean([getattr(clip, name)[t] for clip, t in clips]))
        if found[0].imagined is not None:
            for name in ("reconstructed", "imagined"):
                row[f"psnr_{name}"] = float(
                    np.mean([psnr(getattr(clip, name)[t], clip.frames[t]) for clip, t in clips])
                )
        rows.append(row)
    return rows


def draw_imagination(found: list[Imagination], path: str | os.PathLike[str], fps: float = 4) -> None:
    """Writes clips as a GIF: a row for each, of what happened, its reconstruction, and what was imagined.

    The reconstruction is what the decoder can paint at best; what it blurs says nothing of the predictor. Frames that
    the model has seen have a green border, imagined ones a red one.

    Args:
        found: From `imagine_episodes`, or several from `imagine`, with a decoder.
        path: GIF to write.
        fps: Frames a second; each is a block.

    Raises:
        ValueError: There is no clip, or one without pictures, or the path has another suffix.
    """
    import imageio.v3 as imageio
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lewm.model_file import write_atomically

    _check_suffix(path, ".gif")
    if not found or any(clip.imagined is None for clip in found):
        raise ValueError("found must be clips with pictures: give imagine a decoder")
    if not 0 < fps < np.inf:
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    figure = Figure(figsize=(5.1, 0.45 + 1.65 * len(found)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), 3, squeeze=False)
    pictures = []
    for axes, clip in zip(grid, found, strict=True):
        shown = clip.frames, clip.reconstructed, clip.imagined
        pictures.append([a.imshow(s[0], interpolation="nearest") for a, s in zip(axes, shown, strict=True)])
        axes[0].set_ylabel("clip" if clip.episode is None else f"episode {clip.episode}", fontsize=8)
    for axes, title in zip(grid[0], ("real", "reconstructed", "imagined"), strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    images = []
    for t in range(max(len(clip.z) for clip in found)):
        for axes, row, clip in zip(grid, pictures, found, strict=True):
            now = min(t, len(clip.z) - 1)  # one that has ended rests
            for picture, values in zip(row, (clip.frames, clip.reconstructed, clip.imagined), strict=True):
                picture.set_data(values[now])
            axes[2].spines[:].set(color=_GREEN if now < clip.context else _RED, linewidth=2)
            axes[2].set_xlabel("seen" if now < clip.context else f"block {now - clip.context + 1}", fontsize=8)
        canvas.draw()
        images.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    images += [images[-1]] * round(fps)  # rest on the end for a second
    content = imageio.imwrite("<bytes>", np.stack(images), extension=".gif", duration=1000 / fps, loop=0)
    write_atomically(path, content)


@dataclass(frozen=True)
class Round:
    """The candidates of one iteration of a search.

    Attributes:
        iteration: Its number, from 1.
        paths: (S, H + 1, D) their latents, now first.
        costs: (S,) what the planner scored them with.
        elites: (S,) bool, whether the next mean was fitted to it.
    """

    iteration: int
    paths: np.ndarray
    costs: np.ndarray
    elites: np.ndarray


@dataclass(frozen=True)
class Fan:
    """What a planner searched through.

    Attributes:
        plan: What it found, with its `imagined` latents.
        goal: (D,) latent of the goal.
        rounds: The first iteration and the last; one if there was one.
    """

    plan: Plan
    goal: np.ndarray
    rounds: tuple[Round, ...]


class _Watched:
    """A model whose planner's candidates are noted: those of the first iteration and of the last."""

    def __init__(self, model: Any) -> None:
        self._model, self._iteration = model, 0
        self.start: tuple[Any, ...] = ()
        self.seen: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def objective(self, z: np.ndarray, goal: np.ndarray, past: np.ndarray | None, cost: str | None) -> Any:
        """What scores as the model does, and never searches by itself."""
        self.start = z, goal, past

        def scored(candidates: np.ndarray) -> np.ndarray:
            costs = np.asarray(self._model.costs(z, goal, candidates, past, cost))
            if candidates.shape[1] > 1:  # the final mean comes alone
                self._iteration += 1
                # The planner writes over its own arrays.
                self.seen = [*self.seen[:1], (self._iteration, candidates.copy(), costs.copy())]
            return costs

        return scored


def fan(
    model: Any,
    obs: np.ndarray,
    goal: np.ndarray,
    *,
    planner: Planner | None = None,
    past_actions: np.ndarray | None = None,
    seed: int = 0,
) -> Fan:
    """Plans as `lewm.plan` does, on the same noise, and keeps the candidates of the first and the last iteration.

    On "cuda" the search of `lewm.plan` runs on the device, and agrees with this one to rounding.

    Args:
        model, goal, planner, past_actions, seed: As in `lewm.plan`, for one environment.
        obs: (H, W, 3) uint8; with `past_actions` the last T frames, (T, H, W, 3).

    Raises:
        TypeError, ValueError: As in `lewm.plan`, or there are several environments.
    """
    axes = 3 if past_actions is None else 4
    if np.ndim(obs) != axes:
        raise ValueError(f"obs must be of one environment, with {axes} axes, got shape {np.shape(obs)}")
    planner = planner_of(model, planner)
    watched = _Watched(model)
    found = plan(obs, goal, model=watched, planner=planner, past_actions=past_actions, seed=seed, return_rollout=True)
    z, target, past = watched.start
    rounds = []
    for iteration, candidates, costs in watched.seen:
        paths = np.asarray(model.rollout(z, candidates, past))[0, :, z.shape[1] - 1 :]
        elites = np.zeros(len(paths), bool)
        elites[np.argsort(costs[0], kind="stable")[: planner.elites]] = True
        rounds.append(Round(iteration, paths, costs[0], elites))
    return Fan(found, target[0], tuple(rounds))


def draw_fan(
    model: Any,
    obs: np.ndarray,
    goal: np.ndarray,
    path: str | os.PathLike[str],
    *,
    decoder: Any = None,
    planner: Planner | None = None,
    past_actions: np.ndarray | None = None,
    seed: int = 0,
) -> Fan:
    """Draws what a planner searches through: the imagined paths of its candidates, coloured by their cost.

    Left the first iteration, right the last, in the plane of the first two principal components of all their latents.
    Elites are drawn thick, the plan red. Axes and colours are the same on both sides.

    Args:
        model, obs, goal, planner, past_actions, seed: As in `fan`.
        path: PNG to write.
        decoder: Of this model; paints where the plan ends, and the best candidates of the first iteration.

    Returns:
        What is drawn.

    Raises:
        TypeError, ValueError: As in `fan`, the decoder is of another model, or the path has another suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from lewm.model_file import write_atomically

    _check_suffix(path, ".png")
    _check_decoder(decoder, model)
    found = fan(model, obs, goal, planner=planner, past_actions=past_actions, seed=seed)
    first = found.rounds[0]
    project, share = _plane(
        np.concatenate([found.plan.imagined, *(r.paths.reshape(-1, len(found.goal)) for r in found.rounds)])
    )

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1))
    sides = top.subplots(1, len(found.rounds), sharex=True, sharey=True, squeeze=False)[0]
    scale = Normalize(min(r.costs.min() for r in found.rounds), first.costs.max())
    for axes, shown in zip(sides, found.rounds, strict=True):
        order = np.argsort(shown.costs)[:_LINES][::-1]  # the best on top
        lines = LineCollection(
            list(project(shown.paths[order])),
            cmap="viridis_r",
            norm=scale,
            linewidths=np.where(shown.elites[order], 1.4, 0.5),
        )
        lines.set_array(shown.costs[order])
        axes.add_collection(lines)
        axes.plot(*project(found.plan.imagined).T, "-o", color=_RED, lw=2, ms=4, label="plan")
        axes.plot(*project(found.plan.imagined[:1]).T, "o", color="black", ms=7, label="now")
        axes.plot(*project(found.goal[None]).T, "*", color="black", ms=14, label="goal")
        axes.autoscale_view()
        axes.set_title(
            f"iteration {shown.iteration}: {len(shown.costs)} candidates, best {shown.costs.min():.3g}", fontsize=9
        )
        axes.set(xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1]:.0%})")
        axes.spines[["top", "right"]].set_visible(False)
    sides[0].legend(fontsize=8, frameon=False)
    top.colorbar(lines, ax=list(sides), label="cost")

    pictures = [("now", np.asarray(obs) if past_actions is None else np.asarray(obs)[-1])]
    if np.ndim(goal) == 3:
        pictures.append(("goal", np.asarray(goal)))
    if decoder is not None:
        best = first.paths[np.argsort(first.costs)[:3], -1]
        painted = decoder(np.concatenate([found.goal[None], found.plan.imagined[-1:], best]).astype(np.float32))
        titles = ("goal, painted", "end of plan", *(f"iteration 1, best {i}" for i in range(1, len(best) + 1)))
        pictures += zip(titles, painted, strict=True)
    for axes, picture in zip(bottom.subplots(1, 7, squeeze=False)[0], [*pictures, *7 * [None]], strict=False):
        axes.axis("off")
        if picture is not None:
            axes.imshow(picture[1], interpolation="nearest")
            axes.set_title(picture[0], fontsize=8)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())
    return found


def _plane(z: np.ndarray) -> tuple[Any, np.ndarray]:
    """What takes latents (..., D) to their first two principal components among `z` (N, D), and these's share of it."""
    centre = z.mean(0)
    _, spread, directions = np.linalg.svd(z - centre, full_matrices=False)
    two = np.zeros((2, z.shape[1]))
    two[: len(directions[:2])] = directions[:2]
    share = np.pad(spread**2, (0, 2))[:2] / max((spread**2).sum(), 1e-30)
    return lambda latent: (latent - centre) @ two.T, share


def _check_suffix(path: str | os.PathLike[str], suffix: str) -> None:
    if os.path.splitext(os.fspath(path))[1].lower() != suffix:
        raise ValueError(f"path must end in {suffix}, got {os.fspath(path)!r}")
