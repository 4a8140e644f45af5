"""`lewm.train`: two loss terms, end to end from pixels (paper section 3), exactly resumable.

On CUDA the host never waits for the device within a step: batches are copied ahead on a stream of their own, dropout is
keyed on the host, and what is measured stays on the device until it is logged.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from lewm import __version__, diagnostics, envs
from lewm.auxiliary import Auxiliary, Average
from lewm.checks import integer
from lewm.config import ModelConfig, TrainConfig, configure, preset_named
from lewm.data import Dataset
from lewm.heads import FRAMES, HEADS, Episodes, train_heads
from lewm.loader import Batch, Loader
from lewm.losses import Directions, prediction_loss, sigreg
from lewm.model import Model
from lewm.model_file import brief, check_shapes, checked_stats, read_tensors, write_atomically, write_tensors
from lewm.monitor import calibrate
from lewm.network import LeWM
from lewm.pixels import resize_area
from lewm.torch_backend import device_of

if TYPE_CHECKING:
    from lewm.profile import Profile

_LOG_EVERY = 20
_PRECISE_BATCHES = 100
_PROBE_FRAMES = 2000
_COMPILER = "inductor"
_ORIGIN = ("env_id", "env_kwargs", "seed", "policy")  # of the store's metadata, what the model's file repeats
_COLUMNS = (
    "step",
    "loss",
    "prediction",
    "sigreg",
    "sigreg_per_sample",
    "embedding_std",
    "effective_rank",
    "straightness",
    "learning_rate",
    "gradient_norm",
    "validation_prediction",
    "probe_r2",
    "distance_correlation",
    "seconds",
)


class CollapseWarning(UserWarning):
    """The latents are collapsing to a point or to a few directions; what is learnt will not plan."""


@overload
def train(
    data: Dataset | str | os.PathLike[str],
    *,
    preset: str = ...,
    out: str | os.PathLike[str] | None = ...,
    seed: int = ...,
    resume: bool = ...,
    device: str | None = ...,
    compile: bool | None = ...,
    profile: Literal[False] = ...,
    checkpoint_every: int = ...,
    progress: Callable[[int, int, dict[str, float]], None] | None = ...,
    **overrides: Any,
) -> Model: ...


@overload
def train(data: Dataset | str | os.PathLike[str], *, profile: Literal[True], **settings: Any) -> Profile: ...


def train(
    data: Dataset | str | os.PathLike[str],
    *,
    preset: str = "paper",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str | None = None,
    compile: bool | None = None,
    profile: bool = False,
    checkpoint_every: int = 200,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    **overrides: Any,
) -> Model | Profile:
    """Trains a LeWorldModel on a trajectory store: prediction + lambda * SIGReg, no stop-gradient, no EMA.

    The run folder `out` gets `metrics.csv`, TensorBoard events, `checkpoint.safetensors` (every `checkpoint_every`
    steps, at the end, and on Ctrl-C), `model.safetensors`, and `heads.csv` if the model has heads (`lewm.heads`). A run
    is a function of (data, configuration, seed): one that was interrupted and resumed has the losses of one that was
    not, bit for bit on the same machine and thread count (on a GPU up to the order in which its own kernels add, unless
    torch's deterministic mode is on).

    The model's file also holds how surprising the held-out episodes are to it (`lewm.calibrate`), for
    `lewm.Controller(..., monitor=True)`.

    Args:
        data: A store or its path. Frames of another size than the preset's are area-resized.
        preset: "paper", "small" or "tiny".
        out: Run folder; `runs/<preset>-<seed>` when not given. It must be new or empty, unless `resume`.
        seed: Of everything random.
        resume: Continue the run in `out`, with the same data and settings.
        device: A torch device; CUDA where there is one, else the CPU, when not given.
        compile: Whether `torch.compile` makes the kernels of encoder and predictor, which takes up to a few minutes
            before the first step; on CUDA when not given. Where it fails, a warning says why and training goes on
            without.
        profile: Time some steps of this run instead of making it: see `lewm.profile.Profile`. Nothing is written.
        checkpoint_every: Steps between checkpoints.
        progress: Called after every step with (steps done, steps in all, latest metrics).
        **overrides: Any field of `TrainConfig` or `ModelConfig`, by name: `steps=300`, `history=3`.

    Returns:
        The trained model, also saved as `out/model.safetensors`; with `profile`, where a step's time goes.

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
    if profile and resume:
        raise ValueError("resume must be False with profile, which makes no run; got True")
    run = _Run(data, preset, model_config, train_config, seed, device, compile)
    if profile:
        from lewm.profile import profiled

        return profiled(run)
    run.open(Path(out or f"runs/{preset}-{seed}"), resume)
    return run.train(checkpoint_every, progress)


def _encode(network: LeWM | Average, frames: Tensor) -> Tensor:
    """Latents (B, T, D)."""
    return network.encode(frames)


def _predict(network: LeWM, z: Tensor, actions: Tensor, compared: Tensor) -> Tensor:
    """The prediction loss, teacher-forced (paper Eq. 1), against the latents (B, T, D) in `compared`."""
    history = network.config.history
    embedded = network.action_encoder(actions)
    if network.config.action_prefix:
        return _prefix_loss(network, z, embedded, compared)
    # Every run of `history` frames predicts each frame that follows one of its own.
    context, condition, target = (
        t.unfold(1, history, 1).transpose(2, 3).flatten(0, 1) for t in (z[:, :-1], embedded, compared[:, 1:])
    )
    return prediction_loss(network.predict(context, condition).float(), target.float())


def _prefix_loss(network: LeWM, z: Tensor, embedded: Tensor, compared: Tensor) -> Tensor:
    """The same of an action-prefix model: from every frame all that follow, up to `prefix_blocks` ahead."""
    starts, blocks = embedded.shape[1], network.config.prefix_blocks
    # Near the end of a window prefixes are filled up, which no causal prediction of the others sees.
    condition = torch.nn.functional.pad(embedded, (0, 0, 0, blocks - 1)).unfold(1, blocks, 1).transpose(2, 3)
    context = z[:, :-1, None].expand_as(condition)
    tokens = network.predictor(context.flatten(0, 1), condition.flatten(0, 1)).unflatten(0, (-1, starts))
    ahead = [min(blocks, starts - t) for t in range(starts)]
    # Only what is compared enters the statistics of the BatchNorm.
    predicted = network.pred_proj(torch.cat([tokens[:, t, :n] for t, n in enumerate(ahead)], 1))
    target = torch.cat([compared[:, t + 1 : t + 1 + n] for t, n in enumerate(ahead)], 1)
    return prediction_loss(predicted.float(), target.float())


class _Run:
    """One training run: data order, network, optimiser, logs, checkpoints.

    Attributes:
        clock: Called with the name of each part of a step when the host has issued it; set by a profile.
    """

    out: Path

    def __init__(
        self,
        data: Dataset,
        preset: str,
        model_config: ModelConfig,
        config: TrainConfig,
        seed: int = 0,
        device: str | None = None,
        compile: bool | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
        if data.height != data.width:
            raise ValueError(f"data must hold square frames, got {data.height}x{data.width}")
        if config.frames <= model_config.positions:
            seen = "prefix_blocks" if model_config.action_prefix else "history"  # all positions are trained
            raise ValueError(f"frames must exceed {seen} {model_config.positions}, got {config.frames}")
        if compile not in (None, False, True):
            raise ValueError(f"compile must be True, False or None, got {compile!r}")
        self.data, self.preset, self.seed = data, preset, seed
        self.model_config, self.config = model_config, config
        self.device = device_of(device)
        self.clock: Callable[[str], None] | None = None
        self.train_episodes, self.validation_episodes = data.split(config.validation, seed)
        self.stats = checked_stats(data.action_statistics(self.train_episodes), data.action_dim)
        self._mean, self._std = (
            torch.from_numpy(np.tile(self.stats[name], model_config.action_block)) for name in ("mean", "std")
        )
        self._upload = _Upload(self.device)
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
        with _keyed(torch.default_generator, seed):
            self.network = LeWM(model_config)
            self.auxiliary = Auxiliary(model_config, config)
        self.network.to(self.device)
        self.auxiliary.to(self.device)
        # What has no parameters leaves nothing in a checkpoint.
        self.average = Average(self.network) if config.target == "ema" else torch.nn.Module()
        # Heads are trained when the rest is done (`_train_heads`).
        self._trained = [p for name, p in self.network.named_parameters() if not name.startswith(HEADS)]
        self._trained += self.auxiliary.parameters()
        self.optimiser = torch.optim.AdamW(
            self._trained,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.amp = _bfloat16_is_native(self.device)
        self._parts: tuple[Callable[..., Tensor], Callable[..., Tensor]] = (_encode, _predict)
        self.compiled = self._compile() if (self.device.type == "cuda" if compile is None else compile) else False

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
                checkpoint = self.step % checkpoint_every == 0 or last
                if checkpoint:
                    losses.update(self._inspect())
                if self.step % _LOG_EVERY == 0 or self.step == 1 or checkpoint:
                    self._log(losses, writer)
                if checkpoint:
                    self._save()
                try:
                    if progress:
                        progress(self.step, self.steps, self.metrics)
                    interrupt.check()
                except KeyboardInterrupt:
                    self._check(losses)
                    self._save()
                    raise
        finally:
            interrupt.release()
            batches.close()
            if writer:
                writer.close()
        self._precise_batchnorm()
        self._train_heads()
        model = self._model()
        # Held-out episodes without a whole block, or a model that has collapsed, leave nothing to compare with.
        with contextlib.suppress(ValueError):
            normal = calibrate(model, self.data, episodes=self.validation_episodes, seed=self.seed)
            model.meta["training"]["surprise"] = normal.to_dict()
        model.save(self.out / "model.safetensors")
        return model

    def _step(self, frames: Tensor, actions: Tensor) -> dict[str, Any]:
        """One optimiser step; keyed by (seed, step) alone, so that it does not matter what ran before it.

        What it returns is on the device, where it may be in work yet: reading a value waits for the step.
        """
        self.network.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self._mark("host")
        losses = self._gradients(frames, actions)
        losses["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self._trained, self.config.clip).detach()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if isinstance(self.average, Average):
            self.average.follow(self.network, self.config.ema_decay)
        self._mark("optimiser")
        return losses

    def _gradients(self, frames: Tensor, actions: Tensor) -> dict[str, Any]:
        """Forward and backward."""
        config = self.config
        with _keyed(_generator(self.device), (self.seed * 0x9E3779B97F4A7C15 + self.step) % 2**63):  # dropout
            z, prediction = self._losses(frames, actions)
        with torch.set_grad_enabled(config.sigreg_weight > 0):  # else it is there to be looked at
            regulariser = sigreg(z.transpose(0, 1), Directions(config.directions, self.seed, self.step))
        loss = prediction + config.sigreg_weight * regulariser
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            further = self.auxiliary(z, frames, actions)
        for name, term in further.items():
            loss = loss + self.auxiliary.weights[name] * term
        self._mark("sigreg")
        loss.backward()
        self._mark("encoder backward")
        return {
            "loss": loss.detach(),
            "prediction": prediction.detach(),
            "sigreg": regulariser.detach(),
            **{name: term.detach() for name, term in further.items()},
            "z": z.detach(),
        }

    def _losses(self, frames: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, T, D) in float32 and the prediction loss."""
        # Compiled for training alone: other modes and shapes would be compiled anew.
        encode, predict = self._parts if self.network.training else (_encode, _predict)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            z = encode(self.network, frames)
            if self.clock and z.requires_grad:
                z.register_hook(lambda _: self._mark("predictor and sigreg backward"))
            self._mark("encoder")
            prediction = predict(self.network, z, actions, self._compared(z, frames, encode))
            self._mark("predictor")
        return z.float(), prediction

    def _compared(self, z: Tensor, frames: Tensor, encode: Callable[..., Tensor]) -> Tensor:
        """What predictions are compared with; outside of training the latents themselves: a model plans with those."""
        if self.config.target == "online" or not self.network.training:
            return z
        if self.config.target == "stop_gradient":
            return z.detach()
        with torch.no_grad():
            return encode(self.average, frames)

    def _mark(self, part: str) -> None:
        if self.clock:
            self.clock(part)

    def _compile(self) -> bool:
        """Compiles encoder and predictor by a step on blank data that leaves nothing behind; False: it cannot be."""
        model, config = self.model_config, self.config
        side = model.image_size
        buffers = [(buffer, buffer.clone()) for part in (self.network, self.average) for buffer in part.buffers()]
        try:
            # Functions, not modules: the names in the state dict stay.
            self._parts = tuple(
                torch.compile(part, fullgraph=True, dynamic=False, backend=_COMPILER) for part in (_encode, _predict)
            )
            frames = torch.zeros(config.batch_size, config.frames, side, side, 3, dtype=torch.uint8, device=self.device)
            actions = torch.zeros(config.batch_size, config.frames - 1, model.block_dim, device=self.device)
            self.network.train()
            self._gradients(frames, actions)
        except Exception as error:  # whatever a compiler on a machine we do not know raises
            self._parts = (_encode, _predict)
            text = f"training goes on without torch.compile, which failed: {type(error).__name__}: {brief(error)}"
            warnings.warn(text, stacklevel=2)
            return False
        finally:
            self.optimiser.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)
        return True

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
            transform=lambda batch: self._upload.send(*self._prepared(batch)),
        )

    def _batches(self, step: int, end: int | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches from `step` on: every epoch is a permutation keyed by (seed, epoch), its remainder dropped."""
        end = self.steps if end is None else end
        self.loader.set_epoch(*divmod(step, len(self.loader)))
        while step < end:
            for sent in self.loader:
                self._mark("data")
                batch = self._upload.receive(sent)
                self._mark("copy")
                yield batch
                step += 1
                if step == end:
                    break

    def _read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = self.data.batch(windows, self.config.frames, self.model_config.action_block)
        frames, actions = self._prepared(Batch(*map(torch.from_numpy, batch)))
        return frames.to(self.device), actions.to(self.device)

    def _prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frames of the model's size, uint8 (the network normalises them), and normalised actions."""
        return self._resized(batch.frames), ((batch.actions - self._mean) / self._std).float()

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
            fit, test = self._factors(y_fit), self._factors(y_test)
            scores = {name: diagnostics.probe_r2(z_fit, fit[name], z_test, test[name]) for name in fit}
            found["probe_r2"] = float(np.mean(list(scores.values())))
            if len(scores) > 1:
                found |= {f"probe_{name}": score for name, score in scores.items()}
                y_test = np.concatenate([y / (np.sqrt(y.var(0).sum()) + 1e-12) for y in test.values()], axis=1)
            found["distance_correlation"] = diagnostics.distance_correlation(z_test, y_test, rng)
        return found

    def _factors(self, states: np.ndarray) -> dict[str, np.ndarray]:
        return envs.factors(self.data.metadata.get("env_id"), states)

    def _columns(self) -> tuple[str, ...]:
        """Of `metrics.csv`: with a probe for each thing that a model of this environment should know."""
        factors = self._factors(np.zeros((1, self.data.columns["state"]))) if "state" in self.data.columns else {}
        return (*_COLUMNS, *self.auxiliary.weights, *(f"probe_{name}" for name in factors if len(factors) > 1))

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
        self._check(losses)
        row = {name: float(value) for name, value in losses.items() if name != "z"}
        windows = losses["z"].float().cpu().numpy()
        z = windows.reshape(-1, windows.shape[-1])
        row.update(
            step=self.step,
            sigreg_per_sample=row["sigreg"] / self.config.batch_size,
            embedding_std=float(z.std(0).mean()),
            effective_rank=diagnostics.effective_rank(z),
            straightness=diagnostics.straightness(windows),
            learning_rate=self._learning_rate(self.step - 1),
            seconds=round(self.seconds, 3),
        )
        self.metrics.update(row)
        with (self.out / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, self._columns(), restval="", lineterminator="\n").writerow(row)
        if writer:
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    writer.add_scalar(name, value, self.step)
        self._warn_of_collapse(row)

    def _check(self, losses: dict[str, Any]) -> None:
        loss, norm = float(losses["loss"]), float(losses["gradient_norm"])
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"at step {self.step} the loss is {loss} and the gradient's norm {norm}: "
                f"lower learning_rate (now {self.config.learning_rate:g}); the last checkpoint in {self.out} is intact"
            )

    def _warn_of_collapse(self, row: dict[str, float]) -> None:
        """Once per run."""
        config = self.config
        if self.step < diagnostics.collapse_grace(config.warmup, self.steps) or self.metrics.get("warned"):
            return
        sigreg = row["sigreg_per_sample"] if config.sigreg_weight > 0 else None
        if diagnostics.collapsing(sigreg, row["embedding_std"], row["effective_rank"]):
            self.metrics["warned"] = 1.0
            advice = f"Raise sigreg_weight, now {config.sigreg_weight:g}."
            if config.sigreg_weight == 0 and (config.variance or config.covariance):
                advice = f"Raise variance, now {config.variance:g}, or covariance, now {config.covariance:g}."
            elif config.sigreg_weight == 0:
                advice = "Raise sigreg_weight, now 0: no term keeps latents apart."
            warnings.warn(
                f"step {self.step}: the latents are collapsing: sigreg / batch {row['sigreg_per_sample']:.3f} "
                f"(0.402 is a single point), embedding std {row['embedding_std']:.3f}, effective rank "
                f"{row['effective_rank']:.1f} of {self.model_config.embed_dim}. {advice}",
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
        for sent in islice(self.loader, _PRECISE_BATCHES):
            self._losses(*self._upload.receive(sent))
        for norm in norms:
            norm.momentum = 0.1
        self.network.eval()

    def _train_heads(self) -> None:
        """Trains the heads that the model has on its final latents: seconds, so a resumed run simply does it again."""
        if not any(hasattr(self.network, head) for head in HEADS):
            return
        rng = np.random.default_rng((self.seed, 2))
        train, held_out = (self._head_data(e, rng) for e in (self.train_episodes, self.validation_episodes))
        if train is None:
            raise ValueError("data must have a training episode of at least 2 frames for a head to learn from")
        self.metrics.update(train_heads(self.network, train, held_out, self.seed, self.out / "heads.csv"))

    @torch.no_grad()
    def _head_data(self, episodes: np.ndarray, rng: np.random.Generator) -> Episodes | None:
        """Latents and actions of whole episodes, in random order up to `FRAMES` frames; None if none has two."""
        latents: list[Tensor] = []
        actions: list[Tensor] = []
        frames = 0
        for episode in rng.permutation(episodes):
            length = int(self.data.lengths[episode])
            if length < 2 or (latents and frames + length > FRAMES):
                continue
            parts = torch.arange(length).split(512)
            pictures = (torch.from_numpy(self._resized(self.data.frames(episode, part.numpy()))) for part in parts)
            latents.append(torch.cat([self.network.encode(p.to(self.device)) for p in pictures]).float())
            raw = (self.data.actions(episode) - self.stats["mean"]) / self.stats["std"]
            actions.append(torch.from_numpy(raw.astype(np.float32)))
            frames += length
        return Episodes(latents, actions, self.model_config.action_block) if latents else None

    def _model(self) -> Model:
        metrics = {k: v for k, v in self.metrics.items() if k != "warned" and math.isfinite(v)}
        meta = {
            "preset": self.preset,
            "planner": preset_named(self.preset).planner,
            "data": {
                "fingerprint": self.identity["fingerprint"],
                "episodes": len(self.data),
                **{k: self.data.metadata[k] for k in _ORIGIN if k in self.data.metadata},
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
                "compiled": self.compiled,
            },
        }
        device = None if self.device.type == "cpu" else str(self.device)
        return Model(self.model_config, self.network.state_dict(), stats=self.stats, meta=meta, device=device)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of all networks, by their names in a checkpoint."""
        for part in ("network", "auxiliary", "average"):
            module: torch.nn.Module = getattr(self, part)
            for name, value in module.state_dict().items():
                yield f"{part}.{name}", value

    def _save(self) -> None:
        """The whole state of the run, in one file that is replaced at once."""
        tensors = dict(self._state())
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{index}.{name}": value for name, value in state.items()})
        header = {"identity": self.identity, "step": self.step, "seconds": self.seconds, "metrics": self.metrics}
        write_tensors(
            self.out / "checkpoint.safetensors", {k: v.detach().cpu().numpy() for k, v in tensors.items()}, header
        )

    def open(self, out: Path, resume: bool = False) -> None:
        """Begins a run in the folder, or goes on with the one there."""
        self.out, checkpoint = out, out / "checkpoint.safetensors"
        if not resume:
            if out.is_dir() and any(out.iterdir()):
                raise ValueError(f"out must be a new or empty folder, or resume must be set; {out} holds files")
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / "config.json", json.dumps(self.identity, indent=1).encode())
            with (out / "metrics.csv").open("w", newline="") as file:
                csv.DictWriter(file, self._columns(), lineterminator="\n").writeheader()
            self._save()  # from now on the run can be resumed, whatever ends it
            return
        tensors, header = read_tensors(checkpoint, "run to resume")
        before = header.get("identity")
        for name, value in self.identity.items():
            had = before.get(name) if isinstance(before, dict) else None
            if name == "train" and isinstance(had, dict):  # a setting that was not there yet was off
                had = {**dataclasses.asdict(TrainConfig()), **had}
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
        want = {name: tuple(value.shape) for name, value in self._state()}
        for index, parameter in enumerate(self._trained if self.step else ()):
            shape = tuple(parameter.shape)
            want |= {f"optimiser.{index}.{k}": s for k, s in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape))}
        # The optimiser's kernels would read beyond the end of what is too short.
        check_shapes(want, tensors, "its tensors are not those of this run")
        states: dict[str, Any] = {"network": {}, "auxiliary": {}, "average": {}, "optimiser": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            states[part][key] = torch.from_numpy(value)
        for part in ("network", "auxiliary", "average"):
            getattr(self, part).load_state_dict(states[part])
        state = self.optimiser.state_dict()
        state["state"] = {}
        for name, value in states["optimiser"].items():
            index, _, key = name.partition(".")
            state["state"].setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(state)

    def _cut_log(self) -> None:
        """Drops the rows that were written after the checkpoint: the resumed run writes them again."""
        path = self.out / "metrics.csv"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        steps = [line.partition(",")[0] for line in lines]
        kept = [
            line
            for line, step in zip(lines, steps, strict=True)
            if line.endswith("\n") and step.isdecimal() and int(step) <= self.step
        ]
        write_atomically(path, "".join([",".join(self._columns()) + "\n", *kept]).encode())


class _Upload:
    """Batches on their way to the device: on CUDA on a stream of their own, while the steps before compute."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Copies to the device and what to wait for; called in the loader's thread, which it does not hold up.

        The host's side needs no care: torch gives page-locked memory out again only after the copies from it.
        """
        if self.stream is None:
            return tuple(tensor.to(self.device) for tensor in tensors), None
        with torch.cuda.stream(self.stream):
            there = tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors)
            return there, self.stream.record_event()

    def receive(self, sent: tuple[tuple[Tensor, ...], Any]) -> tuple[Tensor, ...]:
        """The copies, for the stream of the calling thread: the device waits for them, the host does not."""
        tensors, arrived = sent
        if arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            for tensor in tensors:
                # They were allocated on the other stream, which must not write there again before this one is done.
                tensor.record_stream(stream)
        return tensors


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


@contextlib.contextmanager
def _keyed(generator: torch.Generator, key: int) -> Iterator[None]:
    """Within it the generator is seeded with `key`; after it, it is as it was.

    A generator's state is the host's, also on CUDA: nothing waits. (`torch.manual_seed` would reseed every device.)
    """
    before = generator.get_state()
    generator.manual_seed(key)
    try:
        yield
    finally:
        generator.set_state(before)


def _generator(device: torch.device) -> torch.Generator:
    """The one that dropout draws from on this device."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = getattr(torch, device.type)  # cuda, xpu
    return module.default_generators[module.current_device() if device.index is None else device.index]


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
