"""A planner inside a control loop: one picture in, one raw action out, everything else kept between calls."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np

from lewm import pixels
from lewm.checks import integer
from lewm.monitor import Calibration, Surprise, newest_error
from lewm.planner import (
    Plan,
    Planner,
    broadcast_goal,
    core_of,
    encode,
    encode_goal,
    first,
    like,
    plan_latents,
    planner_of,
    to_numpy,
)

__all__ = ["Controller"]


class Controller:
    """Call it once per environment step with the newest picture; it answers with the next raw action.

    It plans when the actions of its last plan are used up, once per `execute * action_block` calls. For a model
    with a history it keeps the latents of the frames at the block boundaries and the blocks executed between them;
    after a reset the history is short and grows, it is never padded. E environments in lockstep are controlled by
    one controller when pictures are (E, H, W, 3).

    Args:
        model: What plans.
        goal: A picture, latents, or one of either per environment, as in `lewm.plan`; encoded once.
        planner: By default the one that the model file names, else `CEM()`.
        execute: Blocks of each plan to execute before the next; by default all, as in the paper.
        deadline_ms: Per planning call, see `lewm.plan`.
        seed: Of the noise, see `lewm.plan`.
        env_id: Of the noise: an int (environments of a batch count up from it) or one per environment.
        warm_start: Start a search from the rest of the last plan, filled up with mean actions; with `ICEM` also from
            the rests of its best elites. Without effect when whole plans are executed. Where the model has an action
            prior, every search starts from its guess instead, which knows where the last plan really led.
        shrink: Arrive when the first plan said: each search looks ahead only as far as the plan before it still goes,
            so that nothing is put off, and the one after the last starts anew with the whole horizon. Without effect
            when whole plans are executed.
        monitor: Say at each block boundary how surprising the newest picture is (paper section 5.2): True, compared
            with what the model's file says of normal data, or with a `lewm.calibrate(...)` of one's own. It changes no
            action; it costs a prediction of one block, and within a plan of a model without a history an encoded
            picture.

    Attributes:
        plan: The last `lewm.Plan`, None before the first.
        surprise: The newest `lewm.monitor.Surprise`; None before the first whole block, and without a monitor.

    Not thread-safe: a call during another one raises RuntimeError.
    """

    def __init__(
        self,
        model: Any,
        goal: Any,
        *,
        planner: Planner | None = None,
        execute: int | None = None,
        deadline_ms: float | None = None,
        seed: int = 0,
        env_id: Any = 0,
        warm_start: bool = True,
        shrink: bool = False,
        monitor: bool | Calibration = False,
    ) -> None:
        self.model = model
        self.planner = planner_of(model, planner)
        horizon = self.planner.horizon
        self.execute = horizon if execute is None else integer("execute", execute, 1, horizon + 1)
        self.deadline_ms = deadline_ms
        self.seed = seed
        self.env_id = env_id
        self.warm_start = warm_start
        self.shrink = shrink
        if not isinstance(monitor, bool | Calibration):
            raise TypeError(f"monitor must be True, False or what lewm.calibrate gives, got {monitor!r}")
        self._normal = Calibration.of_model(model) if monitor is True else monitor or None
        self._lock = threading.Lock()
        self._core: dict[tuple[np.dtype, int], Any] = {}  # the planner's memory, for each float type and horizon seen
        self.reset(goal)

    def reset(self, goal: Any = None) -> None:
        """Forgets everything, as if new; with a goal, steers to that one from now on."""
        if goal is not None:
            self._goal = encode_goal(self.model, goal)
        self.plan: Plan | None = None
        self.surprise: Surprise | None = None
        self._plans = 0
        self._blocks_done = 0
        self._actions: np.ndarray | None = None  # (E, execute * block, A_raw) of the current plan
        self._step = 0  # how many of them have been given out
        self._mean: np.ndarray | None = None  # (E, H, A) of the current plan
        self._kept: np.ndarray | None = None  # (E, K, H, A) elites of it
        self._latents: list[np.ndarray] = []  # of boundary frames, each (E, D), oldest first
        self._blocks: list[np.ndarray] = []  # executed between them, each (E, A)
        self._done: list[np.ndarray] = []  # raw actions executed of the current block, each (E, A_raw)

    def __call__(self, obs: Any, executed: Any = None) -> Any:
        """The next raw action.

        Args:
            obs: (H, W, 3) uint8 picture of now, or (E, H, W, 3).
            executed: (A_raw,) or (E, A_raw) the raw action that was really executed since the last call, if it was
                not the one given out. It enters the history; the plan under way goes on.

        Returns:
            (A_raw,) or (E, A_raw); a tensor if obs is one.

        Raises:
            TypeError, ValueError: As `lewm.plan`; or `executed` does not fit. The controller is then unchanged.
            RuntimeError: Another thread is inside a call.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this Controller is in use by another thread: give each thread a Controller of its own")
        try:
            return self._call(obs, executed)
        finally:
            self._lock.release()

    def keep(self, mask: Any) -> None:
        """Goes on with some environments of a batch only: (E,) bool, True for those to keep."""
        mask = np.asarray(mask, dtype=bool)
        if self._actions is None or mask.shape != (len(self._actions),):
            raise ValueError(f"mask must have one entry per environment that was controlled so far, got {mask.shape}")
        self._goal = self._goal if len(self._goal) == 1 else self._goal[mask]
        self.env_id = self._env_ids(len(mask))[mask]
        self._actions, self._mean, self._kept = self._actions[mask], self._mean[mask], self._kept[mask]
        for kept in (self._latents, self._blocks, self._done):
            kept[:] = [array[mask] for array in kept]
        if (now := self.surprise) is not None:
            self.surprise = replace(now, score=now.score[mask], p_value=now.p_value[mask])

    def _call(self, obs: Any, executed: Any) -> Any:
        started = time.perf_counter()
        frames = pixels.checked(to_numpy(obs), "obs", (0, 1))
        single = frames.ndim == 3
        frames = frames[None] if single else frames
        environments = len(frames) if self._actions is None else len(self._actions)
        if len(frames) != environments:
            raise ValueError(f"obs must be of {environments} environments as in the last call, got {len(frames)}")

        # The new state is built aside and kept at the end, so that a call that raises can be repeated.
        latents, blocks, done = self._latents, self._blocks, self._done
        blocks_done, surprise = self._blocks_done, self.surprise
        if self._actions is not None:
            done = [*done, self._executed(executed)]
        elif executed is not None:
            raise ValueError("executed must be None in the first call after a reset: nothing was executed yet")
        if len(done) == self.model.config.action_block:
            blocks, done, blocks_done = [*blocks, np.concatenate(done, axis=-1)], [], blocks_done + 1

        plan_now = self._actions is None or self._step == self._actions.shape[1]
        if not done and (plan_now or self._normal or self.model.config.history > 1):
            newest = encode(self.model, frames, "obs")
            if self._normal and latents:
                score = newest_error(self.model, latents, blocks, newest)
                p_value = self._normal.p_value(score)
                if single:
                    score, p_value = float(score[0]), float(p_value[0])
                surprise = Surprise(blocks_done * self.model.config.action_block, score, p_value)
            latents = [*latents, newest][-self.model.config.history :]
            blocks = blocks[len(blocks) - (len(latents) - 1) :]
        if plan_now:
            z = np.stack(latents, axis=1)
            planner = self._planner()
            key = z.dtype, planner.horizon
            core = self._core.get(key)
            if core is None:
                core = self._core[key] = core_of(planner, z.dtype)
            found = plan_latents(
                self.model,
                z,
                broadcast_goal(self._goal, environments),
                planner,
                past_blocks=np.stack(blocks, axis=1) if blocks else None,
                seed=self.seed,
                env_ids=self._env_ids(environments),
                plan_index=self._plans,
                init=None if self.model.config.action_prior else self._rest(self._mean, planner.horizon),
                kept=self._rest(self._kept, planner.horizon),
                core=core,
                deadline_ms=self.deadline_ms,
                started=started,
            )
            self._actions = found.actions[:, : self.execute * self.model.config.action_block]
            self._mean, self._kept, self._step = found.mean, found.kept, 0
            self._plans += 1
            found = first(found) if single else found
            self.plan = replace(found, actions=like(obs, found.actions))
        self._latents, self._blocks, self._done = latents, blocks, done
        self._blocks_done, self.surprise = blocks_done, surprise
        action = self._actions[:, self._step]
        self._step += 1
        return like(obs, action[0] if single else action)

    def _executed(self, executed: Any) -> np.ndarray:
        """(E, A_raw) the raw action of the last step, as told or as given out."""
        given = self._actions[:, self._step - 1]
        if executed is None:
            return given
        action = np.asarray(to_numpy(executed), dtype=np.float64)
        if action.shape != given.shape and (len(given) > 1 or action.shape != given.shape[1:]):
            raise ValueError(f"executed must be a raw action of shape {given.shape}, got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError("executed must be finite, got NaN or infinity")
        return action.reshape(given.shape)

    def _env_ids(self, environments: int) -> np.ndarray:
        ids = np.asarray(self.env_id)
        return ids + np.arange(environments) if ids.ndim == 0 and ids.dtype.kind in "iu" else ids

    def _planner(self) -> Planner:
        """Who makes the next plan: with `shrink` one that looks ahead as far as the last plan still goes."""
        left = 0 if self._mean is None else self._mean.shape[1] - self.execute
        return replace(self.planner, horizon=left) if self.shrink and left > 0 else self.planner

    def _rest(self, blocks: np.ndarray | None, horizon: int) -> np.ndarray | None:
        """(..., H, A) -> (..., horizon, A) without the executed blocks, filled up with mean actions."""
        if blocks is None or not self.warm_start:
            return None
        rest = blocks[..., self.execute :, :]
        filling = np.zeros((*rest.shape[:-2], horizon - rest.shape[-2], rest.shape[-1]), rest.dtype)
        return np.concatenate([rest, filling], axis=-2)
