"""The systems of the article's table, on the same data, encoder size, planner and pairs: `lewm bench systems`.

What is LeWM with another loss is a set of settings of `lewm.train`, so its row differs from LeWM's by that alone.
Others have a model of their own (DINO-WM), or come as rows that were measured elsewhere (TD-MPC2, DreamerV3). Heads
are left out: the article scores plans by the latent distance.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lewm.checks import integer
from lewm.config import configure
from lewm.data import Dataset
from lewm.evaluation import (
    PROTOCOLS,
    Result,
    _as_learnt,
    _pictures,
    _versions,
    described,
    evaluate,
    make_tasks,
    wilson,
)
from lewm.model_file import brief, read_tensors, tensor_shapes, write_atomically
from lewm.planner import plan, planner_of
from lewm.recipes import Trial
from lewm.recipes import recipe as recipe_of
from lewm.records import read_record, typed

__all__ = ["SYSTEMS", "System", "SystemRow", "SystemsTable", "bench_systems"]

_TIMED = 20  # plans of each system, fewer of one that takes long
_LONG = 20_000.0  # milliseconds of timing a system, after which a few plans will do
_REST = 0.02  # s before a plan is timed: torch's threads spin for half of it after their work, and hold cores up
_FEW = 4
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NO_WEIGHTS = "the weights of DINOv2 were not given (--dino-weights PATH)"
_ELSEWHERE = "it learns from rewards, in an environment of its own, and no row of it was given (--rows FILE)"


@dataclass(frozen=True)
class System:
    """One row of the table, before it is measured.

    Attributes:
        name: What it is called here.
        label: What it is called in the table.
        terms: Its loss terms, and of each the setting that weighs it; None: it has no weight.
        further: Its other settings that are to be tuned, those of the loss and what goes with it.
        overrides: What makes LeWM it, for `lewm.train`; None: it has a model of its own.
        article: The article's success rates by task, of its figure 6, in percent (50 episodes each).
    """

    name: str
    label: str
    terms: Mapping[str, str | None]
    further: tuple[str, ...] = ()
    overrides: Mapping[str, Any] | None = None
    article: Mapping[str, int] = field(default_factory=dict)


_LEWM = {"prediction": None, "SIGReg": "sigreg_weight"}
# Its grid search on PushT at 224 px in 192 dimensions (the article's table 2), which it has for all tasks.
_PLDM = {
    "variance": 18.0,
    "covariance": 12.0,
    "time_similarity": 0.2,
    "time_variance": 0.7,
    "time_covariance": 0.0,
    "inverse_dynamics": 0.0,
}
# Beside a prediction loss of weight 1; VICReg has 25, 25 and 1. One guess for small models, not tuned.
_VICREG = {"variance": 1.0, "covariance": 0.04, "time_variance": 0.0}
_DINO_WM = {"two-room": 100, "reacher": 79, "pusht": 74, "cube": 86}

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("lewm", "LeWM", _LEWM, (), {}, {"two-room": 87, "reacher": 86, "pusht": 96, "cube": 74}),
        System(
            "pldm",
            "PLDM",
            {"prediction": None, **{name.replace("_", " "): name for name in _PLDM}},
            (),
            {"sigreg_weight": 0.0, **_PLDM},
            {"two-room": 97, "reacher": 78, "pusht": 78, "cube": 65},
        ),
        System(
            "pldm-vicreg",
            "PLDM, VICReg's proportions",
            {"prediction": None, **{name.replace("_", " "): name for name in _PLDM}},
            (),
            {"sigreg_weight": 0.0, **_PLDM, **_VICREG},
        ),
        System("no-regulariser", "LeWM without SIGReg", {"prediction": None}, (), {"sigreg_weight": 0.0}),
        System("stop-gradient", "LeWM, stop-gradient", _LEWM, (), {"target": "stop_gradient"}),
        System("ema", "LeWM, EMA target", _LEWM, ("ema_decay",), {"target": "ema"}),
        System("dino-wm", "DINO-WM", {"prediction": None}, article=_DINO_WM),
        System("dino-random", "DINO-WM, random frozen ViT", {"prediction": None}),
        System(
            "td-mpc2",
            "TD-MPC2",
            {
                "consistency": "consistency_coef",
                "reward": "reward_coef",
                "value": "value_coef",
                "policy": None,
            },
            ("entropy_coef", "rho"),
            article={"pusht": 12, "cube": 4},
        ),
        System(
            "dreamerv3",
            "DreamerV3",
            {
                "reconstruction": "beta_pred",
                "reward": "beta_pred",
                "continuation": "beta_pred",
                "dynamics": "beta_dyn",
                "representation": "beta_rep",
                "actor": None,
                "critic": None,
            },
            ("free_bits", "entropy"),
        ),
    )
}


@dataclass(frozen=True)
class SystemRow:
    """What was measured of a system; None: it was not, and `missing` says why.

    Attributes:
        system: A name in `SYSTEMS`.
        terms: Names of its loss terms, where they are not those in `SYSTEMS`.
        weights: Of its hyper-parameters, by name, as it was run.
        tokens: Vectors that stand for a frame in the predictor.
        parameters: Of all that is needed to plan, frozen parts included, without BatchNorm's statistics.
        plan_ms: Median latency of single plans as the system runs here, in milliseconds.
        plan_torch_ms: The same in PyTorch and float32, on the same machine.
        runs_on: Back end and precision of `plan_ms` and of success.
        success_rate: Share of `n` pairs solved.
        random_floor: The same for random actions.
        n: Number of pairs.
        probe_r: Pearson's r of linear probes, by property.
        straightness: Temporal straightness S (the article's appendix H).
        effective_rank, width: Of the latents.
        steps, seconds: Of the training.
        collapsed: Whether training warned of it.
        missing: Why something is not measured, by field; under "row", why nothing is.
        note: What else a reader has to know.
    """

    system: str
    terms: list[str] | None = None
    weights: dict[str, float] | None = None
    tokens: int | None = None
    parameters: int | None = None
    plan_ms: float | None = None
    plan_torch_ms: float | None = None
    runs_on: str | None = None
    success_rate: float | None = None
    random_floor: float | None = None
    n: int | None = None
    probe_r: dict[str, float] | None = None
    straightness: float | None = None
    effective_rank: float | None = None
    width: int | None = None
    steps: int | None = None
    seconds: float | None = None
    collapsed: bool | None = None
    missing: dict[str, str] | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {self.system!r}")
        if (self.success_rate is None) != (self.n is None):
            raise ValueError("success_rate and n must be given together")
        if self.n is not None:
            integer("n", self.n, 1)
        if self.success_rate is not None and not 0 <= self.success_rate <= 1:
            raise ValueError(f"success_rate must be from 0 to 1, got {self.success_rate}")


@dataclass(frozen=True)
class SystemsTable:
    """What `bench_systems` found; `str` is the table in Markdown, `save` writes the JSON, `load` reads one.

    Attributes:
        task, size, seed: As asked for.
        protocol, planner, execute, shrink: How plans were made and judged, the same for all.
        data: Fingerprint of the store.
        episodes: In it.
        rows: One for each system, in the order of `SYSTEMS`.
        versions: Of the software, and the CPU.
        threads: CPU threads of lewm's engine.
        busy: Processes that wanted the CPU when plans were timed, in the minute before.
        date: Of the timing.
    """

    task: str
    size: str
    seed: int
    protocol: str
    planner: dict[str, Any]
    execute: int
    shrink: bool
    data: str
    episodes: int
    rows: list[SystemRow]
    versions: dict[str, str]
    threads: int
    busy: float
    date: str

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SystemsTable:
        """Reads what `save` wrote; the file may be from anywhere.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is none; the text says what is wrong.
        """
        return read_record(
            path, "table of systems", "table of lewm bench systems", lambda value: typed("the file", value, cls)
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON atomically: the file is the whole table or not there."""
        write_atomically(path, f"{json.dumps(self.to_dict(), indent=1)}\n".encode())

    def __str__(self) -> str:
        by_name = {row.system: row for row in self.rows}
        base = by_name.get("lewm")
        cells = [_COLUMNS, ("---",) * len(_COLUMNS)]
        cells += [_cells(row, base) for row in self.rows]
        lines = ["| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]
        lines += ["", *(f"- {text}" for row in self.rows for text in _remarks(row, self.task))]
        search = f"{self.planner['name'].upper()} {self.planner['samples']} x {self.planner['iterations']}"
        trained = [row for row in self.rows if row.steps is not None and SYSTEMS[row.system].overrides is not None]
        own = [row for row in self.rows if row.probe_r is not None]  # others are told of by their notes
        floors = sorted({row.random_floor for row in own if row.random_floor is not None})
        lines += [
            "",
            f"{self.task}, size {self.size}, seed {self.seed}: {self.episodes:,} episodes (fingerprint "
            f"{self.data[:12]}), {self.protocol}, {search}, horizon {self.planner['horizon']}, {self.execute} blocks "
            f"executed{', horizon shrinking' * self.shrink}"
            + "".join(f", random actions {floor:.1%}" for floor in floors)
            + (f", trained for {_span('{:,}', [row.steps for row in trained])} steps" if trained else "")
            + ". Plans of a single environment were timed in turn, the median is given.",
            "",
            f"{self.versions.get('cpu', '?')}, {self.threads} threads, load average {self.busy:.1f} when plans were "
            f"timed, {self.date}; "
            + ", ".join(f"{name} {self.versions[name]}" for name in ("lewm", "torch", "numpy") if name in self.versions)
            + ".",
        ]
        return "\n".join(lines) + "\n"


_COLUMNS = (
    "system",
    "loss",
    "to tune",
    "tokens a frame",
    "parameters",
    "plan, ms",
    "plan in PyTorch float32, ms",
    "solved",
    "probe r (linear)",
    "straightness",
    "effective rank",
)


def bench_systems(
    task: str = "two-room",
    size: str | None = None,
    *,
    systems: Sequence[str] | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: Dataset | str | os.PathLike[str] | None = None,
    pairs: int | None = None,
    steps: int | None = None,
    rows: Iterable[str | os.PathLike[str]] = (),
    dino_weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> SystemsTable:
    """Trains and measures the systems of the article's table on one task (its sections 4 and 5).

    Each system has a folder in `out`: its run, the JSON of `lewm.evaluate`, that of `lewm.probe`. What is there already
    is kept, a training that was interrupted goes on; plans are timed anew, those of all systems in turn. The table is
    written to `out` as `systems.json` and `systems.md`.

    Args:
        task: A name in `lewm.RECIPES`, whose data, settings, protocol and planner all systems have; heads are left out.
        size: One of the recipe's sizes; by default the one for this machine.
        systems: Names in `SYSTEMS`; by default all.
        seed: Of the training; planner's noise and random actions have seed 0.
        out: Folder; `runs/systems-TASK-SIZE-SEED` by default.
        data: A store to learn from, or its path; by default the recipe's own, which is collected where it is not there.
        pairs: Pairs to solve; the protocol's number by default.
        steps: Optimiser steps; the recipe's by default.
        rows: JSON files, each a row or a list of rows (`SystemRow`) of systems that were measured elsewhere.
        dino_weights: DINOv2's weights for "dino-wm", a local path (`lewm.dino_wm.read_dinov2`).
        device: A torch device to train on, as for `lewm.train`.
        progress: Called with (what is being done, how much of it is done, out of how much).

    Raises:
        TypeError, ValueError: An argument is not as described, or `out` holds a run with other settings or data.
    """
    names = list(SYSTEMS) if systems is None else list(dict.fromkeys(systems))
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"systems must be of {', '.join(SYSTEMS)}, got {name!r}")
    if not names:
        raise ValueError("systems must name at least one system, got none")
    integer("seed", seed, 0, 2**63)
    recipe = recipe_of(task, size, device=device)
    trial = recipe.trials[0]
    wanted = PROTOCOLS[trial.protocol].pairs if pairs is None else integer("pairs", pairs, 1)
    given = {row.system: row for path in rows for row in _rows(path)}
    folder = Path(out or f"runs/systems-{recipe.name}-{recipe.size}-{seed}")
    data = recipe.collect() if data is None else data if isinstance(data, Dataset) else Dataset(data)
    if data.metadata.get("env_id", recipe.env_id) != recipe.env_id:
        raise ValueError(f"data must be of {recipe.env_id}, as the task {task}, got {data.metadata['env_id']}")

    settings = {k: v for k, v in recipe.overrides.items() if k not in ("distance_head", "action_prior")}
    length = {} if steps is None else {"steps": integer("steps", steps, 1)}
    told = progress or (lambda *_: None)

    def made(system: System, own: Path) -> Any:
        common = seed, own, device, partial(told, f"{system.name}: train")
        if system.overrides is not None:
            return _trained(data, recipe.size, {**settings, **length, **system.overrides}, *common)
        if system.name == "dino-random" or (system.name == "dino-wm" and dino_weights is not None):
            weights = dino_weights if system.name == "dino-wm" else None
            return _dino(data, recipe.size, weights, length, *common)
        raise _NotMeasuredError(_NO_WEIGHTS if system.name == "dino-wm" else _ELSEWHERE)

    found: dict[str, SystemRow] = {}
    models: dict[str, Any] = {}
    for name in names:
        system, own = SYSTEMS[name], folder / name
        if name in given:
            found[name] = given[name]
            continue
        try:
            model = made(system, own)
        except _NotMeasuredError as why:
            found[name] = SystemRow(name, missing={"row": str(why)})
            continue
        models[name] = model
        found[name] = _measured(system, model, data, trial, wanted, own, partial(told, f"{name}: evaluate"))
    if models:
        told("plan times", 0, 1)
        found = _timed(found, models, folder, trial)
        told("plan times", 1, 1)
    table = SystemsTable(
        task=recipe.name,
        size=recipe.size,
        seed=seed,
        protocol=trial.protocol,
        planner=described(trial.planner),
        execute=trial.execute,
        shrink=trial.shrink,
        data=data.fingerprint(),
        episodes=len(data),
        rows=[found[name] for name in SYSTEMS if name in found],
        versions=_versions(),
        threads=_threads(),
        busy=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    table.save(folder / "systems.json")
    write_atomically(folder / "systems.md", str(table).encode())
    return table


class _NotMeasuredError(Exception):
    """Why a system cannot be measured here."""


def _trained(
    data: Dataset,
    preset: str,
    settings: dict[str, Any],
    seed: int,
    out: Path,
    device: str | None,
    progress: Callable[[int, int], object],
) -> Any:
    """LeWM with another loss: what is in `out`, or a new run, or the rest of one."""
    from lewm.model import load
    from lewm.trainer import train

    if not (out / "model.safetensors").exists():
        return train(
            data,
            preset=preset,
            out=out,
            seed=seed,
            resume=(out / "checkpoint.safetensors").exists(),
            device=device,
            progress=lambda done, total, _: progress(done, total),
            **settings,
        )
    model = load(out)
    record = model.meta.get("training") or {}
    config, train_config = configure(preset, data.action_dim, settings)
    want = {
        "model": asdict(config),
        "train": asdict(train_config),
        "seed": seed,
        "data": data.fingerprint(),
    }
    have = {
        "model": asdict(model.config),
        "train": record.get("config"),
        "seed": record.get("seed"),
        "data": (model.meta.get("data") or {}).get("fingerprint"),
    }
    _check_same(out, want, have)
    return model


def _dino(
    data: Dataset,
    preset: str,
    weights: str | os.PathLike[str] | None,
    settings: dict[str, Any],
    seed: int,
    out: Path,
    device: str | None,
    progress: Callable[[int, int], object],
) -> Any:
    """A DINO-WM, of a random ViT where there are no weights: what is in `out`, or a new run."""
    try:
        from lewm import dino_wm
    except ImportError:
        raise _NotMeasuredError("this release has no DINO-WM") from None
    if preset not in dino_wm.PRESETS:
        raise _NotMeasuredError(f"it has no size {preset}, only {', '.join(dino_wm.PRESETS)}")
    if not (out / "model.safetensors").exists():
        return dino_wm.train_dino_wm(
            data,
            preset=preset,
            weights=weights,
            seed=seed,
            out=out,
            device=device,
            progress=lambda done, total, _: progress(done, total),
            **settings,
        )
    model = dino_wm.DinoWM.load(out)
    base = dino_wm.PRESETS[preset]
    # What weights say is as large as they are.
    config = model.config if weights is not None else dino_wm.DinoConfig(data.action_dim, **base.model)
    record, wanted = model.meta.get("training") or {}, dino_wm._Training(**{**base.train, **settings})
    _check_same(
        out,
        {
            "preset": f"{dino_wm.KIND}-{preset}",
            "model": config,
            "seed": seed,
            "steps": wanted.steps,
            "data": data.fingerprint(),
        },
        {
            "model": model.config,
            "preset": model.meta.get("preset"),
            "seed": record.get("seed"),
            "steps": record.get("steps"),
            "data": (model.meta.get("data") or {}).get("fingerprint"),
        },
    )
    return model


def _check_same(out: Path, want: dict[str, Any], have: dict[str, Any]) -> None:
    """That what is there is what is asked for."""
    for name, value in want.items():
        if have[name] != value:
            raise ValueError(f"out must be a new folder, or one with runs like these; {out} has another {name}")


def _measured(
    system: System,
    model: Any,
    data: Dataset,
    trial: Trial,
    pairs: int,
    out: Path,
    progress: Callable[[int, int], object],
) -> SystemRow:
    """All but plan times."""
    from lewm.probes import ProbeResult, probe

    row = SystemRow(system.name)
    missing: dict[str, str] = {}
    path = out / f"{trial.protocol}.json"
    result = Result.load(path) if path.exists() else None
    if result is None or not _same(result, model, trial, pairs):
        result = evaluate(
            model,
            trial.protocol,
            pairs=pairs,
            planner=trial.planner,
            execute=trial.execute,
            shrink=trial.shrink,
            out=path,
            progress=progress,
        )
    path = out / "probes.json"
    probes = ProbeResult.load(path) if path.exists() else None
    if probes is None or probes.data != data.fingerprint() or probes.model_hash not in (None, model.hash()):
        try:
            probes = probe(model, data, out=path)
        except ValueError as error:  # latents that are all the same
            missing |= dict.fromkeys(("probe_r", "straightness", "effective_rank"), brief(error))
            probes = None
    if probes is not None:
        row = replace(
            row,
            probe_r={name: each.linear.r for name, each in probes.properties.items()},
            straightness=probes.straightness,
            effective_rank=probes.effective_rank,
            width=probes.width,
        )
        if probes.straightness is None:
            missing["straightness"] = "no three frames of a test episode differ"
    training = model.meta.get("training") or {}
    return replace(
        row,
        weights=_weights(system, training.get("config") or {}),
        tokens=getattr(model.config, "tokens", 1),
        parameters=_parameters(model),
        runs_on=f"{model.backend} {model.precision}",
        success_rate=result.success_rate,
        random_floor=result.random_floor,
        n=result.n,
        steps=training.get("steps"),
        seconds=training.get("seconds"),
        collapsed=_collapsed(out),
        missing=missing or None,
    )


def _same(result: Result, model: Any, trial: Trial, pairs: int) -> bool:
    """Whether a result is the one that `evaluate` would find now."""
    return (
        result.model_hash == model.hash()
        and result.protocol == _as_learnt(PROTOCOLS[trial.protocol], model)
        and (result.n, result.execute, result.shrink) == (pairs, trial.execute, trial.shrink)
        and result.planner == described(planner_of(model, trial.planner))
    )


def _weights(system: System, config: Mapping[str, Any]) -> dict[str, float]:
    """Values of what is to be tuned."""
    return {name: float(config[name]) for name in _tuned(system) if name in config}


def _tuned(system: System) -> list[str]:
    """Names of what is to be tuned."""
    return list(dict.fromkeys([*filter(None, system.terms.values()), *system.further]))


def _parameters(model: Any) -> int:
    if hasattr(model, "parameters"):  # by what is done with them
        return sum(model.parameters().values())
    shapes = tensor_shapes(model.config)
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_STATISTICS))


def _collapsed(out: Path) -> bool | None:
    """Whether the run warned of it, as its checkpoint says."""
    try:
        _, header = read_tensors(out / "checkpoint.safetensors", "run")
        return bool(header["metrics"].get("warned"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _timed(found: dict[str, SystemRow], models: dict[str, Any], folder: Path, trial: Trial) -> dict[str, SystemRow]:
    """Rows with the median latency of single plans, those of all systems in turn, as they run here and in PyTorch."""
    from lewm.model import load

    cases: dict[tuple[str, str], Any] = {(name, "plan_ms"): model for name, model in models.items()}
    same = {name for name, model in models.items() if (model.backend, model.precision) == ("torch", "float32")}
    for name in sorted(models.keys() - same):
        cases[name, "plan_torch_ms"] = load(folder / name, backend="torch", precision="float32")
    pictures: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for i in (0, *range(_TIMED)):
        for case, model in cases.items():
            side = model.config.image_size
            if side not in pictures:
                protocol = _as_learnt(PROTOCOLS[trial.protocol], model)
                tasks = make_tasks(protocol, _TIMED, side)
                pictures[side] = _pictures(protocol, tasks.states, side), tasks.pictures
            now, goals = pictures[side]
            if len(times[case]) < _FEW or sum(times[case]) < _LONG:
                time.sleep(_REST)
                search = plan(now[i], goals[i], model=model, planner=trial.planner, seed=0, env_ids=[i])
                times[case].append(search.latency_ms)
    # The first of each is a warm-up.
    median = {case: round(statistics.median(each[1:]), 3) for case, each in times.items()}
    median |= {(name, "plan_torch_ms"): median[name, "plan_ms"] for name in same}
    return {
        name: replace(row, **{what: value for (of, what), value in median.items() if of == name})
        for name, row in found.items()
    }


def _threads() -> int:
    return int(os.environ.get("LEWM_NUM_THREADS") or os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------------ reading rows


def _rows(path: str | os.PathLike[str]) -> list[SystemRow]:
    """Rows that were measured elsewhere."""

    def rows(value: Any) -> list[SystemRow]:
        listed = value if isinstance(value, list) else [value]
        return [typed("row", _of_peers(each) if "measured" in each else each, SystemRow) for each in listed]

    return read_record(path, "rows", "row of lewm bench systems", rows)


def _of_peers(found: Any) -> dict[str, Any]:
    """A row as `benches.systems_peers` writes it, as one of ours."""
    label = str(found["system"])
    system = next((name for name, each in SYSTEMS.items() if label.startswith(each.label)), label)
    if not found["measured"]:
        return {"system": system, "missing": {"row": found["why_not"]}}
    names, training = found.get("names") or {}, found["training"]
    plan_ms = found["plan_ms"]
    unmeasured = ("plan_torch_ms", "probe_r", "straightness", "effective_rank")
    remarks = [label, found.get("observation"), found.get("planner"), training.get("budget"), *found.get("notes", ())]
    return {
        "system": system,
        "terms": names.get("loss_terms"),
        "weights": names.get("hyperparameters"),
        "tokens": found["tokens_per_frame"],
        "parameters": found["parameters"],
        "plan_ms": plan_ms["p50"] if isinstance(plan_ms, dict) else plan_ms,
        "success_rate": found["success"],
        "n": found["n"],
        "random_floor": found.get("random_floor"),
        "steps": training.get("steps"),
        "seconds": training.get("seconds"),
        "missing": dict.fromkeys(unmeasured, "it was measured in another environment, by plans alone"),
        "note": "; ".join(str(text).rstrip(".") for text in remarks if text),
    }


# ------------------------------------------------------------------------------------------------------ the Markdown


def _cells(row: SystemRow, base: SystemRow | None) -> tuple[str, ...]:
    system, weights = SYSTEMS[row.system], row.weights or {}
    by = dict.fromkeys(row.terms) if row.terms is not None else system.terms
    terms = [f"{weights[weight]:g} {name}" if weight in weights else name for name, weight in by.items()]
    solved = ""
    if row.success_rate is not None and row.n is not None:
        low, high = wilson(row.success_rate * row.n, row.n)
        solved = f"{row.success_rate:.1%} [{low:.1%}, {high:.1%}] of {row.n}"
    found = (
        "" if row.tokens is None else f"{row.tokens:,}",
        "" if row.parameters is None else f"{row.parameters:,}",
        _times(row.plan_ms, base and base.plan_ms) + (f" ({row.runs_on})" if row.plan_ms and row.runs_on else ""),
        _times(row.plan_torch_ms, base and base.plan_torch_ms),
        solved,
        ", ".join(f"{name} {r:.3f}" for name, r in (row.probe_r or {}).items()),
        "" if row.straightness is None else f"{row.straightness:.2f}",
        "" if row.effective_rank is None else f"{row.effective_rank:.1f} of {row.width}",
    )
    return (
        system.label,
        f"{len(terms)}: {' + '.join(terms)}",
        str(len(weights) if row.weights is not None else len(_tuned(system))),
        *(cell or "not measured" for cell in found),
    )


def _times(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" + (f", {value / base:.3g}x" if base else "")


def _remarks(row: SystemRow, task: str) -> list[str]:
    """What the cells leave open, in words."""
    system, missing = SYSTEMS[row.system], dict(row.missing or {})
    texts = [f"not measured: {missing.pop('row')}"] if "row" in missing else []
    for why in dict.fromkeys(missing.values()):
        what = ", ".join(name.replace("_", " ") for name, each in missing.items() if each == why)
        texts.append(f"{what} not measured: {why}")
    if row.collapsed:
        texts.append("its training warned of collapse (`CollapseWarning`)")
    if row.note:
        texts.append(row.note)
    if task in system.article:
        texts.append(f"the article has {system.article[task]} % at its own size, of 50 episodes")
    return [_plain(f"{system.label}: {'; '.join(texts)}.")] if texts else []


def _plain(text: str) -> str:
    """Text, which may be from a file, as one line without HTML."""
    return " ".join(text.split()).replace("<", "&lt;").encode("utf-8", "replace").decode()


def _span(form: str, values: Sequence[Any]) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
