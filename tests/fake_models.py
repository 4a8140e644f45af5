"""Stand-ins with the interface that planning asks of `lewm.Model`, whose dynamics are known exactly."""

from __future__ import annotations

import numpy as np

from lewm.config import ModelConfig
from lewm.envs.two_room import EXTENT, step_states


class PointModel:
    """Latents are positions, read from the first pixels; each raw action moves them, the past block drags a little.

    It records what it is asked: `encoded` (names and leading shapes) and `asked` (z, candidates, past_actions).
    """

    backend, precision = "fake", "exact"

    def __init__(self, action_dim=2, block=2, history=1, dtype=np.float64, stats=None, size=8, planner=None):
        self.config = ModelConfig(
            action_dim=action_dim,
            action_block=block,
            history=history,
            embed_dim=action_dim,
            image_size=size,
            patch_size=1,
        )
        ones = np.ones(action_dim)
        self.stats = stats or {"mean": 0.1 * ones, "std": 0.5 * ones, "low": -ones, "high": ones}
        self.meta = {} if planner is None else {"planner": planner}
        self.dtype = np.dtype(dtype)
        self.encoded, self.asked = [], []

    def picture(self, position):
        """The picture that is encoded as `position`, a multiple of 0.1 within [-10, 10]."""
        size = self.config.image_size
        frame = np.zeros((size, size, 3), np.uint8)
        frame.reshape(-1)[: len(position)] = np.rint(np.asarray(position) * 10 + 100)
        return frame

    def encode(self, frames, *, name="frames"):
        self.encoded.append((name, frames.shape[:-3]))
        flat = frames.reshape(*frames.shape[:-3], -1)[..., : self.config.embed_dim]
        return (flat.astype(self.dtype) - 100) / 10

    def rollout(self, z, candidates, past_actions=None):
        self.asked.append((z, candidates, past_actions))
        environments, samples, horizon, _ = candidates.shape
        zs = [np.broadcast_to(z[:, None, t], (environments, samples, z.shape[-1])) for t in range(z.shape[1])]
        drag = 0 if past_actions is None else 0.3 * self._move(past_actions[:, None, -1])
        for t in range(horizon):
            move = self._move(candidates[:, :, t])
            zs.append(zs[-1] + move + drag)
            drag = 0.3 * move
        return np.stack(zs, axis=2).astype(self.dtype)

    def cost(self, zs, goal):
        return np.square(zs[:, :, -1] - goal[:, None]).sum(axis=-1)

    def costs(self, z, goal, candidates, past_actions=None):
        return self.cost(self.rollout(z, candidates, past_actions), goal)

    def normalise(self, raw):
        n = np.shape(raw)[-1] // self.config.action_dim
        return (np.asarray(raw, np.float64) - np.tile(self.stats["mean"], n)) / np.tile(self.stats["std"], n)

    def denormalise(self, blocks):
        n = np.shape(blocks)[-1] // self.config.action_dim
        return np.asarray(blocks, np.float64) * np.tile(self.stats["std"], n) + np.tile(self.stats["mean"], n)

    def bounds(self):
        block = self.config.action_block
        return tuple(self.normalise(np.tile(self.stats[name], block)) for name in ("low", "high"))

    def require_stats(self):
        if self.stats is None:
            raise ValueError("model has no action statistics: give stats=dict(mean=..., std=..., low=..., high=...)")
        return self.stats

    def hash(self):
        return "f" * 64

    def _move(self, blocks):
        raw = self.denormalise(blocks)
        return raw.reshape(*raw.shape[:-1], self.config.action_block, self.config.action_dim).sum(axis=-2)


class RoomModel(PointModel):
    """Knows TwoRoom: reads the red dot off the picture and moves it as the environment does."""

    def __init__(self, size=32, planner=None):
        planner = planner or {"samples": 64, "iterations": 8, "elites": 8, "horizon": 5}
        stats = {"mean": np.zeros(2), "std": np.full(2, 0.8), "low": -np.ones(2), "high": np.ones(2)}
        super().__init__(2, block=5, stats=stats, size=size, dtype=np.float32, planner=planner)

    def encode(self, frames, *, name="frames"):
        red = frames[..., 0].astype(np.float64) - frames[..., 1]
        red /= red.sum(axis=(-2, -1), keepdims=True)
        centres = (np.arange(frames.shape[-2]) + 0.5) * EXTENT / frames.shape[-2] - 0.5
        return np.stack([(red.sum(axis=-2) * centres).sum(-1), (red.sum(axis=-1) * centres).sum(-1)], -1).astype(
            self.dtype
        )

    def rollout(self, z, candidates, past_actions=None):
        environments, samples, horizon, _ = candidates.shape
        raw = self.denormalise(candidates).reshape(environments * samples, horizon, 5, 2)
        states = np.repeat(z[:, -1], samples, axis=0).astype(np.float64)
        zs = [states]
        for t in range(horizon):
            for step in range(5):
                states = step_states(states, raw[:, t, step])
            zs.append(states)
        return np.stack(zs, axis=1).reshape(environments, samples, horizon + 1, 2).astype(self.dtype)


class BlindModel(RoomModel):
    """Sees nothing, so every plan looks alike to it."""

    def encode(self, frames, *, name="frames"):
        return np.zeros((*frames.shape[:-3], 2), self.dtype)

    def costs(self, z, goal, candidates, past_actions=None):
        return np.zeros(candidates.shape[:2])
