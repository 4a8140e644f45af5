"""Planning by sampling on a world model, from a picture of now and a picture of the goal.

The sampling loop itself is `lewm._core.Planner` (Rust). Here are its settings (`CEM`, `ICEM`, `MPPI`), the checks on
what a user passes, and the one mapping between raw actions and the model's normalised blocks. NumPy only: torch is
never imported.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from lewm import _core, pixels
from lewm.checks import integer

__all__ = ["CEM", "ICEM", "MPPI", "Plan", "plan"]


@dataclass(frozen=True)
class CEM:
    """Settings of the cross-entropy method (paper section 3.2 and App. D; the defaults are the paper's).

    By default candidates stay within the model's action bounds, the standard deviation has a floor, and the better of
    the best candidate and the final mean is returned, with its own cost.

    Args:
        samples: Candidates per iteration and environment.
        iterations: Rounds of sample, score, refit. A deadline may end them earlier.
        elites: How many of the best candidates the next mean and standard deviation are fitted to.
        horizon: Length of a plan, in action blocks.
        init_std: First standard deviation, in normalised action units.
        min_std: Floor of the standard deviation, in normalised action units. Unused with `reference`.
        reference: The official update exactly: no bounds, no floor, and the last mean is returned, unclipped.
        cost: What a plan is scored with: "latent", the squared distance of latents (the paper's), or "distance", the
            blocks that the model's distance head estimates; None: the latter if the model has that head.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A setting is out of range.
    """

    samples: int = 300
    iterations: int = 30
    elites: int = 30
    horizon: int = 5
    init_std: float = 1.0
    min_std: float = 0.05
    reference: bool = False
    cost: str | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class ICEM:
    """Settings of iCEM (Pinneri et al. 2020, "Sample-efficient Cross-Entropy Method for Real-time Planning").

    CEM with noise that is correlated over the horizon (its variance is 1 at every step, whatever the horizon), fewer
    samples in each iteration, the best elites scored again in the next iteration and, by a `lewm.Controller`, in the
    next plan, and the mean among the samples of the last iteration only. Kept elites take the place of samples. The
    defaults of elites, factor, keep and momentum are the paper's, beta is within its range; 100 samples did as well as
    300 of CEM where stable-worldmodel compared them on this model (its pull request 157); the rest is as in `CEM`.

    Args:
        samples: Candidates of the first iteration, per environment.
        iterations, elites, horizon, init_std, min_std: As in `CEM`.
        beta: The noise's power falls with its frequency to this power: 0 is white, 2 a random walk.
        factor: Each iteration has this many times fewer samples, but at least twice the elites.
        keep: Fraction of the elites that is scored again.
        momentum: Share of the old mean and standard deviation in the new ones.
        cost: As in `CEM`.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A setting is out of range.
    """

    samples: int = 100
    iterations: int = 30
    elites: int = 10
    horizon: int = 5
    init_std: float = 1.0
    min_std: float = 0.05
    beta: float = 2.0
    factor: float = 1.25
    keep: float = 0.3
    momentum: float = 0.1
    cost: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.beta < np.inf:
            raise ValueError(f"beta must be zero or a positive number, got {self.beta}")
        if not 1 <= self.factor < np.inf:
            raise ValueError(f"factor must be a number of at least 1, got {self.factor}")
        for name in ("keep", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class MPPI:
    """Settings of MPPI (Williams et al. 2017) with the update of TD-MPC2 (Hansen et al. 2024).

    Elites weigh `exp(-(cost - lowest) / (temperature * gap))`, where the gap is the mean elite cost less the lowest:
    costs of any scale need the same temperature. The standard deviation is that of the weighted elites, floored,
    because one that stays fixed cannot settle on a plan within a few iterations. The defaults of samples, iterations,
    elites and min_std are TD-MPC2's; the rest is as in `CEM`, and the temperature, scaled otherwise there, our own.

    Args:
        samples, iterations, elites, horizon, init_std, min_std: As in `CEM`.
        temperature: Low, and the best elite alone counts; high, and all count alike, as in `CEM`.
        cost: As in `CEM`.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A setting is out of range.
    """

    samples: int = 512
    iterations: int = 6
    elites: int = 64
    horizon: int = 5
    init_std: float = 1.0
    min_std: float = 0.05
    temperature: float = 0.5
    cost: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")


Planner: TypeAlias = CEM | ICEM | MPPI
_NAMES: dict[str, type[Planner]] = {"cem": CEM, "icem": ICEM, "mppi": MPPI}


def _check(settings: Any) -> None:
    """What all planners ask of their settings."""
    integer("horizon", settings.horizon, 1)
    integer("iterations", settings.iterations, 1, 2**16)
    integer("samples", settings.samples, 2)
    if integer("elites", settings.elites) < 2:
        raise ValueError(f"elites must be at least 2 (one sample has no standard deviation), got {settings.elites}")
    if settings.elites > settings.samples:
        raise ValueError(f"elites must be at most samples ({settings.samples}), got {settings.elites}")
    if not 0 < settings.init_std < np.inf:
        raise ValueError(f"init_std must be a positive number, got {settings.init_std}")
    if not 0 <= settings.min_std < np.inf:
        raise ValueError(f"min_std must be zero or a positive number, got {settings.min_std}")
    if settings.cost not in (None, "latent", "distance"):
        raise ValueError(f'cost must be "latent", "distance" or None, got {settings.cost!r}')


@dataclass(frozen=True)
class Plan:
    """What the planner found. For a batch of environments every array has a leading axis E.

    Attributes:
        actions: (H * action_block, A_raw) raw actions in order of execution, in the model's float type.
        cost: The plan's own cost after H blocks: the squared distance to the goal, summed over the embedding, or the
            blocks from there to the goal by the model's distance head (the planner's `cost` says which);
            with `CEM(reference=True)` the mean cost of the last elites, as the official code reports it.
        latency_ms: Wall time of the whole call in milliseconds, encoding included.
        backend, precision: What ran the model.
        deadline_hit: Whether the deadline ended the search before all its iterations.
        clipped: Fraction of the candidates' entries that the action bounds moved.
        iterations: Iterations that were run.
        trace: (iterations,) mean cost of the elites of each iteration; (iterations, E) for a batch.
        mean: (H, A) final mean in normalised blocks; shifted, it is the `init` of the next plan.
        kept: (K, H, A) best elites of the last iteration in normalised blocks, best first; K is 0 unless it is `ICEM`.
        imagined: (H + 1, D) latents of the plan, now first; only with `return_rollout=True`.
    """

    actions: Any
    cost: Any
    latency_ms: float
    backend: str
    precision: str
    deadline_hit: bool
    clipped: Any
    iterations: int
    trace: np.ndarray
    mean: np.ndarray
    kept: np.ndarray
    imagined: np.ndarray | None = None

    @property
    def action(self) -> Any:
        """(A_raw,) the raw action to execute now; (E, A_raw) for a batch."""
        return self.actions[..., 0, :]


def plan(
    obs: Any,
    goal: Any,
    *,
    model: Any = None,
    planner: Planner | None = None,
    seed: int = 0,
    env_ids: Any = None,
    plan_index: int = 0,
    past_actions: Any = None,
    init: Any = None,
    deadline_ms: float | None = None,
    return_rollout: bool = False,
) -> Plan:
    """Finds the actions that lead from `obs` to `goal`.

    Args:
        obs: (H, W, 3) uint8 picture of now, or (E, H, W, 3) of E environments. With `past_actions`, which say that
            there is a history, obs carries it: the last T frames, one per block, oldest first, as (T, H, W, 3) or
            (E, T, H, W, 3).
        goal: A picture or a batch of them, or latents (D,) or (E, D) from `model.encode`, which saves encoding them
            again. One goal serves all environments.
        model: What plans; by default the one set with `lewm.use` or LEWM_MODEL.
        planner: `CEM`, `ICEM` or `MPPI`; by default the one that the model file names, else `CEM()`.
        seed: Together with `env_ids` and `plan_index` it determines the noise, and nothing else does.
        env_ids: (E,) an id below 2**32 per environment, by default 0, 1, ...: an environment gets the same noise alone
            or in any batch.
        plan_index: Number of this plan within its episode, for fresh noise in each.
        past_actions: Raw actions executed between the T frames of obs, (T-1, block * A_raw) or (T-1, block, A_raw),
            with a leading E where obs has one. They are given to the model as they are and never optimised.
        init: Warm start, the first mean in normalised blocks, (H, A) or (E, H, A); by default what the model's action
            prior guesses, within the bounds, and zeros, the mean action, where it has none.
        deadline_ms: Return the best found so far before an iteration that would end later than this after the call,
            if it took as long as the one before; the first one always runs.
        return_rollout: Also give the imagined latents.

    Returns:
        The plan. If obs is a torch tensor, its actions are one on the same device.

    Raises:
        TypeError: The planner is not one, or a count not an integer.
        ValueError: Pixels are not uint8, a shape, a batch or a number is not as described, or the model has no action
            statistics.
        RuntimeError: No model is given or set.
    """
    started = time.perf_counter()
    if model is None:
        from lewm.model import current

        model = current()
    planner = planner_of(model, planner)

    has_history = past_actions is not None
    frames = pixels.checked(to_numpy(obs), "obs", (1, 2) if has_history else (0, 1))
    single = frames.ndim == (4 if has_history else 3)
    frames = frames[None] if single else frames
    frames = frames if has_history else frames[:, None]
    environments, history = frames.shape[:2]
    if history > model.config.history:
        raise ValueError(f"obs has {history} frames of history, but this model's history is {model.config.history}")
    blocks = _past_blocks(model, past_actions, environments, history, single) if has_history else None

    found = plan_latents(
        model,
        encode(model, frames, "obs"),
        broadcast_goal(encode_goal(model, goal), environments),
        planner,
        past_blocks=blocks,
        seed=seed,
        env_ids=env_ids,
        plan_index=plan_index,
        init=init,
        deadline_ms=deadline_ms,
        return_rollout=return_rollout,
        started=started,
    )
    found = first(found) if single else found
    return replace(found, actions=like(obs, found.actions))


def plan_latents(
    model: Any,
    z: np.ndarray,
    goal: np.ndarray,
    planner: Planner,
    *,
    past_blocks: np.ndarray | None = None,
    seed: int = 0,
    env_ids: Any = None,
    plan_index: int = 0,
    init: Any = None,
    kept: np.ndarray | None = None,
    core: Any = None,
    deadline_ms: float | None = None,
    return_rollout: bool = False,
    started: float | None = None,
) -> Plan:
    """Plans from latents: what `plan` and `Controller` do once the pictures are encoded.

    Args:
        z: (E, T, D) latents of the last T frames. Their float type is the one that candidates are scored in.
        goal: (E, D) latents.
        past_blocks: (E, T-1, A) raw actions between the frames; None if T is 1.
        kept: (E, K, H, A) elites of the last plan, shifted, for `ICEM` to score again.
        core: What `core_of` made for this planner and z's float type, to plan in memory that is there already.
        started: `time.perf_counter()` at the start of the call, which latency and deadline count from.

    Returns:
        A plan whose arrays all have the leading axis E. The other arguments are those of `plan`.
    """
    started = time.perf_counter() if started is None else started
    environments, history = z.shape[:2]
    model.require_stats()
    if deadline_ms is not None and not (isinstance(deadline_ms, Real) and 0 < deadline_ms < np.inf):
        raise ValueError(f"deadline_ms must be a positive number of milliseconds, got {deadline_ms!r}")
    integer("seed", seed, 0, 2**64)
    integer("plan_index", plan_index, 0, 2**32)
    goal = goal.astype(z.dtype)
    past = None if history == 1 else np.asarray(model.normalise(past_blocks), dtype=z.dtype)
    reference = isinstance(planner, CEM) and planner.reference
    low, high = (None, None) if reference else model.bounds()
    if init is None and model.config.action_prior:
        init = _guess(model, z[:, -1], goal, planner.horizon, low, high)
    mean = _first_mean(init, environments, planner.horizon, model.config.block_dim)

    call = {"low": low, "high": high, "seed": seed, "env_ids": _env_ids(env_ids, environments), "plan": plan_index}
    # What encoding took has gone from the budget; even a spent one leaves the first iteration.
    call["deadline"] = None if deadline_ms is None else max(deadline_ms / 1e3 - (time.perf_counter() - started), 0.0)
    objective = _objective(model, z, goal, past, planner.cost)
    if isinstance(planner, CEM) and hasattr(objective, "solve"):
        found = objective.solve(_settings(planner), mean, **call)  # the same search, where the model is
    else:
        found = (core or core_of(planner, z.dtype)).solve(objective, mean, kept=kept, **call)
    imagined = None
    if return_rollout:
        chosen = found["actions"][:, None].astype(z.dtype)
        imagined = model.rollout(z, chosen, past_actions=past)[:, 0, history - 1 :]
    return Plan(
        actions=_raw_actions(model, found["actions"], z.dtype, bounded=not reference),
        cost=found["cost"],
        latency_ms=(time.perf_counter() - started) * 1e3,
        backend=model.backend,
        precision=model.precision,
        deadline_hit=found["deadline_hit"],
        clipped=found["clipped"],
        iterations=found["iterations"],
        trace=found["trace"],
        mean=found["mean"],
        kept=found["kept"],
        imagined=imagined,
    )


def _objective(model: Any, z: np.ndarray, goal: np.ndarray, past: np.ndarray | None, cost: str | None) -> Any:
    """What the planner scores candidates with: the model's own objective if it has one, else its `costs`."""
    if hasattr(model, "objective"):
        return model.objective(z, goal, past, cost)
    return lambda candidates: model.costs(z, goal, candidates, past_actions=past)


def first(found: Plan) -> Plan:
    """The only environment of a plan for a batch of one, without the axis E."""
    return replace(
        found,
        actions=found.actions[0],
        cost=float(found.cost[0]),
        clipped=float(found.clipped[0]),
        trace=found.trace[:, 0],
        mean=found.mean[0],
        kept=found.kept[0],
        imagined=None if found.imagined is None else found.imagined[0],
    )


def core_of(planner: Planner, dtype: np.dtype) -> _core.Planner:
    """The Rust planner of these settings, with memory of its own."""
    settings = _settings(planner)
    del settings["horizon"]
    name = next(name for name, kind in _NAMES.items() if isinstance(planner, kind))
    return _core.Planner(name, dtype=dtype.name, **settings)


def _settings(planner: Planner) -> dict[str, Any]:
    """The settings of the search: what is searched for is the objective's."""
    settings = asdict(planner)
    del settings["cost"]
    return settings


def planner_of(model: Any, planner: Planner | None) -> Planner:
    """The planner asked for, else the one in the model's file, else the paper's; its cost is settled."""
    if not hasattr(model, "costs"):
        raise TypeError(f"model must be a lewm.Model, got {model!r}; lewm.load reads one from a file")
    if planner is None:
        planner = planner_from(model.meta.get("planner") or {})
    if not isinstance(planner, CEM | ICEM | MPPI):
        raise TypeError(f"planner must be a lewm.CEM, lewm.ICEM or lewm.MPPI, got {type(planner).__name__}")
    return replace(planner, cost=model.cost_of(planner.cost)) if hasattr(model, "cost_of") else planner


def planner_from(settings: dict[str, Any]) -> Planner:
    """The planner of a model file's settings: the fields of one, and as "name" which (by default "cem").

    Raises:
        TypeError, ValueError: There is no such planner, it has no such field, or a value is out of range.
    """
    fields = dict(settings)
    name = fields.pop("name", "cem")
    if name not in _NAMES:
        raise ValueError(f"planner's name must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    return _NAMES[name](**fields)


def encode(model: Any, frames: np.ndarray, name: str) -> np.ndarray:
    """(E, ..., D) latents of frames (E, ..., H, W, 3), checked to be finite."""
    z = model.encode(frames, name=name)
    if not np.isfinite(z).all():
        bad = np.flatnonzero(~np.isfinite(z).reshape(len(z), -1).all(axis=1))
        raise ValueError(f"the model's embedding of {name} is not finite for environments {bad.tolist()}")
    return z


def encode_goal(model: Any, goal: Any) -> np.ndarray:
    """(1, D) or (E, D) latents of a goal: a picture or latents, one or one per environment."""
    array, width = to_numpy(goal), model.config.embed_dim
    if array.dtype.kind == "f" and array.ndim in (1, 2):
        if array.shape[-1] != width or array.size == 0:
            raise ValueError(f"goal latents must be of shape ({width},) or (E, {width}), got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"goal latents must be finite, got {np.count_nonzero(~np.isfinite(array))} that are not")
        return np.atleast_2d(array)
    frames = pixels.checked(array, "goal", (0, 1))
    return encode(model, frames if frames.ndim == 4 else frames[None], "goal")


def broadcast_goal(z: np.ndarray, environments: int) -> np.ndarray:
    """(E, D) of the latents of one goal for all or one for each."""
    if len(z) not in (1, environments):
        raise ValueError(f"goal must be of 1 or {environments} environments, as obs is, got {len(z)}")
    return np.repeat(z, environments // len(z), axis=0)


def to_numpy(value: Any) -> np.ndarray:
    """A NumPy array of an array or a torch tensor on any device."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def like(obs: Any, array: np.ndarray) -> Any:
    """`array` as a tensor on obs's device if obs is a torch tensor, else unchanged."""
    return sys.modules["torch"].as_tensor(array, device=obs.device) if hasattr(obs, "detach") else array


def _past_blocks(model: Any, past: Any, environments: int, history: int, single: bool) -> np.ndarray:
    """(E, T-1, A) raw past actions as a model takes them, each block flat."""
    raw, block = model.config.action_dim, model.config.action_block
    array = np.asarray(to_numpy(past), dtype=np.float64)
    lead = (history - 1,) if single else (environments, history - 1)
    forms = ((*lead, block * raw), (*lead, block, raw))
    if array.shape not in forms:
        raise ValueError(
            f"past_actions must be of shape {forms[0]} or {forms[1]}, the raw actions between the {history} frames "
            f"of obs, got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError("past_actions must be finite, got NaN or infinity")
    return array.reshape(environments, history - 1, block * raw)


def _first_mean(init: Any, environments: int, horizon: int, width: int) -> np.ndarray:
    shape = (environments, horizon, width)
    if init is None:
        return np.zeros(shape)
    mean = np.asarray(to_numpy(init), dtype=np.float64)
    if mean.shape not in (shape, shape[1:]):
        raise ValueError(f"init must be of shape {shape[1:]} or {shape}, in normalised blocks, got {mean.shape}")
    if not np.isfinite(mean).all():
        raise ValueError("init must be finite, got NaN or infinity")
    return np.ascontiguousarray(np.broadcast_to(mean, shape))


def _guess(
    model: Any, z: np.ndarray, goal: np.ndarray, horizon: int, low: np.ndarray | None, high: np.ndarray | None
) -> np.ndarray:
    """(E, H, A) the action prior's blocks, within the bounds; blocks beyond what it guesses are the mean action."""
    blocks = np.asarray(model.prior(z, goal), dtype=np.float64)[:, :horizon]
    blocks = blocks if low is None or high is None else np.clip(blocks, low, high)
    return np.pad(blocks, ((0, 0), (0, horizon - blocks.shape[1]), (0, 0)))


def _env_ids(env_ids: Any, environments: int) -> np.ndarray:
    ids = np.atleast_1d(np.arange(environments) if env_ids is None else to_numpy(env_ids))
    if ids.dtype.kind not in "iu" or ids.shape != (environments,) or ids.min() < 0 or ids.max() >= 2**32:
        raise ValueError(f"env_ids must be {environments} integers in [0, 2**32), one per environment, got {env_ids!r}")
    return ids.astype(np.uint32)


def _raw_actions(model: Any, blocks: np.ndarray, dtype: np.dtype, *, bounded: bool) -> np.ndarray:
    """(E, H * block, A_raw) raw actions of (E, H, A) normalised blocks; if bounded, never outside low and high."""
    raw = np.asarray(model.denormalise(blocks), dtype=np.float64)
    raw = raw.reshape(len(blocks), -1, model.config.action_dim)
    if not bounded:
        return raw.astype(dtype)
    low, high = (np.asarray(model.stats[bound], dtype=np.float64) for bound in ("low", "high"))
    raw = np.clip(raw, low, high).astype(dtype)
    # Rounding to float32 may step over a bound that float32 cannot hold: one step back inside.
    raw = np.where(raw < low, np.nextafter(raw, dtype.type(np.inf)), raw)
    return np.where(raw > high, np.nextafter(raw, dtype.type(-np.inf)), raw)
