"""lewm-fast: LeWorldModel with a Rust core and Triton kernels. Train from pixels, plan inside a control loop.

Importing this module imports neither torch nor triton: every name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lewm import envs
from lewm._core import StoreError, StoreWriter, __version__

if TYPE_CHECKING:
    from lewm.camera import Camera, StaleFrame
    from lewm.collector import collect
    from lewm.config import PRESETS, ModelConfig, TrainConfig
    from lewm.controller import Controller
    from lewm.conversion import convert
    from lewm.data import Dataset
    from lewm.decoder import Decoder, load_decoder, train_decoder
    from lewm.evaluation import PLANNERS, PROTOCOLS, evaluate
    from lewm.expectation import surprise, voe
    from lewm.imagination import draw_fan, draw_imagination, imagine, imagine_episodes
    from lewm.model import Model, load, use
    from lewm.monitor import Calibration, calibrate
    from lewm.page import report
    from lewm.planner import CEM, ICEM, MPPI, Plan, plan
    from lewm.probes import ProbeResult, probe
    from lewm.recipes import RECIPES, recipe
    from lewm.replay import ReplayBuffer
    from lewm.results import compare
    from lewm.systems import SYSTEMS, bench_systems
    from lewm.trainer import train
    from lewm.tuning import Tuning, sweep_lambda, tune_lambda

_HOME = {
    "Camera": "camera",
    "StaleFrame": "camera",
    "collect": "collector",
    "PRESETS": "config",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "Controller": "controller",
    "convert": "conversion",
    "Dataset": "data",
    "Decoder": "decoder",
    "load_decoder": "decoder",
    "train_decoder": "decoder",
    "PLANNERS": "evaluation",
    "PROTOCOLS": "evaluation",
    "evaluate": "evaluation",
    "surprise": "expectation",
    "voe": "expectation",
    "draw_fan": "imagination",
    "draw_imagination": "imagination",
    "imagine": "imagination",
    "imagine_episodes": "imagination",
    "Model": "model",
    "load": "model",
    "use": "model",
    "report": "page",
    "Calibration": "monitor",
    "calibrate": "monitor",
    "CEM": "planner",
    "ICEM": "planner",
    "MPPI": "planner",
    "Plan": "planner",
    "plan": "planner",
    "ProbeResult": "probes",
    "probe": "probes",
    "RECIPES": "recipes",
    "recipe": "recipes",
    "ReplayBuffer": "replay",
    "compare": "results",
    "SYSTEMS": "systems",
    "bench_systems": "systems",
    "train": "trainer",
    "Tuning": "tuning",
    "sweep_lambda": "tuning",
    "tune_lambda": "tuning",
}

__all__ = [
    "CEM",
    "ICEM",
    "MPPI",
    "PLANNERS",
    "PRESETS",
    "PROTOCOLS",
    "RECIPES",
    "SYSTEMS",
    "Calibration",
    "Camera",
    "Controller",
    "Dataset",
    "Decoder",
    "Model",
    "ModelConfig",
    "Plan",
    "ProbeResult",
    "ReplayBuffer",
    "StaleFrame",
    "StoreError",
    "StoreWriter",
    "TrainConfig",
    "Tuning",
    "__version__",
    "bench_systems",
    "calibrate",
    "collect",
    "compare",
    "convert",
    "draw_fan",
    "draw_imagination",
    "evaluate",
    "imagine",
    "imagine_episodes",
    "load",
    "load_decoder",
    "plan",
    "probe",
    "recipe",
    "report",
    "surprise",
    "sweep_lambda",
    "train",
    "train_decoder",
    "tune_lambda",
    "use",
    "voe",
]


# gymnasium looks up ids in its own registry and loads no plugins: importing lewm is what makes lewm/TwoRoom-v0 known.
envs.register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lewm' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"lewm.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'lewm.{name} needs {error.name}, which is not installed: pip install "lewm-fast[train]"', name=error.name
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
