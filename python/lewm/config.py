"""Configurations: what a model is, how it is trained, and the named presets. Plain data, no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

# One place bounds what a file from elsewhere may ask this process to allocate or to loop over.
_LARGEST = {
    "image_size": 4096,
    "encoder_depth": 256,
    "predictor_depth": 256,
    "history": 1024,
    "action_dim": 65536,
    "action_block": 4096,
    "prior_blocks": 1024,
    "prefix_blocks": 1024,
}
_LARGEST_WIDTH = 65536

# Loss terms beside the paper's two, by the names of their weights (`lewm.auxiliary`).
TERMS = (
    "inverse_dynamics",
    "reconstruction",
    "variance",
    "covariance",
    "time_similarity",
    "time_variance",
    "time_covariance",
)
TARGETS = ("online", "stop_gradient", "ema")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a LeWorldModel (paper section 3.1 and appendix D; the defaults are the paper's).

    Attributes:
        action_dim: Width of one raw action.
        image_size: Side of the square RGB picture the encoder takes, in pixels.
        patch_size: Side of a ViT patch, in pixels; divides `image_size`.
        encoder_dim, encoder_depth, encoder_heads, encoder_mlp: The ViT.
        embed_dim: Width D of a latent.
        projector_hidden: Hidden width of both BatchNorm projectors.
        predictor_dim, predictor_depth, predictor_heads, predictor_head_dim, predictor_mlp: The AdaLN transformer.
        history: Number of frames the predictor sees at most.
        action_block: Raw actions consumed by one predictor step (the paper's frame-skip).
        action_smoothed: Width of the action encoder's first layer.
        action_hidden: Width of the action encoder's hidden layer.
        dropout: Dropout of the predictor while training.
        init: How a new network starts: "official" (weights of std 0.02, random positions), or "scaled" (weights by
            their fan-in, sin-cos positions), with which a narrow encoder finds what moves in few steps.
        distance_head: Whether it has a head that estimates the time between two latents, which plans are then scored
            with (`lewm.heads`).
        action_prior: Whether it has a head that guesses the actions from one latent to another, which searches then
            start from.
        prior_blocks: Blocks that this head guesses.
        head_hidden: Hidden width of the heads.
        action_prefix: Whether the predictor takes the current latent alone (`history` is 1) and predicts in one pass
            where every prefix of the actions leads (Fast-LeWM, arXiv 2606.26217), instead of one block after the other.
        prefix_blocks: Blocks of such a pass, at most; plans that are longer go on from the last latent of a pass.
    """

    action_dim: int
    image_size: int = 224
    patch_size: int = 14
    encoder_dim: int = 192
    encoder_depth: int = 12
    encoder_heads: int = 3
    encoder_mlp: int = 768
    embed_dim: int = 192
    projector_hidden: int = 2048
    predictor_dim: int = 192
    predictor_depth: int = 6
    predictor_heads: int = 16
    predictor_head_dim: int = 64
    predictor_mlp: int = 2048
    history: int = 3
    action_block: int = 5
    action_smoothed: int = 10
    action_hidden: int = 768
    dropout: float = 0.1
    init: str = "official"
    distance_head: bool = False
    action_prior: bool = False
    prior_blocks: int = 5
    head_hidden: int = 256
    action_prefix: bool = False
    prefix_blocks: int = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("dropout", "init"):
                continue
            if field.name in ("distance_head", "action_prior", "action_prefix"):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be True or False, got {value!r}")
                continue
            most = _LARGEST.get(field.name, _LARGEST_WIDTH)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{field.name} must be an integer from 1 to {most}, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size {self.image_size}, got {self.patch_size}")
        if self.encoder_dim % self.encoder_heads:
            raise ValueError(f"encoder_heads must divide encoder_dim {self.encoder_dim}, got {self.encoder_heads}")
        if not 0 <= _number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.init not in ("official", "scaled"):
            raise ValueError(f'init must be "official" or "scaled", got {self.init!r}')
        if self.action_prefix and self.history != 1:
            raise ValueError(f"history must be 1 with action_prefix, got {self.history}")

    @property
    def block_dim(self) -> int:
        """Width A of one action block: `action_block * action_dim`."""
        return self.action_block * self.action_dim

    @property
    def positions(self) -> int:
        """Tokens that the predictor sees at most: `history` frames, or `prefix_blocks` prefixes of the actions."""
        return self.prefix_blocks if self.action_prefix else self.history


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained (the defaults are the official code's; paper section 3.2 and appendix D).

    Attributes:
        batch_size: Windows per step.
        frames: Frames per window, `action_block` raw steps apart.
        learning_rate, weight_decay: AdamW.
        sigreg_weight: The lambda of the loss, prediction + lambda * SIGReg; with 0 SIGReg is logged alone.
        directions: Random directions P of SIGReg, drawn anew every step.
        epochs: Length of the run in passes over the training windows; not used when `steps` is given.
        steps: Length of the run in optimiser steps.
        warmup: Linear warm-up, as a fraction of the run.
        schedule: Length of the cosine in runs. The paper scheduled 100 epochs and stopped after 10, so its learning
            rate hardly falls: 10. With 1 it ends at zero.
        clip: Largest gradient norm.
        inverse_dynamics, reconstruction: Weights of two further terms, 0 for none (`lewm.auxiliary`).
        variance, covariance, time_similarity, time_variance, time_covariance: Weights of PLDM's, 0 for none; its sixth
            weight is `inverse_dynamics` (`lewm.auxiliary`).
        target: What predictions are compared with: "online", the latents themselves, which get gradients from it (the
            paper's); "stop_gradient", the same without; "ema", those of a moving average of the encoder.
        ema_decay: What that average keeps of itself in a step.
        validation: Share of episodes held out.
    """

    batch_size: int = 128
    frames: int = 4
    learning_rate: float = 5e-5
    weight_decay: float = 1e-3
    sigreg_weight: float = 0.09
    directions: int = 1024
    epochs: float = 10.0
    steps: int | None = None
    warmup: float = 0.1
    schedule: float = 10.0
    clip: float = 1.0
    inverse_dynamics: float = 0.0
    reconstruction: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0
    time_similarity: float = 0.0
    time_variance: float = 0.0
    time_covariance: float = 0.0
    target: str = "online"
    ema_decay: float = 0.996
    validation: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 2), ("frames", 2), ("directions", 1), ("steps", 1)):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("learning_rate", "epochs", "schedule", "clip"):
            if not 0 < _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        for name in ("weight_decay", "sigreg_weight", *TERMS):
            if not 0 <= _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")
        if not 0 <= _number("warmup", self.warmup) < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup!r}")
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if not 0 <= _number("ema_decay", self.ema_decay) < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay!r}")
        if not 0 < _number("validation", self.validation) < 1:
            raise ValueError(f"validation must be above 0 and below 1, got {self.validation!r}")


def _number(name: str, value: Any) -> float:
    """`value`, a number that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


@dataclass(frozen=True)
class Preset:
    """A named starting point: changes to the defaults of model, training and planner, nothing else."""

    model: dict[str, Any]
    train: dict[str, Any]
    planner: dict[str, Any]


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        model={},
        train={},
        planner={"samples": 300, "iterations": 30, "elites": 30, "horizon": 5},
    ),
    # Between the two: sees enough for contact tasks, trains on a CPU in a quarter of an hour.
    "small": Preset(
        model={
            "image_size": 64,
            "patch_size": 8,
            "encoder_dim": 64,
            "encoder_depth": 2,
            "encoder_heads": 2,
            "encoder_mlp": 256,
            "embed_dim": 128,
            "projector_hidden": 512,
            "predictor_dim": 128,
            "predictor_depth": 2,
            "predictor_heads": 4,
            "predictor_head_dim": 32,
            "predictor_mlp": 512,
            "action_hidden": 256,
            "dropout": 0.0,
            "init": "scaled",
            "head_hidden": 128,
        },
        train={
            "batch_size": 128,
            "learning_rate": 1e-3,
            "sigreg_weight": 0.03,
            "directions": 512,
            "steps": 5000,
            "warmup": 0.05,
            "schedule": 1.0,
        },
        planner={"samples": 300, "iterations": 10, "elites": 30, "horizon": 5},
    ),
    # A patch must be small beside what moves: with 16-pixel patches the same run solves 40 % instead of 99 %.
    "tiny": Preset(
        model={
            "image_size": 64,
            "patch_size": 8,
            "encoder_dim": 64,
            "encoder_depth": 2,
            "encoder_heads": 2,
            "encoder_mlp": 256,
            "embed_dim": 32,
            "projector_hidden": 256,
            "predictor_dim": 96,
            "predictor_depth": 2,
            "predictor_heads": 4,
            "predictor_head_dim": 32,
            "predictor_mlp": 384,
            "history": 1,
            "action_hidden": 128,
            "dropout": 0.0,
            "init": "scaled",
            "head_hidden": 128,
        },
        train={
            "batch_size": 64,
            "learning_rate": 1e-3,
            "sigreg_weight": 0.02,
            "directions": 256,
            "steps": 1000,
            "warmup": 0.05,
            "schedule": 1.0,
        },
        planner={"samples": 100, "iterations": 10, "elites": 10, "horizon": 5},
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: No such preset; the text lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def configure(preset: str, action_dim: int, overrides: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """Both configurations of `preset` with `overrides` (any field of either, by name) applied.

    Raises:
        TypeError: An override that is a field of neither.
        ValueError: A value out of its domain, or no such preset.
    """
    base = preset_named(preset)
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"action_dim"}
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(overrides) - model_fields - train_fields)
    if unknown:
        known = ", ".join(sorted(model_fields | train_fields))
        raise TypeError(f"{unknown[0]!r} is no setting of model or training; the settings are {known}")
    train = {**base.train, **{k: v for k, v in overrides.items() if k in train_fields}}
    if "epochs" in overrides and "steps" not in overrides:
        train["steps"] = None  # the preset's length gives way to the one asked for
    model = {**base.model, **{k: v for k, v in overrides.items() if k in model_fields}}
    return ModelConfig(action_dim=action_dim, **model), TrainConfig(**train)
