"""A model as a policy of LeRobot: their loops call `select_action`, a `lewm.Controller` answers.

Their policies train on demonstrations and are told nothing at run time but a task in words. This one plans towards a
goal picture, which `set_goal` gives, or the batch itself as a further camera. It takes observations as they are and
gives actions in raw units: the processors of their loops must not normalise, `processors()` makes such ones.

Importing this module imports torch. Where lerobot is installed too (0.4 or newer), the policy is a `PreTrainedPolicy`,
which their evaluation asks for; elsewhere it is a torch module with the same methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lewm
from lewm.controller import Controller

__all__ = ["LeWMConfig", "LeWMPolicy", "processors"]

_GOAL = "observation.images.goal"

_Policy: Any
try:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
except ModuleNotFoundError as missing:
    if (missing.name or "").split(".")[0] != "lerobot":
        raise

    _Policy = torch.nn.Module

    @dataclass
    class LeWMConfig:
        """What LeRobot's loops read of a policy's configuration."""

        device: str = "cpu"
        use_amp: bool = False

else:
    _Policy = PreTrainedPolicy

    @PreTrainedConfig.register_subclass("lewm")
    @dataclass
    class LeWMConfig(PreTrainedConfig):  # type: ignore[no-redef]
        """What LeRobot's loops read of a policy's configuration. What makes the model is in the model's own file."""

        device: str | None = "cpu"  # where pictures are wanted: the controller takes them as arrays

        @property
        def observation_delta_indices(self) -> None:
            """None: the controller keeps what it needs of the past."""

        @property
        def action_delta_indices(self) -> None:
            """None, for this policy is not trained by LeRobot."""

        @property
        def reward_delta_indices(self) -> None:
            """None, as above."""

        def get_optimizer_preset(self) -> Any:
            """Raises NotImplementedError: `lewm.train` trains."""
            raise NotImplementedError(_UNTRAINED)

        def get_scheduler_preset(self) -> None:
            """None, as above."""

        def validate_features(self) -> None:
            """Nothing to check: what a batch holds is checked when it comes."""


_UNTRAINED = "a lewm model is trained by lewm.train, not by LeRobot"


class LeWMPolicy(_Policy):
    """Plans for LeRobot: a batch of camera pictures in, a batch of raw actions out.

    The B rows of a batch are B environments in lockstep. One controller plans for all of them; a row gets the noise of
    its own number, so that it is controlled as it would be alone, but for rounding. The number of rows may change at a
    `reset`. Rows that LeRobot plays on after their episode has ended, and ignores, do no harm to the others.

    Args:
        model: A `lewm.Model` with action statistics.
        goal: See `set_goal`.
        camera: Key of the pictures in a batch, as "observation.images.top". None: the only key that begins with
            "observation.image", the goal's set aside.
        goal_camera: Key of goal pictures in a batch.
        **settings: Those of `lewm.Controller`: planner, execute, deadline_ms, seed, env_id, warm_start, shrink.

    Attributes:
        model: As given. It stays where it was loaded: `to`, `half` and the like change nothing.
        config: `device` and `use_amp`, which LeRobot's loops look at.
        plan: The last `lewm.Plan` of `select_action`, None before the first.

    Raises:
        TypeError, ValueError: As `lewm.Controller`.
    """

    config_class = LeWMConfig
    name = "lewm"

    def __init__(
        self, model: Any, goal: Any = None, *, camera: str | None = None, goal_camera: str = _GOAL, **settings: Any
    ) -> None:
        super().__init__(*([] if _Policy is torch.nn.Module else [LeWMConfig()]))
        self.config: Any = LeWMConfig()
        model.require_stats()
        self.model = model
        self.camera = camera
        self.goal_camera = goal_camera
        self._controller = Controller(model, np.zeros(model.config.embed_dim, np.float32), **settings)
        self.set_goal(goal)

    @property
    def plan(self) -> Any:
        """The last `lewm.Plan` that `select_action` made, None before the first."""
        return self._controller.plan

    def set_goal(self, goal: Any) -> None:
        """Steers to this goal from the next action on, and forgets the episode so far.

        Args:
            goal: A picture (H, W, 3) uint8, latents, or one of either per row, as in `lewm.plan`. None: the goal is
                what the batch holds under `goal_camera` at the first action after each `reset`.
        """
        self._goal = goal
        self.reset()

    def reset(self) -> None:
        """Forgets the episode, not the goal: LeRobot calls it before each."""
        self._steered = False
        self._chunks = 0

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next raw action of every row.

        Args:
            batch: Holds pictures under `camera`: (B, 3, H, W) of float numbers in [0, 1], as LeRobot makes them, or
                uint8. What else it holds is not looked at.
            **kwargs: LeRobot's other policies have some; none is used.

        Returns:
            (B, A_raw) float32 on the pictures' device.

        Raises:
            ValueError: There is no goal, or no picture, or one that is not as described; or B changed without a reset.
        """
        frames, device = self._camera(batch)
        if not self._steered:
            self._controller.reset(self._goal_of(batch))
            self._steered = True
        return torch.as_tensor(self._controller(frames), dtype=torch.float32, device=device)

    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """A whole plan from these pictures alone: neither used by `select_action` nor changing what that does next.

        Returns:
            (B, H * action_block, A_raw) float32 raw actions in order of execution, on the pictures' device.

        Raises:
            ValueError: As `select_action`.
        """
        frames, device = self._camera(batch)
        controller = self._controller
        found = lewm.plan(
            frames,
            self._goal_of(batch),
            model=self.model,
            planner=controller.planner,
            seed=controller.seed,
            env_ids=controller._env_ids(len(frames)),
            plan_index=self._chunks,
            deadline_ms=controller.deadline_ms,
        )
        self._chunks += 1
        return torch.as_tensor(found.actions, dtype=torch.float32, device=device)

    def forward(self, batch: dict[str, Any]) -> Any:
        """Raises NotImplementedError: `lewm.train` trains."""
        raise NotImplementedError(_UNTRAINED)

    def get_optim_params(self) -> Any:
        """Raises NotImplementedError: `lewm.train` trains."""
        raise NotImplementedError(_UNTRAINED)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.config._save_pretrained(save_directory)
        self.model.save(save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: Any, *, revision: str | None = None, **settings: Any
    ) -> LeWMPolicy:
        """The policy of a model: whatever `lewm.load` reads, a folder of `save_pretrained` for example.

        Args:
            pretrained_name_or_path: File, folder, or "owner/name" on the Hugging Face Hub.
            revision: See `lewm.load`.
            **settings: As of the class.
        """
        return cls(lewm.load(pretrained_name_or_path, revision=revision), **settings)

    def _camera(self, batch: dict[str, Any]) -> tuple[np.ndarray, torch.device]:
        """(B, H, W, 3) uint8 pictures of now, and the device that they came on."""
        key = self.camera
        if key is None:
            keys = [name for name in batch if name.startswith("observation.image") and name != self.goal_camera]
            if len(keys) != 1:
                found = f"several cameras: {', '.join(keys)}" if keys else "no key that begins with observation.image"
                raise ValueError(f"camera must name the pictures to plan with, for the batch holds {found}")
            key = keys[0]
        if key not in batch:
            raise ValueError(f"the batch holds no {key}, which camera names; it holds {', '.join(map(str, batch))}")
        return _frames(batch[key], key), batch[key].device

    def _goal_of(self, batch: dict[str, Any]) -> Any:
        if self._goal is not None:
            return self._goal
        if self.goal_camera not in batch:
            raise ValueError(f"there is no goal: call set_goal, or have the batch hold pictures as {self.goal_camera}")
        return _frames(batch[self.goal_camera], self.goal_camera)


def processors() -> tuple[Any, Any]:
    """LeRobot's pre- and postprocessor for this policy, which leave observations and actions as they are.

    Raises:
        ModuleNotFoundError: lerobot is not installed.
    """
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

    post = {"to_transition": policy_action_to_transition, "to_output": transition_to_policy_action}
    return PolicyProcessorPipeline(steps=[]), PolicyProcessorPipeline(steps=[], **post)


def _frames(pictures: Any, name: str) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8: the very levels that were divided by 255."""
    shape = tuple(getattr(pictures, "shape", ()))
    if not isinstance(pictures, Tensor) or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"{name} must be a tensor (B, 3, H, W), got {type(pictures).__name__} of shape {shape}")
    if pictures.is_floating_point():
        levels = (pictures * 255).round()
        # Also false for NaN. A normalised picture has values below 0.
        if not bool(((levels >= 0) & (levels <= 255)).all()):
            low, high = (float(level) for level in pictures.aminmax())
            raise ValueError(
                f"{name} must be in [0, 1], got values from {low:g} to {high:g}: the policy takes pictures as they "
                "are, so use processors that do not normalise (lewm.lerobot.processors)"
            )
        pictures = levels.to(torch.uint8)
    elif pictures.dtype != torch.uint8:
        raise ValueError(f"{name} must be of floating point or uint8, got {pictures.dtype}")
    return np.ascontiguousarray(pictures.permute(0, 2, 3, 1).cpu().numpy())
