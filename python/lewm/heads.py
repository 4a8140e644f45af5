"""Small heads on frozen latents, trained in seconds when the world model is done; each optional.

The temporal-distance head (`ModelConfig.distance_head`) is a map under which the distance of two latents is the number
of action blocks that it takes to get from one to the other. Squared latent distance saturates when the goal is far and
does not know of walls; a planner whose goal is many plans ahead needs a cost that does. It is a metric: zero at the
goal and symmetric by construction, and the triangle inequality carries over from pairs within an episode to all others.

The action prior (`ModelConfig.action_prior`) guesses the first blocks of actions from one latent to another, as the
data did it: the first mean of a search that knows nothing better. After the goal it guesses the mean action.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lewm.network import LeWM

HEADS = ("distance_head", "action_prior")
# Frames that heads learn from, at most: as many are encoded and held in memory.
FRAMES = 100_000
STEPS, BATCH, LEARNING_RATE, WARMUP = 1500, 512, 1e-3, 50
# Of the times that episodes took between alike places, the head estimates a short one (an expectile): what a planner
# can do, not what a noisy policy did on average.
EXPECTILE = 0.1
_LOG_EVERY = 100


class Episodes:
    """Latents of whole episodes, one after the other, and random pairs of frames of one episode.

    Args:
        latents: (n, D) of each episode, at least two frames each.
        actions: Normalised raw actions (n - 1, A_raw) of each.
        block: Raw steps in an action block.
    """

    def __init__(self, latents: Sequence[Tensor], actions: Sequence[Tensor], block: int) -> None:
        self.z = torch.cat(list(latents))
        # One action for each frame, so that frames and actions are counted alike; the last one is not used.
        self._actions = torch.cat([torch.nn.functional.pad(a, (0, 0, 0, 1)) for a in actions]).to(self.z)
        self._lengths = np.array([len(z) for z in latents])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._block = block

    def pairs(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (count, D) of earlier and later frames, and the blocks between them (count,): all gaps alike."""
        first, last = self._drawn(rng, count)
        return self.z[first], self.z[last], (last - first).to(self.z) / self._block

    def ways(self, rng: np.random.Generator, count: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (count, D) of earlier and later frames, and what was done from the one on, (count, blocks, A).

        From the later frame on the actions are 0, the mean action.
        """
        first, last = self._drawn(rng, count)
        steps = first[:, None] + torch.arange(blocks * self._block, device=self.z.device)
        done = self._actions[steps.clamp(max=len(self._actions) - 1)] * (steps < last[:, None])[..., None]
        return self.z[first], self.z[last], done.reshape(count, blocks, -1)

    def _drawn(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Numbers of frames, the first before the last in the same episode."""
        episode = rng.choice(len(self._lengths), count, p=self._lengths / self._lengths.sum())
        length = self._lengths[episode]
        one = (rng.random(count) * length).astype(np.int64)
        other = (one + 1 + (rng.random(count) * (length - 1)).astype(np.int64)) % length
        pair = (self._starts[episode] + i for i in (np.minimum(one, other), np.maximum(one, other)))
        first, last = (torch.from_numpy(i).to(self.z.device) for i in pair)
        return first, last


def train_heads(
    network: LeWM, train: Episodes, held_out: Episodes | None, seed: int, log: Path | None = None
) -> dict[str, float]:
    """Trains the heads that the network has; nothing else of it changes. A function of its arguments alone.

    Args:
        network: In eval mode; the heads' parameters are trained from where they are.
        train: What to learn from.
        held_out: What to measure on.
        seed: Of the batches.
        log: A CSV file to write the losses to.

    Returns:
        The metrics to report: for each head its last loss, and how well it does on what was held out.
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    if network.config.distance_head:
        rng = np.random.default_rng((seed, 2))

        def loss() -> Tensor:
            return distance_loss(network, *train.pairs(rng, BATCH))

        metrics["distance_head_loss"] = _fit(network.distance_head, loss, rows, "distance_head")
        if held_out is not None:
            metrics["distance_head_correlation"] = distance_correlation(network, held_out, np.random.default_rng(seed))
    if network.config.action_prior:
        prior_rng, blocks = np.random.default_rng((seed, 3)), network.config.prior_blocks

        def prior_loss() -> Tensor:
            now, later, done = train.ways(prior_rng, BATCH, blocks)
            return (network.prior(now, later) - done).square().mean()

        metrics["action_prior_loss"] = _fit(network.action_prior, prior_loss, rows, "action_prior")
        if held_out is not None:
            metrics["action_prior_r2"] = prior_r2(network, held_out, np.random.default_rng(seed))
    if log is not None:
        with log.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("head", "step", "loss"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return metrics


def distance_loss(network: LeWM, now: Tensor, later: Tensor, blocks: Tensor) -> Tensor:
    """Expectile regression of the time between frames, in its logarithm: near the goal a block counts as much as many
    do far away."""
    error = blocks.log1p() - network.distance(now, later).log1p()
    return (torch.where(error < 0, 1 - EXPECTILE, EXPECTILE) * error.square()).mean()


@torch.no_grad()
def distance_correlation(network: LeWM, held_out: Episodes, rng: np.random.Generator) -> float:
    """Correlation of estimated and true time between frames of the same episode, both in logarithms."""
    now, later, blocks = held_out.pairs(rng, 4096)
    estimated = network.distance(now, later)
    return float(np.corrcoef(np.log1p(estimated.cpu().numpy()), np.log1p(blocks.cpu().numpy()))[0, 1])


@torch.no_grad()
def prior_r2(network: LeWM, held_out: Episodes, rng: np.random.Generator) -> float:
    """Share of the actions' variance that the prior explains."""
    now, later, done = held_out.ways(rng, 4096, network.config.prior_blocks)
    return float(1 - (network.prior(now, later) - done).square().mean() / done.var(correction=0).clamp(min=1e-12))


def _fit(head: nn.Module, loss_of: Callable[[], Tensor], rows: list[dict[str, Any]], name: str) -> float:
    """AdamW with a short warm-up and a cosine to zero; gives the last loss."""
    head.requires_grad_(True)
    optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * cosine * min(1.0, (step + 1) / WARMUP)
        loss = loss_of()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == STEPS:
            rows.append({"head": name, "step": step + 1, "loss": loss.item()})
            if not math.isfinite(rows[-1]["loss"]):
                raise FloatingPointError(f"at step {step + 1} the loss of {name} is {rows[-1]['loss']}")
    optimiser.zero_grad(set_to_none=True)
    return float(rows[-1]["loss"])
