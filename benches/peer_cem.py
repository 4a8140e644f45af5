"""stable-worldmodel's LeWM and CEMSolver behind a pipe: what `benches.cpu_plan` starts in the Python that has them.

The only argument is a folder with `model.npz` (weights under the official names), `case.npz` (obs and goal (3, S, S)
float32 as the ViT takes them, candidates (1, S, H, A)) and `case.json` (architecture, threads, device). Each line of
standard input is a request, each line of standard output its answer, both JSON. Nothing of lewm is imported here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def build(config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """The peer's LeWM of that architecture with these weights."""
    import torch
    from stable_worldmodel.wm.lewm import LeWM
    from stable_worldmodel.wm.lewm.module import MLP, Embedder, Predictor
    from transformers import ViTConfig, ViTModel

    vit = ViTConfig(
        hidden_size=config["encoder_dim"],
        num_hidden_layers=config["encoder_depth"],
        num_attention_heads=config["encoder_heads"],
        intermediate_size=config["encoder_mlp"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
    )
    width = config["embed_dim"]
    norm = {"hidden_dim": config["projector_hidden"], "norm_fn": torch.nn.BatchNorm1d}
    model = LeWM(
        encoder=ViTModel(vit, add_pooling_layer=False),
        predictor=Predictor(
            num_frames=config["history"],
            depth=config["predictor_depth"],
            heads=config["predictor_heads"],
            mlp_dim=config["predictor_mlp"],
            input_dim=width,
            hidden_dim=config["predictor_dim"],
            output_dim=width,
            dim_head=config["predictor_head_dim"],
        ),
        action_encoder=Embedder(
            input_dim=config["block_dim"],
            smoothed_dim=config["action_smoothed"],
            emb_dim=width,
            mlp_scale=config["action_hidden"] // width,
        ),
        projector=MLP(config["encoder_dim"], output_dim=width, **norm),
        pred_proj=MLP(width, output_dim=width, **norm),
    )
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval().requires_grad_(False)


def solver_of(model: Any, **options: Any) -> Any:
    """Their CEMSolver for their model, whichever release it is."""
    try:
        from stable_worldmodel.planning import CEMSolver, GoalMSE, ShootingCostEvaluator
    except ImportError:
        from stable_worldmodel.solver import CEMSolver

        return CEMSolver(model, **options)
    return CEMSolver(ShootingCostEvaluator(model, GoalMSE()), **options)


def in_float64(model: Any) -> Any:
    """Their LeWM in float64, which it refuses because its action encoder casts to float32: that cast is taken out."""
    encoder = model.double().action_encoder
    encoder.forward = lambda actions: encoder.embed(encoder.patch_embed(actions.mT).mT)
    return model


class Elites:
    """A callback of their solvers that notes who the elites are: after `solve`, `found` is (iterations, E, K)."""

    output_key = "elites"

    def __init__(self) -> None:
        self.batches: list[list[np.ndarray]] = []
        self.history: list[Any] = []

    def reset(self) -> None:
        self.batches = []

    def start_batch(self) -> None:
        self.batches.append([])

    def __call__(self, *, topk_inds: Any, **_: Any) -> None:
        self.batches[-1].append(np.sort(topk_inds.cpu().numpy(), axis=1))

    def end_solve(self) -> None:
        self.history = []

    @property
    def found(self) -> np.ndarray:
        return np.concatenate([np.stack(batch) for batch in self.batches], axis=1)


class Peer:
    """One model and one budget."""

    def __init__(self, folder: Path) -> None:
        import torch

        case = json.loads((folder / "case.json").read_text())
        torch.set_num_threads(case["threads"])
        with np.load(folder / "model.npz") as file:
            self.model = build(case["config"], dict(file)).to(case["device"])
        self.device, self.compiled = case["device"], False
        self.config, self.arrays = case["config"], dict(np.load(folder / "case.npz"))

    def versions(self) -> dict[str, str]:
        names = ("torch", "transformers", "stable-worldmodel")
        return {name: importlib.metadata.version(name) for name in names}

    def info(self) -> dict[str, Any]:
        import torch

        obs, goal = (torch.from_numpy(self.arrays[name])[None, None] for name in ("obs", "goal"))  # (B, T, 3, S, S)
        info = {"pixels": obs, "goal": goal, "action": torch.zeros(1, 1, self.config["block_dim"])}
        return {name: value.to(self.device) for name, value in info.items()}

    def costs(self) -> list[float]:
        """Of the case's candidates, as the solver asks for them."""
        import torch

        candidates = torch.from_numpy(self.arrays["candidates"]).to(self.device)
        samples = candidates.shape[1]
        info = {k: v[:, None].expand(1, samples, *v.shape[1:]) for k, v in self.info().items()}
        with torch.inference_mode():
            return self.model.get_cost(info, candidates)[0].tolist()

    def plan(
        self, samples: int, iterations: int, elites: int, horizon: int, bfloat16: bool, compiled: bool = False
    ) -> float:
        """Seconds of one solve. Once asked for, the predictor stays compiled."""
        import torch

        if compiled and not self.compiled:
            self.model.predictor, self.compiled = torch.compile(self.model.predictor), True
        solver = self.configured(self.model, samples, iterations, elites, horizon)
        info = self.info()
        start = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            solver.solve(info)
            if self.device == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - start

    def elites(
        self, samples: int, iterations: int, elites: int, horizon: int, seed: int, float64: bool
    ) -> dict[str, Any]:
        """Who the elites of every iteration were, (iterations, K), and the plan (H, A), of one solve with that seed."""
        noted = Elites()
        model = in_float64(copy.deepcopy(self.model)) if float64 else self.model
        solver = self.configured(model, samples, iterations, elites, horizon, seed=seed, callbacks=[noted])
        found = solver.solve(self.info())
        return {"elites": noted.found[:, 0].tolist(), "actions": found["actions"][0].double().tolist()}

    def configured(self, model: Any, samples: int, iterations: int, elites: int, horizon: int, **options: Any) -> Any:
        import gymnasium
        from stable_worldmodel import PlanConfig

        options |= {"num_samples": samples, "n_steps": iterations, "topk": elites, "device": self.device}
        solver = solver_of(model, **options)
        block = self.config["action_block"]
        space = gymnasium.spaces.Box(-1, 1, (1, self.config["action_dim"]))
        settings = PlanConfig(horizon=horizon, receding_horizon=horizon, action_block=block)
        solver.configure(action_space=space, n_envs=1, config=settings)
        return solver


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # the solver prints; the pipe is for answers
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            peer = peer or Peer(Path(sys.argv[1]))
            answer = {"answer": getattr(peer, request.pop("do"))(**request)}
        except ImportError as error:
            answer = {"missing": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
