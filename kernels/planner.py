"""The cross-entropy method without leaving the device: noise, rollout, cost, elites and refit, captured as CUDA graphs.

It is the loop of rust/core/src/planner (CEM) with the same noise, candidate for candidate; README.md beside this file
says where rounding may differ. A plan is one upload, one graph and one download; with a deadline it is one graph an
iteration.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lewm.kernels.philox import normals
from lewm.kernels.rollout import Distance, Rollout, Weights, captured, cost_launch, on


@triton.jit(do_not_specialize=["S"])
def _sample_kernel(mean_ptr, std_ptr, low_ptr, high_ptr, key_ptr, step_ptr, candidate_ptr, moved_ptr, S,
                   WIDTH: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """candidate = clamp(mean + std noise, low, high), (E, S, WIDTH); of sample 0 the noise is 0. moved counts clamps.

    key: seed, number of the plan, ids of the environments. step: iterations done, for each environment.
    """
    e = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, BLOCKS)
    zero = tl.zeros((ROWS, BLOCKS), tl.int32)
    noise = normals(tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(step_ptr + e), tl.load(key_ptr + 2 + e),
                    sample[:, None] + zero, block[None, :] + zero)  # fmt: skip
    moved = tl.zeros((ROWS,), tl.int32)
    for i in tl.static_range(4):
        column = 4 * block + i
        real = column < WIDTH
        mean = tl.load(mean_ptr + e * WIDTH + column, mask=real, other=0.0).to(tl.float32)[None, :]
        std = tl.load(std_ptr + e * WIDTH + column, mask=real, other=0.0).to(tl.float32)[None, :]
        low = tl.load(low_ptr + column, mask=real, other=0.0)[None, :]
        high = tl.load(high_ptr + column, mask=real, other=0.0)[None, :]
        free = tl.fma(tl.where(sample[:, None] == 0, 0.0, noise[i]), std + tl.zeros((ROWS, BLOCKS), tl.float32),
                      mean + tl.zeros((ROWS, BLOCKS), tl.float32))  # fmt: skip
        value = tl.minimum(tl.maximum(free, low), high)
        live = (sample < S)[:, None] & real[None, :]
        moved += tl.sum(((value != free) & live).to(tl.int32), axis=1)
        tl.store(candidate_ptr + ((e * S + sample) * WIDTH)[:, None] + column[None, :], value, mask=live)
    tl.store(moved_ptr + e * S + sample, moved, mask=sample < S)


@triton.jit(do_not_specialize=["E", "S", "K"])
def _refit_kernel(cost_ptr, candidate_ptr, moved_ptr, low_ptr, high_ptr, order_ptr, mean_ptr, std_ptr, action_ptr,
                  best_ptr, trace_ptr, clipped_ptr, fault_ptr, step_ptr, E, S, K, floor_ptr,
                  WIDTH: tl.constexpr, PADDED: tl.constexpr, SAMPLES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Mean and standard deviation (at least floor) of the K lowest costs, ties by sample; and the best so far.

    One program an environment. fault: 0, or what made the costs unusable first: 1 a NaN or -inf, 2 too few finite ones;
    then iteration, sample or how many, and the cost.
    """
    e = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr + e)
    index = tl.arange(0, SAMPLES)
    real = index < S
    cost = tl.load(cost_ptr + e * S + index, mask=real, other=float("inf"))
    moved = tl.sum(tl.load(moved_ptr + e * S + index, mask=real, other=0), axis=0)
    tl.store(clipped_ptr + e, tl.load(clipped_ptr + e) + moved.to(tl.float64))
    # Sorted as integers, the sample in the low half: floats order like their bits, negative ones backwards.
    bits = (cost + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(cost == cost, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    ranked = tl.sort((bits.to(tl.int64) << 32) | index)
    bits = (ranked >> 32).to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    elite = (index < K) & (value < float("inf"))
    count = tl.sum(elite.to(tl.int32), axis=0)
    total = tl.sum(tl.where(elite, value, 0.0).to(tl.float64), axis=0)
    tl.store(trace_ptr + step * E + e, total / count)

    bad = tl.min(tl.where(real & ((cost != cost) | (cost == -float("inf"))), index, SAMPLES), axis=0)
    code = tl.where(bad < SAMPLES, 1, tl.where(count < 2, 2, 0))
    if (code > 0) & (tl.load(fault_ptr + 4 * e) == 0.0):
        tl.store(fault_ptr + 4 * e, code.to(tl.float64))
        tl.store(fault_ptr + 4 * e + 1, step.to(tl.float64))
        tl.store(fault_ptr + 4 * e + 2, tl.where(code == 1, bad, count).to(tl.float64))
        tl.store(fault_ptr + 4 * e + 3, tl.load(cost_ptr + e * S + tl.minimum(bad, S - 1)).to(tl.float64))

    # Elites best first; the standard deviation needs the mean, so they are read twice.
    tl.store(order_ptr + e * K + index, ranked.to(tl.int32), mask=elite)
    tl.debug_barrier()
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    mean = tl.zeros((PADDED,), tl.float64)
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        s = tl.load(order_ptr + e * K + k, mask=k < count, other=0)
        mask = (k < count)[:, None] & inside[None, :]
        x = tl.load(candidate_ptr + ((e * S + s) * WIDTH)[:, None] + column[None, :], mask=mask, other=0.0)
        mean += tl.sum(x.to(tl.float64), axis=0)
    mean = mean / count
    square = tl.zeros((PADDED,), tl.float64)
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        s = tl.load(order_ptr + e * K + k, mask=k < count, other=0)
        mask = (k < count)[:, None] & inside[None, :]
        x = tl.load(candidate_ptr + ((e * S + s) * WIDTH)[:, None] + column[None, :], mask=mask, other=0.0)
        shift = tl.where(mask, x.to(tl.float64) - mean[None, :], 0.0)
        square += tl.sum(shift * shift, axis=0)
    low = tl.load(low_ptr + column, mask=inside, other=0.0).to(tl.float64)
    high = tl.load(high_ptr + column, mask=inside, other=0.0).to(tl.float64)
    # The mean of numbers within the bounds can leave them by a rounding error.
    tl.store(mean_ptr + e * WIDTH + column, tl.minimum(tl.maximum(mean, low), high), mask=inside)
    std = tl.maximum(tl.sqrt(square / (count - 1)), tl.load(floor_ptr))
    tl.store(std_ptr + e * WIDTH + column, std, mask=inside)

    best = tl.load(order_ptr + e * K)
    lowest = tl.load(cost_ptr + e * S + best, mask=count > 0, other=float("inf")).to(tl.float64)
    if lowest < tl.load(best_ptr + e):
        tl.store(best_ptr + e, lowest)
        x = tl.load(candidate_ptr + (e * S + best) * WIDTH + column, mask=inside, other=0.0)
        tl.store(action_ptr + e * WIDTH + column, x.to(tl.float64), mask=inside)
    tl.store(step_ptr + e, step + 1)


def sample(
    mean: Tensor, std: Tensor, low: Tensor, high: Tensor, key: Tensor, step: Tensor, candidates: Tensor, moved: Tensor
) -> None:
    """Writes candidates (E, S, H A) and how many entries of each the bounds moved; see `_sample_kernel`."""
    environments, samples, width = candidates.shape
    blocks, rows = triton.next_power_of_2(triton.cdiv(width, 4)), 16
    _sample_kernel[(environments, triton.cdiv(samples, rows))](
        mean, std, low, high, key, step, candidates, moved, samples, WIDTH=width, BLOCKS=blocks, ROWS=rows,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def refit(
    costs: Tensor, candidates: Tensor, moved: Tensor, low: Tensor, high: Tensor, order: Tensor, mean: Tensor,
    std: Tensor, actions: Tensor, best: Tensor, trace: Tensor, clipped: Tensor, fault: Tensor, step: Tensor,
    elites: int, floor: Tensor,
) -> None:  # fmt: skip
    """Fits mean and std (E, H A) to the elites, and keeps the best candidate; see `_refit_kernel`."""
    environments, samples, width = candidates.shape
    _refit_kernel[(environments,)](
        costs, candidates, moved, low, high, order, mean, std, actions, best, trace, clipped, fault, step,
        environments, samples, elites, floor, WIDTH=width, PADDED=triton.next_power_of_2(width),
        SAMPLES=triton.next_power_of_2(samples), CHUNK=32, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


class _Fields:
    """Named arrays in one piece of memory, on the device and page-locked on the host: one copy moves them all."""

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        sizes = [-(-int(np.prod(shape)) * dtype.itemsize // 16) * 16 for shape, dtype in fields.values()]
        self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")

        def views(memory: Tensor) -> dict[str, Tensor]:
            parts = zip(fields.items(), memory.split(sizes), strict=True)
            return {
                name: part[: int(np.prod(shape)) * dtype.itemsize].view(dtype).view(shape)
                for (name, (shape, dtype)), part in parts
            }

        self.device, self.host = views(self._device), views(self._host)

    def upload(self) -> None:
        self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        self._host.copy_(self._device, non_blocking=True)


class CEM:
    """Plans for E environments with T observed frames each, in memory of its own; one call at a time.

    Args:
        weights: What `lewm.kernels.rollout.pack` gave.
        environments, frames: E and T.
        cost: "latent" or "distance".
        samples, iterations, elites, horizon, init_std, min_std, reference: As of `lewm.CEM`.
    """

    def __init__(
        self,
        weights: Weights,
        environments: int,
        frames: int,
        *,
        cost: str = "latent",
        samples: int,
        iterations: int,
        elites: int,
        horizon: int,
        init_std: float,
        min_std: float,
        reference: bool,
    ) -> None:
        c, e = weights.config, environments
        self.environments, self.frames, self.iterations, self.samples = e, frames, iterations, samples
        self.elites, self.init_std, self.reference = elites, init_std, reference
        self._shape, self._width = (e, horizon, c.block_dim), horizon * c.block_dim
        device = weights.positions.device
        self._in = _Fields(
            {
                "key": ((2 + e,), torch.int64),
                "mean": ((e, self._width), torch.float64),
                "floor": ((1,), torch.float64),
                "low": ((self._width,), torch.float32),
                "high": ((self._width,), torch.float32),
                "z": ((e, frames, c.embed_dim), torch.float32),
                "goal": ((e, c.embed_dim), torch.float32),
                "past": ((e, frames - 1, c.block_dim), torch.float32),
            },
            device,
        )
        plan = ((e, self._width), torch.float64)
        self._out = _Fields(
            {
                "actions": plan,
                "mean": plan,
                "std": plan,
                "cost": ((e,), torch.float64),
                "trace": ((iterations, e), torch.float64),
                "clipped": ((e,), torch.float64),
                "fault": ((e, 4), torch.float64),
            },
            device,
        )
        self._in.host["floor"][0] = 0.0 if reference else min_std
        self._step = torch.zeros(e, dtype=torch.int32, device=device)
        self._moved = torch.zeros(e * samples, dtype=torch.int32, device=device)
        self._order = torch.zeros(e * elites, dtype=torch.int32, device=device)
        self._search = Rollout(weights, e * samples, frames, horizon)
        # Cut alike, it takes the code that the search has compiled.
        self._check = Rollout(weights, e, frames, horizon, cut=self._search.cut)
        # Of candidates, final means and goals.
        self._heads = None
        if cost == "distance":
            self._heads = [Distance(weights, rows, self._search.cut.exact) for rows in (e * samples, e, e)]
        self._costs = torch.zeros(e * samples, dtype=torch.float32, device=device)
        self._cost = torch.zeros(e, dtype=torch.float32, device=device)
        self._lock = threading.Lock()
        self._graphs: dict[str, Callable[[], None]] = {}
        self._cuda = device.type == "cuda"

    # --------------------------------------------------------------------------------------------- what is captured

    def _start(self) -> None:
        """Uploads the task and sets everything to its first value."""
        self._in.upload()
        given, found = self._in.device, self._out.device
        found["mean"].copy_(given["mean"])
        found["std"].fill_(self.init_std)
        found["cost"].fill_(float("inf"))
        for zeroed in (found["actions"], found["trace"], found["clipped"], found["fault"], self._step):
            zeroed.zero_()
        past = given["past"] if self.frames > 1 else None
        for rollout in (self._search, self._check):
            rollout.observe(given["z"], past)
        if self._heads is not None:
            self._heads[2].run(given["goal"])

    def _iterate(self) -> None:
        given, found, search = self._in.device, self._out.device, self._search
        candidates, bounds = search.candidates.view(self.environments, self.samples, -1), (given["low"], given["high"])
        sample(found["mean"], found["std"], *bounds, given["key"], self._step, candidates, self._moved)
        search.run()
        self._score(0, search.latents[-1], self._costs)
        refit(
            self._costs, candidates, self._moved, *bounds, self._order, found["mean"], found["std"], found["actions"],
            found["cost"], found["trace"], found["clipped"], found["fault"], self._step, self.elites, given["floor"],
        )  # fmt: skip

    def _finish(self) -> None:
        """Scores the final mean: the better of it and the best candidate is the plan."""
        found = self._out.device
        self._check.candidates.copy_(found["mean"].view(self._shape))
        self._check.run()
        self._score(1, self._check.latents[-1], self._cost)
        better = self._cost < found["cost"]
        found["cost"].copy_(torch.where(better, self._cost.double(), found["cost"]))
        means = self._check.candidates.view(found["actions"].shape).double()
        found["actions"].copy_(torch.where(better[:, None], means, found["actions"]))

    def _score(self, head: int, z: Tensor, costs: Tensor) -> None:
        """Costs of latents, as the cost of this plan has it."""
        if self._heads is None:
            cost_launch(z, self._in.device["goal"], costs)()
        else:
            cost_launch(self._heads[head].run(z), self._heads[2].embedded, costs, root=True)()

    def _whole(self) -> None:
        self._start()
        for _ in range(self.iterations):
            self._iterate()
        if not self.reference:
            self._finish()
        self._out.download()

    def _run(self, name: str) -> None:
        """Runs one of the above, on CUDA as a graph that is captured when it is first asked for."""
        if name not in self._graphs:
            self._graphs[name] = captured(getattr(self, name), self._costs.device)
        self._graphs[name]()

    # -------------------------------------------------------------------------------------------------------- solve

    def solve(
        self,
        z: np.ndarray,
        goal: np.ndarray,
        past: np.ndarray | None,
        mean: np.ndarray,
        *,
        low: np.ndarray | None,
        high: np.ndarray | None,
        seed: int,
        env_ids: np.ndarray,
        plan: int,
        deadline: float | None,
    ) -> dict[str, Any]:
        """What `lewm._core.Planner.solve` gives, for latents (E, T, D), goals (E, D), past blocks (E, T - 1, A).

        Raises:
            ValueError: A cost is NaN or -inf, or fewer than two in an iteration are finite.
        """
        started = time.perf_counter()
        with self._lock, on(self._costs.device):
            host = self._in.host
            words = np.concatenate([np.array([seed, plan], np.uint64), env_ids.astype(np.uint64)]).view(np.int64)
            horizon = self._shape[1]
            bounds = _inwards(low, high, self._shape[2])
            values = {"key": words, "mean": mean.reshape(len(mean), -1), "z": z, "goal": goal}
            values |= {"low": np.tile(bounds[0], horizon), "high": np.tile(bounds[1], horizon)}
            for name, value in values.items():
                host[name].numpy()[...] = value
            if past is not None:
                host["past"].numpy()[...] = past
            hit, done = False, self.iterations
            if deadline is None:
                self._run("_whole")
            else:
                hit, done = self._within(deadline, started)
                self._out.download()
            if self._cuda:
                torch.cuda.current_stream().synchronize()
            return self._found(hit, done)

    def _within(self, deadline: float, started: float) -> tuple[bool, int]:
        """Iterations while there is time, by the rule of the Rust loop; the first one always."""
        self._run("_start")
        last = 0.0
        for iteration in range(self.iterations):
            begun = time.perf_counter()
            if iteration and begun - started + last > deadline:
                return True, iteration
            self._run("_iterate")
            if self._cuda:
                torch.cuda.current_stream().synchronize()
            last = time.perf_counter() - begun
        if time.perf_counter() - started > deadline:
            return True, self.iterations
        if not self.reference:
            self._run("_finish")
        return False, self.iterations

    def _found(self, hit: bool, done: int) -> dict[str, Any]:
        found = {name: value.numpy().copy() for name, value in self._out.host.items()}
        faults = found.pop("fault")
        for row in np.flatnonzero(faults[:, 0]):
            code, iteration, where, cost = faults[row]
            place = f"environment row {row}"
            if code == 1:
                raise ValueError(
                    f"cost must be a number or +inf, got {cost} for {place}, sample {where:.0f}, "
                    f"iteration {iteration:.0f}"
                )
            raise ValueError(
                f"cost must be finite for at least 2 samples, got {where:.0f} of {self.samples} ({place}, iteration "
                f"{iteration:.0f})"
            )
        if not self.reference and not np.isfinite(found["cost"]).all():
            row = int(np.flatnonzero(~np.isfinite(found["cost"]))[0])
            raise ValueError(f"cost must be a number or +inf, got {found['cost'][row]} for environment row {row}")
        found["trace"] = found["trace"][:done]
        if self.reference:
            found["actions"], found["cost"] = found["mean"].copy(), found["trace"][-1].copy()
        found["clipped"] /= done * self.samples * self._width
        for name in ("actions", "mean", "std"):
            found[name] = found[name].reshape(self._shape)
        kept = np.empty((self._shape[0], 0, *self._shape[1:]))
        return {**found, "kept": kept, "iterations": done, "deadline_hit": hit}


def _inwards(low: np.ndarray | None, high: np.ndarray | None, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds in float32, never outside the given ones; infinite without."""
    if low is None or high is None:
        return np.full(width, -np.inf, np.float32), np.full(width, np.inf, np.float32)
    inner = low.astype(np.float32), high.astype(np.float32)
    return (
        np.where(inner[0] < low, np.nextafter(inner[0], np.float32(np.inf)), inner[0]),
        np.where(inner[1] > high, np.nextafter(inner[1], np.float32(-np.inf)), inner[1]),
    )


def examples(_target: int, e: int = 1) -> Iterator[tuple[str, Callable[[], None]]]:
    """What `lewm.kernels.code` compiles: the kernels of this module in the paper's plan for e environments."""
    meta, s, elites, width, dim = torch.device("meta"), 300, 30, 50, 192

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    double, count, plan = torch.float64, torch.int32, empty(e, width, dtype=torch.float64)
    moved, step, candidates = empty(e * s, dtype=count), empty(e, dtype=count), empty(e, s, width)
    bounds, key = (empty(width), empty(width)), empty(2 + e, dtype=torch.int64)
    yield "paper", lambda: sample(plan, plan, *bounds, key, step, candidates, moved)
    yield "paper", lambda: cost_launch(empty(e * s, dim), empty(e, dim), empty(e * s))()
    yield (
        "paper",
        lambda: refit(
            empty(e * s), candidates, moved, *bounds, empty(e * elites, dtype=count), plan, plan, plan,
            empty(e, dtype=double), empty(30, e, dtype=double), empty(e, dtype=double), empty(e, 4, dtype=double), step,
            elites, empty(1, dtype=double),
        ),
    )  # fmt: skip
