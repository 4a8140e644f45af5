"""Where the time of a training step goes, and which share of the device's peak that is (`lewm train --profile`)."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lewm.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from lewm.trainer import _Run

_WARM_UP, _STEPS, _AHEAD = 3, 50, 10
_LEAST, _SECONDS = 3, 20.0  # a slow device gets fewer steps, not minutes
# A part is what a step does up to the mark of that name; the host has what lies between the others.
_COMPUTED = ("encoder", "predictor", "sigreg", "predictor and sigreg backward", "encoder backward", "optimiser")
# Dense bfloat16 with float32 accumulation, TFLOP/s, from NVIDIA's data sheets, by the words in the name of a device.
# Another clock or power limit moves it; what is not here is measured.
_PEAKS = (
    (("B200",), 2250.0),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("H100", "NVL"), 835.5),
    (("H100", "PCIe"), 756.0),
    (("H100",), 989.4),
    (("A100",), 311.9),
    (("L40S",), 362.1),
    (("L4",), 121.0),
    (("A10",), 125.0),
    (("RTX", "5090"), 209.5),
    (("RTX", "4090"), 165.2),
)


@dataclass(frozen=True)
class Profile:
    """Times of training steps, as `lewm.train(..., profile=True)` measures them.

    Attributes:
        preset, device, precision, compiled: What ran; precision is that of matrix products.
        batch_size, frames: Windows of a step, and frames of a window.
        steps: Steps measured, after a few that were not.
        p50_ms, p95_ms: Wall time from step to step.
        frames_per_s: Frames trained on per second, at the median.
        tflop: Arithmetic of a step, in 10^12 operations: `training_flop`.
        mfu: Model FLOP utilisation, the share of `peak_tflop_per_s` that the step reaches at the median.
        peak_tflop_per_s, peak_from: The device's peak, and whence: "data sheet" (dense, bfloat16), or "measured" by a
            large matrix product in this precision.
        peak_mb: Most device memory held; None on a CPU.
        parts: Mean milliseconds per step of each part of a step. "data" is the device waiting for a batch that the
            loader has not ready, "copy" for one that is not on the device yet. "host" is the rest: on CUDA the time
            that the device has nothing to do because the host issues work too slowly.
    """

    preset: str
    device: str
    precision: str
    compiled: bool
    batch_size: int
    frames: int
    steps: int
    p50_ms: float
    p95_ms: float
    frames_per_s: float
    tflop: float
    mfu: float
    peak_tflop_per_s: float
    peak_from: str
    peak_mb: float | None
    parts: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        total = sum(self.parts.values())
        width = max(map(len, self.parts))
        memory = "" if self.peak_mb is None else f", {self.peak_mb:,.0f} MB"
        return "\n".join(
            [
                f"{self.preset} on {self.device}, {self.precision}{', compiled' if self.compiled else ''}: "
                f"{self.steps} steps of {self.batch_size} windows of {self.frames} frames",
                f"{self.p50_ms:.4g} ms per step (p95 {self.p95_ms:.4g}), {self.frames_per_s:,.0f} frames/s{memory}",
                f"MFU {self.mfu:.1%}: {self.tflop:.4g} TFLOP per step, peak {self.peak_tflop_per_s:.4g} TFLOP/s "
                f"({self.peak_from})",
                "",
                f"{'':{width}}  mean ms   share",
                *(f"{name:{width}}  {ms:7.3f}  {ms / total:6.1%}" for name, ms in self.parts.items()),
            ]
        )


def profiled(run: _Run) -> Profile:
    """Times the steps that `run` would train with, data and all; the run has moved on by them afterwards."""
    device, config = run.device, run.config
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA for a profile, got {str(device)!r}")
    cuda = device.type == "cuda"
    batches = run._batches(run.step, run.step + _WARM_UP + 1 + _STEPS + _AHEAD)
    waited: list[float] = []  # of the host, for the loader

    def step(clock: _Clock | None = None) -> None:
        begin = time.perf_counter()
        run.clock = clock
        frames, actions = next(batches)
        if clock:
            waited.append(clock.data - begin)
        run._step(frames, actions)
        run.step += 1

    try:
        begin = time.perf_counter()
        for _ in range(_WARM_UP):
            step()
        _synchronise(device)
        each = (time.perf_counter() - begin) / _WARM_UP
        count = min(_STEPS, max(_LEAST, int(_SECONDS / each)))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        step()  # so that the host is as far ahead as it gets
        clock = _Clock(device)
        clock("optimiser")
        for _ in range(count):
            step(clock)
        peak_mb = torch.cuda.max_memory_allocated(device) / 1e6 if cuda else None
        times, parts = clock.times(), clock.parts()
        if cuda:
            # Those parts have the device's waiting for the host in them. With a head start the host is always ahead.
            ahead = _Clock(device)
            for _ in range(min(count, _AHEAD)):
                _synchronise(device)
                with torch.cuda.device(device):
                    torch.cuda._sleep(int(3e6 * statistics.median(times)))  # cycles: a step's time at 3 GHz
                ahead("start")
                step(ahead)
            busy = ahead.parts()
            parts = {
                "data": min(parts["data"], 1e3 * statistics.mean(waited[:count])),
                "copy": parts["copy"],
                **{name: busy[name] for name in _COMPUTED},
            }
            parts["host"] = max(0.0, statistics.mean(times) - sum(parts.values()))
    finally:
        run.clock = None
        batches.close()
    p50 = statistics.median(times)
    flop = training_flop(run.model_config, config)
    precision = "bfloat16" if run.amp else "float32"
    peak, peak_from = peak_flop(device, precision)
    return Profile(
        preset=run.preset,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        precision=precision,
        compiled=run.compiled,
        batch_size=config.batch_size,
        frames=config.frames,
        steps=count,
        p50_ms=round(p50, 3),
        p95_ms=round(float(np.percentile(times, 95)), 3),
        frames_per_s=round(1e3 * config.batch_size * config.frames / p50, 1),
        tflop=flop / 1e12,
        mfu=float(f"{flop / (1e-3 * p50) / peak:.4g}"),
        peak_tflop_per_s=round(peak / 1e12, 4),
        peak_from=peak_from,
        peak_mb=None if peak_mb is None else round(peak_mb, 1),
        parts={name: round(parts[name], 4) for name in ("data", "copy", *_COMPUTED, "host")},
    )


class _Clock:
    """Stamps between the parts of steps: on CUDA when the device gets there, else when the host does."""

    def __init__(self, device: torch.device) -> None:
        # The backward pass calls from a thread of its own, whose current stream may be another.
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.stamps: list[tuple[str, Any]] = []
        self.data = 0.0

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        if part == "data":
            self.data = now
        self.stamps.append(
            (part, self.stream.record_event(torch.cuda.Event(enable_timing=True)) if self.stream else now)
        )

    def _between(self, first: Any, last: Any) -> float:
        if not self.stream:
            return 1e3 * (last - first)
        last.synchronize()
        return first.elapsed_time(last)

    def times(self) -> list[float]:
        """Milliseconds from the end of each step to that of the next."""
        ends = [stamp for part, stamp in self.stamps if part == "optimiser"]
        return [self._between(*pair) for pair in pairwise(ends)]

    def parts(self) -> dict[str, float]:
        """Mean milliseconds of each part per step."""
        found: dict[str, float] = {}
        for (_, before), (part, after) in pairwise(self.stamps):
            found[part] = found.get(part, 0.0) + self._between(before, after)
        steps = sum(part == "encoder" for part, _ in self.stamps)
        return {part: ms / steps for part, ms in found.items()}


def training_flop(model: ModelConfig, config: TrainConfig) -> float:
    """Operations of the matrix products of one training step, a multiply-add being two; nothing is counted twice.

    Forward, and backward for weights and for inputs where these have gradients: what this network does, which computes
    its last encoder layer for [CLS] alone. The official network, which computes it for every patch, has 7 % more at
    preset `paper`.
    """
    dim, patches = model.encoder_dim, (model.image_size // model.patch_size) ** 2
    tokens = patches + 1
    keys_values, query_out, mlp = 2 * dim * dim, 2 * dim * dim, 2 * dim * model.encoder_mlp
    layer = tokens * (keys_values + query_out + mlp) + 2 * tokens * tokens * dim
    last = tokens * keys_values + query_out + mlp + 2 * tokens * dim
    encoder = (model.encoder_depth - 1) * layer + last
    projector = (model.encoder_dim + model.embed_dim) * model.projector_hidden
    frame = 3 * (encoder + projector) + 2 * patches * 3 * model.patch_size**2 * dim  # pixels have no gradient

    width, inner = model.predictor_dim, model.predictor_heads * model.predictor_head_dim
    token = model.predictor_depth * (4 * width * inner + 2 * width * model.predictor_mlp + 6 * width * width)
    if width != model.embed_dim:
        token += 3 * model.embed_dim * width
    if model.positions > 1 or model.dropout:  # over one key attention is the identity
        token += model.predictor_depth * 2 * model.positions * inner
    action = 2 * model.block_dim * model.action_smoothed  # raw actions have no gradient
    action += 3 * (model.action_smoothed + model.embed_dim) * model.action_hidden
    tokens = (config.frames - model.history) * model.positions
    # Prefixes that a window is too short for are not compared with anything.
    predicted = sum(min(n, model.positions) for n in range(1, config.frames)) if model.action_prefix else tokens
    sigreg = 2 * config.frames * model.embed_dim * config.directions
    predictor = 3 * (tokens * token + predicted * 2 * model.embed_dim * model.projector_hidden)
    macs = config.frames * frame + predictor + (config.frames - 1) * action + sigreg
    return 2.0 * config.batch_size * macs


def peak_flop(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s that the device has at most in matrix products, and whence: "data sheet" or "measured"."""
    if device.type == "cuda" and precision == "bfloat16":
        words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
        for known, tflop in _PEAKS:
            if words >= set(known) and not words & {"D", "Laptop", "MIG"}:  # those have less
                return tflop * 1e12, "data sheet"
    size = 8192 if device.type == "cuda" else 1024
    # Data of some variety: a GPU draws less power, and so runs faster, on constant ones.
    angles = torch.arange(size * size, device=device, dtype=torch.float32).view(size, size)
    a, b = angles.sin().to(getattr(torch, precision)), angles.cos().to(getattr(torch, precision))
    times = []
    for _ in range(20):
        _synchronise(device)
        begin = time.perf_counter()
        a @ b
        _synchronise(device)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times), "measured"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
