"""Violation of expectation (paper section 5.2): does the model notice what cannot happen?

`surprise` scores a clip. `voe` makes matched clips of a simulated environment, one as it was, one in which an object
changes its colour, one in which something is suddenly elsewhere, and compares their surprise with a paired t-test.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from lewm import envs, pixels
from lewm.checks import integer
from lewm.collector import Policy, generate
from lewm.model_file import write_atomically
from lewm.monitor import prediction_errors
from lewm.planner import encode, to_numpy
from lewm.records import read_record, typed

TASKS = {
    "two-room": "lewm/TwoRoom-v0",
    "pusht": "lewm/PushT-v0",
    "reacher": "lewm/Reacher-v0",
    "cube": "lewm/Cube-v0",
}
KINDS = ("normal", "visual", "physical")
_COLOURS = {"normal": "#999999", "visual": "#2b6ca3", "physical": "#c8402f"}
_AT_ONCE = 16  # clips whose pictures are held at a time, and environments that make episodes at once
_TRIES = 20  # episodes to look through for each clip before saying that none will do


def surprise(model: Any, frames: Any, actions: Any) -> np.ndarray:
    """How far each latent of a clip is from what the model predicted, one step ahead.

    The model steps from block to block: of N frames it takes those at 0, b, 2b, ... (b = `config.action_block`); what
    is left at the end is not used. Entry t is the surprise of frame (t + 1) b, predicted from the frames up to t b and
    the actions that follow each of them: the squared error averaged over D. The model sees as many frames as it has a
    history for, fewer at the start, which is never padded; one with a history of 1, as each with action prefixes, sees
    the frame at t b alone, and no velocity in it. A clip in which nothing moves is scored as any other.

    Args:
        model: A `lewm.Model` with action statistics.
        frames: Successive pictures, (N, H, W, 3) uint8, or (B, N, H, W, 3) of B clips.
        actions: The raw actions between them, (N - 1, A_raw) or (B, N - 1, A_raw).

    Returns:
        Scores, float64 (n,) or (B, n), n being the whole blocks in N - 1 actions.

    Raises:
        TypeError: The model cannot predict.
        ValueError: A clip is shorter than one block, a shape does not fit, an action is not finite, or the model has
            no action statistics.
    """
    if not hasattr(model, "rollout") or not hasattr(model, "encode"):
        raise TypeError(f"model must be a lewm.Model, which encodes and predicts, got {model!r}")
    model.require_stats()
    frames = pixels.checked(to_numpy(frames), "frames", (1, 2))
    block, width = model.config.action_block, model.config.action_dim
    actions = np.asarray(to_numpy(actions), np.float64)
    clips, n = frames.shape[:-4], frames.shape[-4]
    if n < block + 1:
        raise ValueError(
            f"frames must be at least {block + 1}, one block of {block} actions and what they lead to, got {n}"
        )
    if actions.shape != (*clips, n - 1, width):
        raise ValueError(
            f"actions must be of shape {(*clips, n - 1, width)}, the raw actions between the {n} frames, got "
            f"{actions.shape}"
        )
    if not np.isfinite(actions).all():
        raise ValueError(f"actions must be finite, got {np.count_nonzero(~np.isfinite(actions))} numbers that are not")
    z = encode(model, frames[..., ::block, :, :, :], "frames")
    used = (z.shape[-2] - 1) * block
    blocks = model.normalise(actions[..., :used, :].reshape(*clips, -1, block * width))
    errors = prediction_errors(model, list(z if clips else z[None]), list(blocks if clips else blocks[None]))
    return np.stack(errors) if clips else errors[0]


# ------------------------------------------------------------------------------------------------------------ result


@dataclass(frozen=True)
class PairedTest:
    """Student's paired t-test of the scores of perturbed clips against those of the normal ones.

    Attributes:
        t: Positive where the perturbed ones are more surprising; 0 where no clip differs.
        p: Two-sided.
        difference: Mean of the differences.
        interval: Its 95 % interval.
        n: Clips.
    """

    t: float
    p: float
    difference: float
    interval: tuple[float, float]
    n: int

    @classmethod
    def of(cls, perturbed: Any, normal: Any) -> PairedTest:
        """That of paired scores (n,) and (n,), n at least 2."""
        apart = np.asarray(perturbed, np.float64) - np.asarray(normal, np.float64)
        n, mean = len(apart), float(apart.mean())
        error = float(apart.std(ddof=1)) / math.sqrt(n)
        t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
        spread = student_quantile(0.05, n - 1) * error
        return cls(t, student_p(t, n - 1), mean, (mean - spread, mean + spread), n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.difference:+.4g} [{low:+.4g}, {high:+.4g}], t = {self.t:.2f}, p = {self.p:.2g}, n = {self.n}"


@dataclass(frozen=True)
class VoE:
    """What `voe` found; `to_dict` is `voe.json`.

    Attributes:
        env_id, env_kwargs, policy: Where the clips are from, and who acts in them.
        clips, seed, blocks: As asked for.
        action_block, history: Of the model.
        change: The raw step from which clips are perturbed: its frame is the first that shows it.
        steps: The raw step of the frame that each score of a curve is of, `blocks` of them.
        scores: By kind ("normal", "visual", "physical"), of each clip the surprise at each of `steps`.
        clip_scores: By kind, of each clip the mean over the predictor steps that the change touches: those with frames
            from before it and from after it, context and target taken together, as many as the model has a history.
        tests: Of "visual" and "physical" clips against the normal ones, on `clip_scores`.
        model_hash, backend, precision: Of the model.
        seconds: Wall time.
    """

    env_id: str
    env_kwargs: dict[str, Any]
    policy: str
    clips: int
    seed: int
    blocks: int
    action_block: int
    history: int
    change: int
    steps: list[int]
    scores: dict[str, list[list[float]]]
    clip_scores: dict[str, list[float]]
    tests: dict[str, PairedTest]
    model_hash: str
    backend: str
    precision: str
    seconds: float

    def curves(self) -> dict[str, dict[str, list[float]]]:
        """By kind, at each of `steps`: mean surprise over the clips, and low and high of its 95 % interval."""
        found = {}
        for kind, rows in self.scores.items():
            mean, spread = _mean_and_spread(np.array(rows))
            bands = {"mean": mean, "low": mean - spread, "high": mean + spread}
            found[kind] = {name: values.tolist() for name, values in bands.items()}
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it and the curves as plain data for JSON."""
        return {**asdict(self), "curves": self.curves()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VoE:
        """Reads a `voe.json`, which may be from anywhere.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not one that this release wrote.
        """
        return read_record(path, "voe", "result of lewm voe", cls._of)

    @classmethod
    def _of(cls, value: dict[str, Any]) -> VoE:
        found: VoE = typed("the file", {name: each for name, each in value.items() if name != "curves"}, cls)
        shapes = {kind: np.shape(rows) for kind, rows in found.scores.items()}
        if set(shapes.values()) != {(found.clips, len(found.steps))} or not shapes.keys() > found.tests.keys():
            raise ValueError(f"its scores must be of each clip and step, got {shapes}")
        return found

    def __str__(self) -> str:
        mean = {kind: float(np.mean(scores)) for kind, scores in self.clip_scores.items()}
        lines = [
            f"{self.env_id}, {self.clips} clips of {self.blocks} blocks, perturbed from step {self.change} on",
            f"surprise over the {self.history} predictor step(s) that touch it: normal {mean['normal']:.4g}",
        ]
        for kind, what in (("visual", "colour changed"), ("physical", "teleported")):
            times = f" ({mean[kind] / mean['normal']:.3g} times)" if mean["normal"] else ""
            lines.append(f"{what}: {mean[kind]:.4g}{times}; difference {self.tests[kind]}")
        return "\n".join(lines)


def _mean_and_spread(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of rows (n, ...) and half of its 95 % interval."""
    error = rows.std(axis=0, ddof=1) / math.sqrt(len(rows))
    return rows.mean(axis=0), student_quantile(0.05, len(rows) - 1) * error


# ------------------------------------------------------------------------------------------------------------- clips


def voe(
    model: Any,
    task: str | None = None,
    *,
    clips: int = 100,
    seed: int = 0,
    blocks: int = 12,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VoE:
    """Violation of expectation: matched clips, their surprise, and a paired t-test (paper section 5.2, appendix F.3).

    Each clip is the beginning of a fresh episode of the policy that made the model's data, drawn under a key that no
    `lewm.collect` can use. From its middle on there are three of it: the episode as it was; "visual", the same in which
    an object has another colour (the agent of TwoRoom, the block of PushT, the forearm of Reacher, the cube); and
    "physical", in which something is teleported to a random place where an episode could start (the agent; agent and
    block; both joints; the cube), and the same actions are simulated on from there.

    Args:
        model: What is surprised; its environment's settings (`look`) are those of its data.
        task: "two-room", "pusht", "reacher", "cube" or an environment's id; by default that of the model's data.
        clips: How many; the first n are the same whatever the number.
        seed: Of episodes and teleports.
        blocks: Length of a clip in predictor steps; the change comes after half of them.
        out: Folder for `voe.json`, `voe.png` (curves with 95 % intervals) and `voe.gif` (the first clip's three).
        progress: Called with (clips done, clips).

    Raises:
        TypeError, ValueError: An argument is not as described; model and environment do not fit together; clips are
            shorter than the history of the model on either side of the change; too few episodes last that long; or
            pictures do not change over a normal clip, which then has nothing that could surprise.
    """
    started = time.perf_counter()
    if not hasattr(model, "rollout") or not hasattr(model, "encode"):
        raise TypeError(f"model must be a lewm.Model, which encodes and predicts, got {model!r}")
    model.require_stats()
    config, learnt = model.config, model.meta.get("data") or {}
    env_id, settings = _environment(learnt, task)
    integer("clips", clips, 2)
    integer("seed", seed, 0, 2**32)
    integer("blocks", blocks, 2)
    before = blocks // 2
    if before < config.history:
        raise ValueError(
            f"blocks must be at least {2 * config.history}: clips are shorter than the model's history of "
            f"{config.history} before the change, got {blocks}"
        )
    change = before * config.action_block
    policy = learnt["policy"] if learnt.get("policy") in ("play", "random") else "expert"

    scores: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    shown: list[np.ndarray] = []
    episodes = _episodes(env_id, settings, policy, clips, blocks * config.action_block, seed, config.action_dim)
    with closing(envs.simulator(env_id, **settings)) as simulator:
        while len(scores["normal"]) < clips:
            some = list(islice(episodes, min(_AT_ONCE, clips - len(scores["normal"]))))
            made = [_Clip.of(simulator, episode, change, seed) for episode in some]
            if not made:
                raise ValueError(
                    f"blocks must leave enough episodes that last {blocks * config.action_block} steps, got {blocks}: "
                    f"only {len(scores['normal'])} of {_TRIES * clips} do, {clips} are wanted"
                )
            frames = np.stack([clip.frames(simulator, config.image_size, config.action_block) for clip in made])
            normal = frames[:, 0]
            still = [clip.number for clip, each in zip(made, normal, strict=True) if (each == each[0]).all()]
            if still:
                raise ValueError(f"frames must change over a clip, but those of episodes {still} are constant")
            actions = np.repeat([clip.actions for clip in made], len(KINDS), axis=0)
            found = _scored(model, frames, actions).reshape(len(made), len(KINDS), blocks)
            for kind, rows in zip(KINDS, found.swapaxes(0, 1), strict=True):
                scores[kind] += rows.tolist()
            if out is not None and not shown:
                shown = [made[0].frames(simulator, config.image_size, 1)]
            if progress is not None:
                progress(len(scores["normal"]), clips)

    # Targets from the change on whose context begins before it.
    touched = slice(before - 1, before - 1 + config.history)
    clip_scores = {kind: np.mean(np.array(rows)[:, touched], axis=1).tolist() for kind, rows in scores.items()}
    result = VoE(
        env_id=env_id,
        env_kwargs=settings,
        policy=policy,
        clips=clips,
        seed=seed,
        blocks=blocks,
        action_block=config.action_block,
        history=config.history,
        change=change,
        steps=[config.action_block * (t + 1) for t in range(blocks)],
        scores=scores,
        clip_scores=clip_scores,
        tests={kind: PairedTest.of(clip_scores[kind], clip_scores["normal"]) for kind in KINDS[1:]},
        model_hash=model.hash(),
        backend=model.backend,
        precision=model.precision,
        seconds=time.perf_counter() - started,
    )
    if out is not None:
        out = Path(out)
        write_atomically(out / "voe.json", json.dumps(result.to_dict(), indent=1).encode())
        write_atomically(out / "voe.png", _chart(result))
        write_atomically(out / "voe.gif", _film(result, shown[0]))
    return result


def _environment(learnt: dict[str, Any], task: str | None) -> tuple[str, dict[str, Any]]:
    """Id and settings of the environment that a model of these data is tested in."""
    own = learnt.get("env_id")
    env_id = own if task is None else TASKS.get(task, task)
    if not isinstance(env_id, str) or env_id not in TASKS.values():
        wish = "task must be given where the model's file does not say what it learnt from: one of"
        raise ValueError(f"{wish if task is None else 'task must be one of'} {', '.join(TASKS)}, got {env_id!r}")
    if own not in (None, env_id):
        raise ValueError(
            f"task must be that of the model, which learnt from {str(own)[:200]}, got {task!r}; no model is tested in "
            "a world that it has not seen"
        )
    settings = learnt.get("env_kwargs")
    settings = settings if isinstance(settings, dict) else {}
    # How starts and goals are drawn is no matter of pictures: clips are the same for every model, as in an evaluation.
    return env_id, {name: value for name, value in settings.items() if name not in ("start_rule", "goal_rule")}


class _Episode(NamedTuple):
    number: int
    states: np.ndarray  # (T + 1, S)
    actions: np.ndarray  # (T, A_raw) float32


def _episodes(
    env_id: str, settings: dict[str, Any], policy: str, clips: int, steps: int, seed: int, width: int
) -> Iterator[_Episode]:
    """Beginnings of the episodes that last so many steps, of at most `_TRIES` for each clip."""
    envs.register()
    env = gymnasium.make_vec(
        env_id,
        num_envs=min(clips, _AT_ONCE),
        vectorization_mode="vector_entry_point",
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
        obs_type="state",
        max_episode_steps=steps,
        **settings,
    )
    with closing(env):
        space = env.single_action_space
        if space.shape != (width,):
            raise ValueError(f"task must have the model's actions of width {width}, {env_id} has {space}")
        # As the key of an evaluation's episodes (`lewm.evaluation`): five words that end in zero are no collect's seed.
        key = (seed, 1, 0, 0, 0)
        made = generate(env, _policy(env, policy), seed=key, episodes=range(_TRIES * clips), max_steps=steps)
        for number, episode in enumerate(made):
            if len(episode.actions) == steps:
                yield _Episode(number, episode.columns["state"], episode.actions)


def _policy(env: Any, name: str) -> Policy:
    if name == "random":
        low, high = env.single_action_space.low, env.single_action_space.high
        return lambda states, goals, rngs: np.stack([rng.uniform(low, high) for rng in rngs])
    return getattr(env, f"{name}_policy", env.expert_policy)()


class _Clip(NamedTuple):
    """The three of one clip, as states (T + 1, S)."""

    number: int
    change: int
    normal: np.ndarray
    physical: np.ndarray
    actions: np.ndarray  # (T, A_raw)

    @classmethod
    def of(cls, simulator: Any, episode: _Episode, change: int, seed: int) -> _Clip:
        """From an episode; what is teleported goes on with its actions."""
        rng = np.random.default_rng((seed, episode.number, change))
        simulator.set_state(simulator.teleported(episode.states[change], rng))
        states = [*episode.states[:change], simulator.get_state()]
        for action in episode.actions[change:]:
            simulator.step(action.astype(np.float64))
            states.append(simulator.get_state())
        return cls(episode.number, change, episode.states, np.stack(states), episode.actions)

    def frames(self, simulator: Any, size: int, every: int) -> np.ndarray:
        """Pictures (3, n, size, size, 3) of every so many states, by kind; before the change they are the same."""
        chosen = np.arange(0, len(self.normal), every)
        normal = _drawn(simulator, self.normal[chosen], size)
        found = np.stack([normal] * len(KINDS))
        after = chosen >= self.change
        found[1, after] = _drawn(simulator, self.normal[chosen[after]], size, recoloured=True)
        found[2, after] = _drawn(simulator, self.physical[chosen[after]], size)
        return found


def _drawn(simulator: Any, states: np.ndarray, size: int, recoloured: bool = False) -> np.ndarray:
    """Pictures (n, size, size, 3) of states (n, S)."""
    simulator.recoloured = recoloured
    pictures = []
    for state in states:
        simulator.set_state(state)
        pictures.append(simulator.render(size))
    return np.stack(pictures)


def _scored(model: Any, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Surprise (N, n) of block frames (..., n + 1, H, W, 3), N clips in all, and their raw actions (N, T, A_raw)."""
    z = encode(model, frames.reshape(-1, *frames.shape[-4:]), "frames")
    blocks = model.normalise(actions.reshape(len(z), z.shape[1] - 1, -1))
    return np.stack(prediction_errors(model, list(z), list(blocks)))


# ---------------------------------------------------------------------------------------------------------- pictures


def _chart(result: VoE) -> bytes:
    """The surprise curves as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, curve in result.curves().items():
        axes.plot(result.steps, curve["mean"], "o-", color=_COLOURS[kind], ms=3, lw=1.5, label=_label(kind))
        axes.fill_between(result.steps, curve["low"], curve["high"], color=_COLOURS[kind], alpha=0.2, lw=0)
    axes.axvline(result.change, color="black", ls=":", lw=1, label="change")
    tests = "; ".join(f"{_label(kind)}: p = {test.p:.2g}" for kind, test in result.tests.items())
    axes.set(xlabel="environment step", ylabel="surprise (latent MSE)", yscale=_scale(result))
    axes.set_title(f"{result.env_id}, {result.clips} clips, 95 % intervals\n{tests}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _scale(result: VoE) -> str:
    """Of an axis of scores: what is perturbed may be a thousand times as surprising, and none may be 0."""
    return "log" if np.min([*result.scores.values()]) > 0 else "linear"


def _label(kind: str) -> str:
    return {"normal": "normal", "visual": "colour changed", "physical": "teleported"}[kind]


def _film(result: VoE, frames: np.ndarray) -> bytes:
    """The first clip as a GIF, frames (3, T + 1, H, W, 3) side by side, each above its growing curve."""
    import imageio.v3 as imageio
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, len(KINDS), height_ratios=(1.7, 1), sharey="row")
    scores = np.array([result.scores[kind][0] for kind in KINDS])
    pictures, lines = [], []
    for kind, image_axes, axes, clip in zip(KINDS, above, below, frames, strict=True):
        pictures.append(image_axes.imshow(clip[0], animated=True))
        image_axes.set(xticks=[], yticks=[])
        image_axes.set_title(_label(kind), fontsize=9)
        lines += axes.plot([], [], "o-", color=_COLOURS[kind], ms=3, lw=1.5, animated=True)
        axes.axvline(result.change, color="black", ls=":", lw=1)
        axes.set(xlim=(0, result.steps[-1]), xlabel="environment step", yscale=_scale(result))
        axes.set_ylim(0.8 * scores.min(), 1.2 * scores.max() or 1)
        axes.spines[["top", "right"]].set_visible(False)
    below[0].set_ylabel("surprise")
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)  # what does not move takes longest, and is drawn once
    shots, steps = [], np.array(result.steps)
    for step in range(frames.shape[1]):
        seen = steps <= step
        canvas.restore_region(still)
        for picture, line, clip, row in zip(pictures, lines, frames, scores, strict=True):
            picture.set_data(clip[step])
            line.set_data(steps[seen], row[seen])
            for artist in (picture, line):
                artist.axes.draw_artist(artist)
        shots.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    shots += [shots[-1]] * 12  # rest on the end for a second
    return imageio.imwrite("<bytes>", np.stack(shots), extension=".gif", duration=1000 / 12, loop=0)


# --------------------------------------------------------------------------------------------------------- Student's t


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t with so many degrees of freedom: I_x(freedom / 2, 1 / 2), x = f / (f + t^2)."""
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square), square / (freedom + square))


def student_quantile(p: float, freedom: int) -> float:
    """The t above 0 whose two-sided p-value is `p`."""
    low, high = 0.0, 1.0
    while student_p(high, freedom) > p:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student_p(middle, freedom) > p else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), `rest` being 1 - x: by its continued fraction (DLMF 8.17.22),
    evaluated from the front as Lentz does."""
    if x > (a + 1) / (a + b + 2):  # where it converges slowly, and the other side fast
        return 1 - _incomplete_beta(b, a, rest, x)
    if x <= 0:
        return 0.0
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / _away_from_0(1 + step * d, tiny)
            c = _away_from_0(1 + step / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    return math.exp(log) * fraction / a


def _away_from_0(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
