"""`lewm.train`: two loss terms, end to end from pixels (paper section 3), exactly resumable."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lewm import __version__, diagnostics
from lewm.checks import integer
from lewm.config import ModelConfig, TrainConfig, configure, preset_named
from lewm.data import Dataset
from lewm.loader import Batch, Loader
from lewm.losses import Directions, prediction_loss, sigreg
from lewm.model import Model
from lewm.model_file import brief, check_shapes, checked_stats, read_tensors, write_atomically, write_tensors
from lewm.network import LeWM
from lewm.pixels import resize_area
from lewm.torch_backend import device_of

_LOG_EVERY = 20
_PRECISE_BATCHES = 100
_PROBE_FRAMES = 2000
_COLUMNS = (
    "step",
    "loss",
    "prediction",
    "sigreg",
    "sigreg_per_sample",
    "embedding_std",
    "effective_rank",
    "learning_rate",
    "gradient_norm",
    "validation_prediction",
    "probe_r2",
    "distance_correlation",
    "seconds",
)


class CollapseWarning(UserWarning):
    """The latents are collapsing to a point or to a few directions; what is learnt will not plan."""


def train(
    data: Dataset | str | os.PathLike[str],
    *,
    preset: str = "paper",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str | None = None,
    checkpoint_every: int = 200,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    **overrides: Any,
) -> Model:
    """Trains a LeWorldModel on a trajectory store: prediction + lambda * SIGReg, no stop-gradient, no EMA.

    The run folder `out` gets `metrics.csv`, TensorBoard events, `checkpoint.safetensors` (every `checkpoint_every`
    steps, at the end, and on Ctrl-C) and `model.safetensors`. A run is a function of (data, configuration, seed):
    one that was interrupted and resumed has the losses of one that was not, bit for bit on the same machine and
    thread count.

    Args:
        data: A store or its path. Frames of another size than the preset's are area-resized.
        preset: "paper", "small" or "tiny".
        out: Run folder; `runs/<preset>-<seed>` when not given. It must be new or empty, unless `resume`.
        seed: Of everything random.
        resume: Continue the run in `out`, with the same data and settings.
        device: A torch device; CUDA where there is one, else the CPU, when not given.
        checkpoint_every: Steps between checkpoints.
        progress: Called after every step with (steps done, steps in all, latest metrics).
        **overrides: Any field of `TrainConfig` or `ModelConfig`, by name: `steps=300`, `history=3`.

    Returns:
        The trained model, also saved as `out/model.safetensors`.

    Raises:
        ValueError: Data that cannot be trained on (a constant or non-finite action column, no episode long enough),
            a setting out of its domain, a device that is not there, a folder in use, a run to resume that has other
            data or settings.
        TypeError: An unknown setting.
        FloatingPointError: The loss is not finite any more.
        KeyboardInterrupt: After the checkpoint is written.
    """
    data = data if isinstance(data, Dataset) else Dataset(data)
    model_config, train_config = configure(preset, data.action_dim, overrides)
    integer("checkpoint_every", checkpoint_every, 1)
    run = _Run(data, preset, model_config, train_config, Path(out or f"runs/{preset}-{seed}"), seed, device, resume)
    return run.train(checkpoint_every, progress)


class _Run:
    """One training run: data order, network, optimiser, logs, checkpoints."""

    def __init__(
        self,
        data: Dataset,
        preset: str,
        model_config: ModelConfig,
        config: TrainConfig,
        out: Path,
        seed: int,
        device: str | None,
        resume: bool,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
        if data.height != data.width:
            raise ValueError(f"data must hold square frames, got {data.height}x{data.width}")
        if config.frames <= model_config.history:
            raise ValueError(f"frames must exceed history {model_config.history}, got {config.frames}")
        self.data, self.preset, self.out, self.seed = data, preset, out, seed
        self.model_config, self.config = model_config, config
        self.device = device_of(device)
        self.train_episodes, self.validation_episodes = data.split(config.validation, seed)
        self.stats = checked_stats(data.action_statistics(self.train_episodes), data.action_dim)
        self.loader = self._loader(seed)
        self.steps = config.steps or max(1, round(config.epochs * len(self.loader)))
        self.step = 0
        self.seconds = 0.0
        self.metrics: dict[str, float] = {}
        # What must agree for a resumed run to be the same run.
        self.identity = {
            "preset": preset,
            "model": dataclasses.asdict(model_config),
            "train": dataclasses.asdict(config),
            "seed": seed,
            "fingerprint": data.fingerprint(),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = LeWM(model_config)
        self.network.to(self.device)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.amp = _bfloat16_is_native(self.device)
        self._open_folder(resume)

    # ----------------------------------------------------------------------------------------------- the run itself

    def train(self, checkpoint_every: int, progress: Callable[[int, int, dict[str, float]], None] | None) -> Model:
        writer = _tensorboard(self.out / "tensorboard", self.step)
        batches = self._batches(self.step)
        started = time.perf_counter() - self.seconds
        interrupt = _HeldInterrupt()
        try:
            for frames, actions in batches:
                losses = self._step(frames, actions)
                self.step += 1
                self.seconds = time.perf_counter() - started
                last = self.step == self.steps
                if self.step % checkpoint_every == 0 or last:
                    losses.update(self._inspect())
                if self.step % _LOG_EVERY == 0 or self.step == 1 or last or "probe_r2" in losses:
                    self._log(losses, writer)
                if self.step % checkpoint_every == 0 or last:
                    self._save()
                try:
                    if progress:
                        progress(self.step, self.steps, self.metrics)
                    interrupt.check()
                except KeyboardInterrupt:
                    self._save()
                    raise
        finally:
            interrupt.release()
            batches.close()
            if writer:
                writer.close()
        self._precise_batchnorm()
        model = self._model()
        model.save(self.out / "model.safetensors")
        return model

    def _step(self, frames: Tensor, actions: Tensor) -> dict[str, Any]:
        """One optimiser step; keyed by (seed, step) alone, so that it does not matter what ran before it."""
        config = self.config
        self.network.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate(self.step)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.step) % 2**63)  # dropout
            z, prediction = self._losses(frames, actions)
        regulariser = sigreg(z.transpose(0, 1), Directions(config.directions, self.seed, self.step))
        loss = prediction + config.sigreg_weight * regulariser
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {
            "loss": loss.detach(),
            "prediction": prediction.detach(),
            "sigreg": regulariser.detach(),
            "gradient_norm": norm.detach(),
            "z": z.detach(),
        }

    def _losses(self, frames: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, T, D) in float32 and the prediction loss, teacher-forced (paper Eq. 1)."""
        history = self.model_config.history
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            z = self.network.encode(frames)
            embedded = self.network.action_encoder(actions)
            # Every run of `history` frames predicts each frame that follows one of its own.
            context, condition, target = (
                t.unfold(1, history, 1).transpose(2, 3).flatten(0, 1) for t in (z[:, :-1], embedded, z[:, 1:])
            )
            predicted = self.network.predict(context, condition)
        return z.float(), prediction_loss(predicted.float(), target.float())

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up over `warmup` of the run, then a cosine that reaches zero after `schedule` runs."""
        config = self.config
        warmup = round(config.warmup * self.steps)
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, config.schedule * self.steps - warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    # -------------------------------------------------------------------------------------------------------- data

    def _loader(self, seed: int) -> Loader:
        return self.data.loader(
            self.config.batch_size,
            self.config.frames,
            self.model_config.action_block,
            episodes=self.train_episodes,
            seed=seed,
            pin_memory=self.device.type == "cuda",
            transform=self._prepared,
        )

    def _batches(self, step: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches from `step` on: every epoch is a permutation keyed by (seed, epoch), its remainder dropped."""
        self.loader.set_epoch(*divmod(step, len(self.loader)))
        while step < self.steps:
            for batch in self.loader:
                yield batch
                step += 1
                if step == self.steps:
                    break

    def _read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = self.data.batch(windows, self.config.frames, self.model_config.action_block)
        return self._prepared(Batch(*map(torch.from_numpy, batch)))

    def _prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frames of the model's size and normalised actions, on the device."""
        frames, actions = self._resized(batch.frames), batch.actions
        block = self.model_config.action_block
        mean, std = (torch.from_numpy(np.tile(self.stats[name], block)) for name in ("mean", "std"))
        actions = ((actions - mean) / std).float()
        if self.device.type == "cuda":
            frames, actions = frames.pin_memory(), actions.pin_memory()  # the frames are, unless they were resized
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in (frames, actions))

    def _resized(self, frames: Any) -> Any:
        size = self.model_config.image_size
        return frames if frames.shape[-2] == size else resize_area(frames, size)

    # ------------------------------------------------------------------------------------------------ looking at it

    @torch.no_grad()
    def _inspect(self) -> dict[str, float]:
        """Held-out prediction loss (with batch statistics: running ones lag) and, with states, probe and distances."""
        found: dict[str, float] = {}
        config, block = self.config, self.model_config.action_block
        rng = np.random.default_rng((self.seed, self.step, 1))
        episodes = self.validation_episodes
        try:
            windows = self.data.windows(episodes, config.frames, block)
        except ValueError:  # every held-out episode is shorter than a window
            windows = np.empty((0, 2), np.int64)
        if len(windows) > 1:
            chosen = windows[rng.permutation(len(windows))[: 4 * config.batch_size]]
            with self._batch_statistics():
                losses = [
                    self._losses(*self._read(part))[1].item()
                    for part in np.array_split(chosen, math.ceil(len(chosen) / config.batch_size))
                    if len(part) > 1
                ]
            found["validation_prediction"] = float(np.mean(losses))
        if "state" in self.data.columns and len(episodes) and len(self.train_episodes):
            z_fit, y_fit = self._latents_and_states(self.train_episodes, rng)
            z_test, y_test = self._latents_and_states(episodes, rng)
            found["probe_r2"] = diagnostics.probe_r2(z_fit, y_fit, z_test, y_test)
            found["distance_correlation"] = diagnostics.distance_correlation(z_test, y_test, rng)
        return found

    def _latents_and_states(self, episodes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = [
            (episode, np.sort(rng.choice(length, min(length, 16), replace=False)))
            for episode in rng.permutation(episodes)[: _PROBE_FRAMES // 16]
            for length in [int(self.data.lengths[episode])]
        ]
        frames = np.concatenate([self._resized(self.data.frames(episode, index)) for episode, index in rows])
        states = np.concatenate([self.data.column("state", episode)[index] for episode, index in rows])
        # Even parts: statistics of a last one of a single frame would not exist.
        parts = torch.from_numpy(frames).tensor_split(math.ceil(len(frames) / 512))
        with self._batch_statistics(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            z = torch.cat([self.network.encode(part.to(self.device)) for part in parts])
        return z.float().cpu().numpy(), states

    def _batch_statistics(self) -> Any:
        return _BatchStatistics(self.network)

    def _log(self, losses: dict[str, Any], writer: Any) -> None:
        z = losses.pop("z").flatten(0, 1).float().cpu().numpy()
        row = {name: float(value) for name, value in losses.items()}
        if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient_norm"]):
            raise FloatingPointError(
                f"at step {self.step} the loss is {row['loss']} and the gradient's norm {row['gradient_norm']}: "
                f"lower learning_rate (now {self.config.learning_rate:g}); the last checkpoint in {self.out} is intact"
            )
        row.update(
            step=self.step,
            sigreg_per_sample=row["sigreg"] / self.config.batch_size,
            embedding_std=float(z.std(0).mean()),
            effective_rank=diagnostics.effective_rank(z),
            learning_rate=self._learning_rate(self.step - 1),
            seconds=round(self.seconds, 3),
        )
        self.metrics.update(row)
        with (self.out / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n").writerow(row)
        if writer:
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    writer.add_scalar(name, value, self.step)
        self._warn_of_collapse(row)

    def _warn_of_collapse(self, row: dict[str, float]) -> None:
        """Once per run, after a grace of 150 steps or the warm-up, in which latents are still spreading out."""
        if self.step < max(150, self.config.warmup * self.steps) or self.metrics.get("warned"):
            return
        collapsing = (
            row["sigreg_per_sample"] > diagnostics.COLLAPSED_SIGREG_PER_SAMPLE / 2
            or row["embedding_std"] < 0.1
            or row["effective_rank"] < 1.2
        )
        if collapsing:
            self.metrics["warned"] = 1.0
            warnings.warn(
                f"step {self.step}: the latents are collapsing: sigreg / batch {row['sigreg_per_sample']:.3f} "
                f"(0.402 is a single point), embedding std {row['embedding_std']:.3f}, effective rank "
                f"{row['effective_rank']:.1f} of {self.model_config.embed_dim}. "
                f"Raise sigreg_weight, now {self.config.sigreg_weight:g}.",
                CollapseWarning,
                stacklevel=2,
            )

    # --------------------------------------------------------------------------------------------- ending, resuming

    @torch.no_grad()
    def _precise_batchnorm(self) -> None:
        """Replaces BatchNorm's running statistics by averages over fresh batches under the final weights.

        Running averages lag behind the weights; without this pass the loss in eval mode can be hundreds of times the
        loss in training mode, and plans change (paper notes, section 15.1).
        """
        norms = [m for m in self.network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
        self.network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # plain average
            norm.train()
        self.loader.set_epoch(2**32 - 1)  # an order that training does not come to
        for frames, actions in islice(self.loader, _PRECISE_BATCHES):
            self._losses(frames, actions)
        for norm in norms:
            norm.momentum = 0.1
        self.network.eval()

    def _model(self) -> Model:
        metrics = {k: v for k, v in self.metrics.items() if k != "warned" and math.isfinite(v)}
        meta = {
            "preset": self.preset,
            "planner": preset_named(self.preset).planner,
            "data": {
                "fingerprint": self.identity["fingerprint"],
                "episodes": len(self.data),
                **{k: self.data.metadata[k] for k in ("env_id", "seed", "policy") if k in self.data.metadata},
            },
            "training": {
                "config": self.identity["train"],
                "seed": self.seed,
                "steps": self.steps,
                "seconds": round(self.seconds, 1),
                "validation_episodes": [int(e) for e in self.validation_episodes],
                "metrics": metrics,
                "versions": {
                    "lewm": __version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
                "device": str(self.device),
                "bfloat16": self.amp,
            },
        }
        device = None if self.device.type == "cpu" else str(self.device)
        return Model(self.model_config, self.network.state_dict(), stats=self.stats, meta=meta, device=device)

    def _save(self) -> None:
        """The whole state of the run, in one file that is replaced at once."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{index}.{name}": value for name, value in state.items()})
        header = {"identity": self.identity, "step": self.step, "seconds": self.seconds, "metrics": self.metrics}
        write_tensors(
            self.out / "checkpoint.safetensors", {k: v.detach().cpu().numpy() for k, v in tensors.items()}, header
        )

    def _open_folder(self, resume: bool) -> None:
        out, checkpoint = self.out, self.out / "checkpoint.safetensors"
        if not resume:
            if out.is_dir() and any(out.iterdir()):
                raise ValueError(f"out must be a new or empty folder, or resume must be set; {out} holds files")
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / "config.json", json.dumps(self.identity, indent=1).encode())
            with (out / "metrics.csv").open("w", newline="") as file:
                csv.DictWriter(file, _COLUMNS, lineterminator="\n").writeheader()
            self._save()  # from now on the run can be resumed, whatever ends it
            return
        tensors, header = read_tensors(checkpoint, "run to resume")
        before = header.get("identity")
        for name, value in self.identity.items():
            had = before.get(name) if isinstance(before, dict) else None
            if json.loads(json.dumps(value)) != had:
                raise ValueError(
                    f"{out} was made with {name} {_difference(had, value)}; start a new run in another folder"
                )
        try:
            self._restore(tensors, header)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"run to resume: {checkpoint} is damaged ({brief(error)})") from None
        self._cut_log()

    def _restore(self, tensors: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        self.step = integer("step", header["step"], 0, self.steps + 1)
        self.seconds, self.metrics = float(header["seconds"]), dict(header["metrics"])
        for value in self.metrics.values():
            math.isfinite(value)  # a number, or an error
        want = {f"network.{name}": tuple(value.shape) for name, value in self.network.state_dict().items()}
        for index, parameter in enumerate(self.network.parameters() if self.step else ()):
            shape = tuple(parameter.shape)
            want |= {f"optimiser.{index}.{k}": s for k, s in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape))}
        # The optimiser's kernels would read beyond the end of what is too short.
        check_shapes(want, tensors, "its tensors are not those of this run")
        states: dict[str, Any] = {"network": {}, "optimiser": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            states[part][key] = torch.from_numpy(value)
        self.network.load_state_dict(states["network"])
        state = self.optimiser.state_dict()
        state["state"] = {}
        for name, value in states["optimiser"].items():
            index, _, key = name.partition(".")
            state["state"].setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(state)

    def _cut_log(self) -> None:
        """Drops the rows that were written after the checkpoint: the resumed run writes them again."""
        path = self.out / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        steps = [line.partition(",")[0] for line in lines]
        kept = [
            line
            for line, step in zip(lines, steps, strict=True)
            if line.endswith("\n") and step.isdecimal() and int(step) <= self.step
        ]
        write_atomically(path, "".join([",".join(_COLUMNS) + "\n", *kept]).encode())


class _HeldInterrupt:
    """Holds Ctrl-C back until `check`, so that what is saved is the whole state of a step; a second one is not held."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        # Only the main thread gets signals; None is a handler that was not set from Python.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None:
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True
        self.release()

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def release(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


class _BatchStatistics:
    """Within it BatchNorm uses the batch's statistics and leaves its running ones alone."""

    def __init__(self, network: LeWM) -> None:
        self.network = network

    def __enter__(self) -> None:
        self.network.eval()
        self.kept = []
        for norm in self._norms():
            self.kept.append((norm, norm.running_mean, norm.running_var))
            norm.train()
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = None

    def __exit__(self, *_: object) -> None:
        for norm, mean, variance in self.kept:
            norm.running_mean, norm.running_var, norm.track_running_stats = mean, variance, True
        self.network.train()

    def _norms(self) -> list[torch.nn.BatchNorm1d]:
        return [m for m in self.network.modules() if isinstance(m, torch.nn.BatchNorm1d)]


def _bfloat16_is_native(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are done by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        cpu = torch.cpu
        return any(
            getattr(cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return False


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer for what comes after `step`; what a resumed run had written beyond it is taken back."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # metrics.csv holds the same numbers
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [f"{k} = {before.get(k)!r}, not {now.get(k)!r}" for k in now if before.get(k) != now.get(k)]
        return ", ".join(changed)
    return f"{before!r}, not {now!r}"
