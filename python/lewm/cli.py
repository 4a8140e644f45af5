"""The `lewm` command: the functions of the package, by the same names, with progress bars."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(
    no_args_is_help=True, help="Look at a store, verify it, repair it. Exit code 1: damage was found."
)
app.add_typer(data_app, name="data")

_Store = Annotated[Path, typer.Argument(help="A .lewm folder.")]
_Model = Annotated[Path, typer.Argument(help="Model file, run folder, or OWNER/NAME on the Hugging Face Hub.")]
_Seed = Annotated[int, typer.Option(help="Of everything random.")]
_Planner = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME or NAME=VALUE",
        help="One of lewm.PLANNERS (paper, small, tiny, official, icem, mppi), a setting, as samples=64, or both.",
    ),
]
_Stats = Annotated[
    Path | None,
    typer.Option(
        help="Action statistics to use: a store, or JSON of mean, std, low, high. Official checkpoints lack them."
    ),
]
_Result = Annotated[Path, typer.Argument(help="Result JSON of lewm evaluate.")]


@app.command()
def collect(
    env: Annotated[str, typer.Argument(help="Environment id, as lewm/TwoRoom-v0.")],
    path: Annotated[Path, typer.Argument(help="Store to write, as two-room.lewm.")],
    episodes: Annotated[int, typer.Option(help="Episodes the store shall hold.")] = 300,
    size: Annotated[int, typer.Option(help="Side of a frame, in pixels.")] = 64,
    seed: _Seed = 0,
    policy: Annotated[str, typer.Option(help="expert, play or random.")] = "expert",
    max_steps: Annotated[int | None, typer.Option(help="Steps per episode; by default its limit.")] = None,
    env_setting: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="For the environment, as look=light."),
    ] = None,
    card: Annotated[bool, typer.Option(help="Also write a data card beside the store, as `lewm data card`.")] = True,
) -> None:
    """Collect episodes into a store. Run again after an interruption, it makes the missing ones."""
    from lewm.collector import collect

    settings = {"episodes": episodes, "size": size, "seed": seed, "policy": policy, "max_steps": max_steps}
    _collected(partial(collect, env, path, **settings, env_kwargs=_settings(env_setting or [])), path, card)


def _collected(collect: Callable[..., Any], path: Path, card: bool = True) -> Any:
    """The store after collecting into it with a progress bar, a line about it, and a data card."""
    from lewm.progress import Bar

    before, started = _frames(path), time.perf_counter()
    with Bar("episodes") as bar:
        data = collect(progress=bar.collect)
    speed = (data.frame_count - before) / (time.perf_counter() - started)
    made = f" ({speed:,.0f} a second)" if speed else ""
    typer.echo(f"{path}: {len(data)} episodes, {data.frame_count} frames{made}, fingerprint {data.fingerprint()[:12]}")
    if card and speed:  # else there was nothing to do
        from lewm.card import write_card

        write_card(data, frames_per_second=round(speed, 1))
    return data


def _frames(path: Path) -> int:
    """Frames that a store holds already."""
    from lewm.data import Dataset

    return Dataset(path).frame_count if path.is_dir() and any(path.iterdir()) else 0


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="HDF5, Lance, video, LeRobot, Minari, folder of videos, or store.")],
    dst: Annotated[Path, typer.Argument(help="NAME.lewm, NAME.h5, or a name without suffix: a LeRobot folder.")],
    format: Annotated[str | None, typer.Option(help="Of SRC; told by what it holds when not given.")] = None,
    camera: Annotated[str | None, typer.Option(help="Image column, where there are several.")] = None,
    action: Annotated[str | None, typer.Option(help="Action column, where it is not the usual one.")] = None,
    low: Annotated[str | None, typer.Option(help="Lower raw bounds of actions, as -1,-1, or one for all.")] = None,
    high: Annotated[str | None, typer.Option(help="Upper raw bounds of actions.")] = None,
    bounds: Annotated[
        str | None, typer.Option(metavar="data", help="Take the least and greatest recorded actions for bounds.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the frames to make, in pixels.")] = None,
    episodes: Annotated[int | None, typer.Option(help="How many, the first ones; all by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, where SRC does not say.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate, and do nothing.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted conversion to DST has left.")
    ] = False,
) -> None:
    """Convert episodes to a store, or a store to HDF5 or LeRobot. Run again after an interruption, it goes on."""
    from lewm.conversion import Conversion
    from lewm.progress import Bar

    names = {"format": format, "camera": camera, "action": action, "bounds": bounds}
    values = {
        "low": _numbers("low", low),
        "high": _numbers("high", high),
        "size": size,
        "episodes": episodes,
        "fps": fps,
    }
    with Bar("") as bar:
        conversion = Conversion(src, dst, **names, **values, restart=restart, progress=bar.count)
    with conversion:
        typer.echo(conversion.estimate())
        if dry_run:
            return
        try:
            with Bar("") as bar:
                conversion.progress = bar.count
                report = conversion.run()
        except KeyboardInterrupt:
            typer.echo("\nstopped; the same command goes on after the last episode that was written", err=True)
            raise typer.Exit(130) from None
    typer.echo(report)


@app.command()
def train(
    data: Annotated[
        Path | None, typer.Argument(help="Store to learn from; without one, a recipe collects its own.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A name that `lewm recipes` lists.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Of the recipe: paper, the default on CUDA, else small or tiny.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Without a recipe: paper (the default), small or tiny.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; runs/PRESET-SEED or runs/RECIPE-SIZE/seed-SEED by default.")
    ] = None,
    seed: _Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    device: Annotated[str | None, typer.Option(help="Torch device; CUDA where there is one by default.")] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile encoder and predictor before training; on CUDA if absent."
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Do not train: time some steps, print MFU and where the time goes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --profile: print JSON.")] = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of model or training.")
    ] = None,
) -> None:
    """Train a world model. Ctrl-C leaves a run that --resume continues, with the same losses.

    With a recipe, its data are collected first, as far as they are missing; what evaluates the model is printed last.
    """
    from lewm.progress import Bar
    from lewm.trainer import train

    settings: dict[str, Any] = {"seed": seed, "device": device, "compile": compile, **_settings(setting or [])}
    if as_json and not profile:
        raise ValueError("--json must go with --profile")
    followed = _recipe(recipe, size, preset, device) if recipe else None
    if followed is not None:
        learn: Callable[..., Any] = followed.train
        out = out or followed.run(seed)
    elif size is not None:
        raise ValueError(f"--size must go with --recipe, got {size!r} alone; --preset is what goes without")
    else:
        learn, preset = partial(train, preset=preset or "paper"), preset or "paper"
        out = out or Path(f"runs/{preset}-{seed}")
    if data is None:
        if followed is None:
            raise ValueError("data must be a store to learn from, or --recipe one that collects its own; got neither")
        data = _collected(followed.collect, followed.store)
    if profile:
        found = learn(data, profile=True, resume=resume, **settings)
        typer.echo(json.dumps(found.to_dict()) if as_json else str(found))
        return
    try:
        with Bar("steps") as bar:
            model = learn(data, out=out, resume=resume, progress=bar.train, **settings)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the same command with --resume goes on from {out}/checkpoint.safetensors", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{out}/model.safetensors\n{model.describe()}")
    for trial in followed.trials if followed else ():
        typer.echo(f"\n{trial.protocol}, {trial}\n{trial.command(out)}")


def _recipe(name: str, size: str | None, preset: str | None, device: str | None) -> Any:
    from lewm.recipes import recipe

    if preset is not None:
        raise ValueError(f"--preset must go without --recipe, whose --size it is; got {preset!r}")
    return recipe(name, size, device=device)


@app.command()
def recipes() -> None:
    """What each recipe collects and trains, how it is evaluated, and what came of it."""
    from lewm.recipes import RECIPES

    typer.echo("\n\n".join(str(recipe) for sizes in RECIPES.values() for recipe in sizes.values()))


@app.command()
def evaluate(
    model: _Model,
    stats: _Stats = None,
    protocol: Annotated[str, typer.Option(help="Named protocol.")] = "two-room-25-50",
    pairs: Annotated[int | None, typer.Option(help="Start and goal pairs; the protocol's by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Take pairs from the held-out episodes of this store.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result JSON to write.")] = None,
    seed: _Seed = 0,
    planner: _Planner = None,
    execute: Annotated[int | None, typer.Option(help="Blocks of each plan to execute; all by default.")] = None,
    shrink: Annotated[bool, typer.Option("--shrink", help="Look ahead as far as the last plan still goes.")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A setting of the environment; those of the model's data by default."),
    ] = None,
) -> None:
    """Success rate with its interval, beside the random floor, on held-out pairs."""
    from dataclasses import replace

    from lewm.evaluation import PROTOCOLS, evaluate
    from lewm.progress import Bar

    loaded = _loaded(model, stats)
    with Bar("pairs") as bar:
        result = evaluate(
            loaded,
            replace(PROTOCOLS[protocol], env_kwargs=_settings(env)) if env and protocol in PROTOCOLS else protocol,
            pairs=pairs,
            data=data,
            out=out,
            seed=seed,
            planner=_planner(loaded, planner),
            execute=execute,
            shrink=shrink,
            progress=bar.count,
        )
    typer.echo(str(result))


@app.command()
def compare(a: _Result, b: _Result) -> None:
    """Paired difference of two results on the same pairs, with its interval."""
    from lewm.results import compare

    typer.echo(str(compare(a, b)))


@app.command()
def results(
    folder: Annotated[Path, typer.Argument(help="Folder of result JSONs.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("RESULTS.md"),
) -> None:
    """Write the table of all results in a folder."""
    from lewm.model_file import write_atomically
    from lewm.results import table

    write_atomically(out, table(folder).encode())
    typer.echo(out)


@app.command()
def plan(
    model: _Model,
    obs: Annotated[Path, typer.Argument(help="Picture of now.")],
    goal: Annotated[Path, typer.Argument(help="Picture of the goal.")],
    stats: _Stats = None,
    seed: _Seed = 0,
    planner: _Planner = None,
    fan: Annotated[
        Path | None, typer.Option(help="Picture to write of what the planner searched through, as fan.png.")
    ] = None,
) -> None:
    """Plan from one picture to another; prints JSON."""
    from lewm.planner import plan

    loaded = _loaded(model, stats)
    case, settings = (_picture(obs), _picture(goal)), {"seed": seed, "planner": _planner(loaded, planner)}
    found = plan(*case, model=loaded, **settings)
    if fan is not None:
        from lewm.imagination import draw_fan

        beside = _decoder_of(model, fan)
        decoder = None
        if beside.is_file():
            from lewm.decoder import load_decoder

            decoder = load_decoder(beside, loaded)
        draw_fan(loaded, *case, fan, decoder=decoder, **settings)
    answer = {
        "action": found.action.tolist(),
        "actions": found.actions.tolist(),
        "cost": float(found.cost),
        "latency_ms": round(found.latency_ms, 2),
        "backend": found.backend,
        "precision": found.precision,
    }
    typer.echo(json.dumps(answer))


@app.command()
def describe(model: _Model, stats: _Stats = None) -> None:
    """What a model file holds: architecture, units, bounds, origin."""
    typer.echo(_loaded(model, stats).describe())


@app.command()
def export(
    model: _Model,
    path: Annotated[Path, typer.Argument(help="Folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help="onnx, or official: what le-wm and stable-worldmodel load.")
    ] = "onnx",
    transformers: Annotated[int, typer.Option(help="Of official: the major release that is to load it, 4 or 5.")] = 5,
) -> None:
    """Write a model for other programs."""
    from lewm.model import load

    load(model, backend="cpu", precision="float32").export(form, path, transformers=transformers)
    typer.echo("\n".join(str(file) for file in sorted(path.iterdir())))


@app.command("tune-lambda")
def tune_lambda(
    data: _Store,
    preset: Annotated[str, typer.Option(help="paper, small or tiny.")] = "tiny",
    low: Annotated[float, typer.Option(help="Lower bound of lambda.")] = 1e-4,
    high: Annotated[float, typer.Option(help="Upper bound.")] = 10.0,
    runs: Annotated[int, typer.Option(help="Of the search, at most.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Of a run; a fifth of the preset's by default.")] = None,
    refine: Annotated[bool, typer.Option(help="Narrow down the plateau's edges with the runs that are left.")] = True,
    sweep: Annotated[
        int | None, typer.Option(metavar="POINTS", help="No search: runs on a grid, with their success.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="With --sweep: several runs at once, by Ray Tune.")] = False,
    pairs: Annotated[
        int | None, typer.Option(help="To measure success on; by default none, in a sweep the protocol's.")
    ] = None,
    sigreg: Annotated[float | None, typer.Option(help="Too low: SIGReg per sample above this; 0.134.")] = None,
    r2: Annotated[float | None, typer.Option(help="Too high: R2 of the prediction below this; 0.9.")] = None,
    seed: _Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/lambda-PRESET-SEED by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; CUDA where there is one by default.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of model or training.")
    ] = None,
) -> None:
    """Search lambda, the weight of SIGReg, by bisection. Run again after an interruption, it goes on."""
    from lewm.progress import Bar
    from lewm.tuning import Criterion, sweep_lambda, tune_lambda

    bounds = {name: value for name, value in (("sigreg", sigreg), ("r2", r2)) if value is not None}
    settings: dict[str, Any] = {"preset": preset, "low": low, "high": high, "steps": steps, "seed": seed, "out": out}
    settings |= {"device": device, "criterion": Criterion(**bounds), **_settings(setting or [])}
    if pairs is not None:
        settings["pairs"] = pairs
    if ray and sweep is None:
        raise ValueError("--ray must go with --sweep: the runs of a search are made one after the other")
    try:
        with Bar("steps") as bar:
            if sweep is None:
                found = tune_lambda(data, runs=runs, refine=refine, progress=bar.count, **settings)
            else:
                found = sweep_lambda(data, points=sweep, ray=ray, progress=bar.count, **settings)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(found)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of lewm train.")],
    data: Annotated[
        Path | None, typer.Option(help="Store to look at; by default the one in or beside RUN that it learnt from.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file; RUN/report.html by default.")] = None,
    seed: _Seed = 0,
    frames: Annotated[int, typer.Option(help="Held-out frames to look at, at most.")] = 1500,
) -> None:
    """Write a run as one HTML page that opens without a network."""
    from lewm.page import report

    typer.echo(report(run, data=data, out=out, seed=seed, frames=frames))


@app.command()
def voe(
    model: _Model,
    stats: _Stats = None,
    task: Annotated[
        str | None, typer.Option(help="two-room, pusht, reacher or cube; that of the model's data by default.")
    ] = None,
    clips: Annotated[int, typer.Option(help="Matched clips.")] = 100,
    blocks: Annotated[int, typer.Option(help="Predictor steps of a clip; the change is in its middle.")] = 12,
    out: Annotated[Path, typer.Option(help="Folder for voe.json, voe.png and voe.gif.")] = Path("voe"),
    seed: _Seed = 0,
) -> None:
    """Violation of expectation: is the model surprised by a changed colour, and by what is teleported?"""
    from lewm.expectation import voe
    from lewm.progress import Bar

    loaded = _loaded(model, stats)
    with Bar("clips") as bar:
        result = voe(loaded, task, clips=clips, seed=seed, blocks=blocks, out=out, progress=bar.count)
    typer.echo(str(result))


@app.command()
def probe(
    model: _Model,
    data: _Store,
    columns: Annotated[
        list[str] | None, typer.Option(help="A column to read, of several; state, or all, by default.")
    ] = None,
    frames: Annotated[int, typer.Option(help="How many to fit on, at most, and to test on, about.")] = 4096,
    seed: _Seed = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """What of the recorded states can be read off latents, linearly and by an MLP, and how straight latents move."""
    from lewm.probes import probe
    from lewm.progress import Bar

    loaded = _loaded(model, None)
    with Bar("frames") as bar:
        result = probe(loaded, data, columns=columns, frames=frames, seed=seed, out=out, progress=bar.count)
    typer.echo(str(result))


bench_app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def _bench() -> None:
    """Measure on this machine."""


@bench_app.command("systems")
def bench_systems(
    task: Annotated[str, typer.Option(help="A recipe, whose data, settings and protocol all have.")] = "two-room",
    size: Annotated[str | None, typer.Option(help="Of the recipe; by default the one for this machine.")] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="lewm, pldm, no-regulariser, stop-gradient, ema, dino-wm, dino-random, ...; all by default."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Store to learn from; by default the recipe's, collected.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; what it has is kept. runs/systems-TASK-SIZE-SEED by default.")
    ] = None,
    seed: _Seed = 0,
    pairs: Annotated[int | None, typer.Option(help="To solve; by default the protocol's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each training; by default the recipe's.")] = None,
    rows: Annotated[
        list[Path] | None, typer.Option(help="JSON of a row, or of several, that was measured elsewhere.")
    ] = None,
    dino_weights: Annotated[Path | None, typer.Option(help="DINOv2's weights, a local file.")] = None,
    device: Annotated[str | None, typer.Option(help="To train on, as cpu or cuda:0.")] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing: print the table of this systems.json.")] = None,
) -> None:
    """LeWM beside other systems on the same data, encoder size, planner and pairs: the article's table."""
    from lewm.progress import Bar
    from lewm.systems import SystemsTable
    from lewm.systems import bench_systems as bench

    if show is not None:
        typer.echo(str(SystemsTable.load(show)), nl=False)
        return
    with Bar("") as bar:
        table = bench(
            task,
            size,
            systems=system or None,
            seed=seed,
            out=out,
            data=data,
            pairs=pairs,
            steps=steps,
            rows=rows or (),
            dino_weights=dino_weights,
            device=device,
            progress=lambda what, done, total: bar.count(done, total, what),
        )
    typer.echo(str(table), nl=False)


@app.command()
def imagine(
    model: _Model,
    data: _Store,
    stats: _Stats = None,
    decoder: Annotated[
        Path | None,
        typer.Option(
            help="What paints latents; trained there if it is not. decoder.safetensors by the model if absent."
        ),
    ] = None,
    episodes: Annotated[int, typer.Option(help="Held-out episodes to show.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Blocks to imagine; to the end of each episode by default.")] = None,
    decoder_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, if it is trained; 3000 by default. Small things take more.")
    ] = None,
    seed: _Seed = 0,
    out: Annotated[Path, typer.Option(help="GIF to write.")] = Path("imagined.gif"),
) -> None:
    """Show real episodes beside what the model imagines from their first frames and their actions."""
    from lewm.data import Dataset
    from lewm.decoder import load_decoder, train_decoder
    from lewm.imagination import draw_imagination, imagine_episodes, table
    from lewm.progress import Bar

    loaded, store = _loaded(model, stats), Dataset(data)
    imagine_episodes(loaded, store, episodes=episodes, steps=steps, seed=seed)  # what is wrong shows before training
    file = decoder or _decoder_of(model, out)
    if file.is_file():
        painter = load_decoder(file, loaded)
    else:
        typer.echo(f"no decoder yet: training one, {file}")
        with Bar("steps") as bar:
            painter = train_decoder(loaded, store, steps=decoder_steps, seed=seed, out=file, progress=bar.count)
    typer.echo(repr(painter))
    found = imagine_episodes(loaded, store, painter, episodes=episodes, steps=steps, seed=seed)
    draw_imagination(found, out)
    typer.echo("blocks  clips  latent error (of standing still)  imagined dB (reconstructed)")
    for row in table(found):
        typer.echo(
            f"{row['blocks']:6}  {row['clips']:5}  {row['error']:12.3g} ({row['error_still']:.3g})".ljust(49)
            + f"{row['psnr_imagined']:6.1f} ({row['psnr_reconstructed']:.1f})"
        )
    typer.echo(out)


def _decoder_of(model: Path, out: Path) -> Path:
    """Where the decoder of a model is: beside it; beside what is to be written if the model is of the Hub."""
    folder = model if model.is_dir() else model.parent if model.is_file() else out.parent
    return folder / "decoder.safetensors"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier demo in it is replaced.")] = Path("runs/demo"),
    seed: _Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; the preset's by default.")] = None,
) -> None:
    """Collect, train, evaluate and draw TwoRoom on a CPU, in a few minutes."""
    from lewm.demo import demo

    demo(out, seed=seed, steps=steps)


@app.command()
def doctor() -> None:
    """What of lewm works on this machine, and what to install for the rest."""
    from lewm.doctor import report

    typer.echo(report())


@data_app.command("info")
def data_info(path: _Store) -> None:
    """What a store holds: episodes, size, schema, metadata."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lewm._core import StoreError
    from lewm.data import Dataset

    try:
        data = Dataset(path)
    except StoreError as error:
        _damage([str(error)])
    files = [file for file in path.iterdir() if file.name.startswith("shard-")]
    stored = sum(file.stat().st_size for file in files)
    raw = data.frame_count * data.height * data.width * 3
    lengths = f", {data.lengths.min()} to {data.lengths.max()} each" if len(data) else ""
    rows = {
        "episodes": f"{len(data):,}",
        "frames": f"{data.frame_count:,}{lengths}",
        "frame": f"{data.height} x {data.width} x 3 uint8",
        "action": f"{data.action_dim} float32",
        "columns": ", ".join(f"{name}: {width} float64" for name, width in data.columns.items()) or "none",
        "on disk": f"{stored / 1e6:,.3g} MB" + (f", frames alone raw {raw / stored:.1f} times that" if raw else ""),
        "shards": f"{sum(file.suffix == '.data' for file in files):,}",
        "fingerprint": data.fingerprint(),
        **{f"metadata.{name}": json.dumps(value) for name, value in data.metadata.items()},
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, Text(value))
    Console(soft_wrap=True).print(table)


@data_app.command("card")
def data_card(
    path: _Store,
    out: Annotated[Path | None, typer.Option(help="Folder; the store's name with .card by default.")] = None,
) -> None:
    """Write what a store covers and where it came from: card.json and card.png."""
    from lewm.card import write_card

    write_card(path, out)


@data_app.command("verify")
def data_verify(path: _Store) -> None:
    """Decode every byte and compare it with every checksum. Works while others write."""
    from lewm._core import verify_store
    from lewm.progress import Bar

    with Bar("bytes") as bar:
        episodes, frames, damage, notes = verify_store(path, bar.count)
    for note in notes:
        typer.echo(f"note: {note}")
    if damage:
        _damage(damage)
    typer.echo(f"{path}: {episodes} episodes, {frames} frames, all as they were committed")


@data_app.command("repair")
def data_repair(
    path: _Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Keep every whole episode; what cannot be read is moved to the folder `damaged` in the store, never deleted."""
    from lewm._core import repair_store
    from lewm.progress import Bar

    with Bar("bytes") as bar:
        episodes, frames, changes = repair_store(path, dry_run=dry_run, progress=bar.count)
    for change in changes:
        typer.echo(f"would be done: {change}" if dry_run else change)
    if not changes:
        typer.echo("nothing to repair")
    typer.echo(f"{path}: {episodes} episodes, {frames} frames")
    if dry_run and changes:
        raise typer.Exit(1)


def _damage(damage: list[str]) -> NoReturn:
    for text in damage:
        typer.secho("damage: ", fg="red", err=True, nl=False)
        typer.echo(text, err=True)
    raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from lewm import __version__

        typer.echo(__version__)
        raise typer.Exit


def _loaded(model: Path, stats: Path | None) -> Any:
    """The model, with the action statistics of a store or a JSON file where they are given."""
    from lewm.model import load

    if stats is None or stats.is_dir():
        return load(model, stats=stats)
    try:
        numbers = json.loads(stats.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"stats must be a store or JSON of mean, std, low, high; {stats} is neither: {error}"
        ) from None
    if not isinstance(numbers, dict):
        raise ValueError(f"stats must be an object of mean, std, low, high, got {type(numbers).__name__} in {stats}")
    return load(model, stats=numbers)


def _numbers(name: str, text: str | None) -> list[float] | float | None:
    """ "-1,-0.5" -> [-1.0, -0.5]; one number is that of every action."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, as -1,-1, got {text!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _picture(path: Path) -> Any:
    """The picture in a file, (H, W, 3) uint8 RGB."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{path} must be a picture, as PNG or JPEG") from None


def _settings(pairs: list[str]) -> dict[str, Any]:
    """["steps=300"] -> {"steps": 300}; values are JSON where they parse as such, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"a setting must be NAME=VALUE, got {pair!r}")
        if name in ("data", "recipe", "size", "preset", "out", "seed", "resume", "device", "compile", "profile"):
            raise ValueError(f"{name} has an option of its own, --{name}; got it as a setting")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def _planner(model: Any, words: list[str] | None) -> Any:
    from lewm.evaluation import PLANNERS, described
    from lewm.planner import planner_from

    if not words:
        return None
    names = [word for word in words if "=" not in word]
    if len(names) > 1 or not set(names) <= PLANNERS.keys():
        raise ValueError(f"planner must be NAME=VALUE or one of {', '.join(PLANNERS)}, got {' '.join(names)!r}")
    settings = _settings([word for word in words if "=" in word])
    if names:
        return planner_from({**described(PLANNERS[names[0]]), **settings})
    own = model.meta.get("planner") or {}
    # Settings made for one planner say nothing about another.
    same = settings.get("name", own.get("name", "cem")) == own.get("name", "cem")
    return planner_from({**(own if same else {}), **settings})


def main() -> None:
    """Entry point: what a user got wrong is one line, not a traceback."""
    from lewm import StoreError

    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError, MemoryError, ModuleNotFoundError, FloatingPointError, StoreError) as error:
        text = str(error)
        if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
            text += ': pip install "lewm-fast[train]"'  # all that a module here imports when it is loaded
        typer.secho("error: ", fg="red", err=True, nl=False)
        typer.echo(text, err=True)
        sys.exit(2)
