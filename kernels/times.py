"""How long the kernels should take on an H100 or H200, from their machine code. To be checked by `benches.gpu`.

    python -m lewm.kernels.times [--write]

A kernel takes a boundary between launches, a start, and the longest of: its bytes from memory, its bytes from the
second-level cache, and its blocks on the busiest multiprocessor. A block works c cycles (the busiest of its pipes) and
waits l (loads, barriers and tensor-core results that its next step needs); o blocks on a multiprocessor hide each
other's waits, so one round of them takes max(o c, c + l). Executed instructions are those of the machine code times the
trips of the loops around them, without bank conflicts, branches not taken, or reuse in the first-level cache.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import code

TABLE = Path(__file__).with_name("time-table.md")
MEASURED = Path(__file__).resolve().parent.parent / "benches" / "results" / "gemm-floor-h100-2026-11-22.jsonl"

# Hopper. [s] reference figures of this project (public sources), [v] NVIDIA's data sheets and programming guide,
# [a] assumed, [f] fitted to the measured library products (`library_layer`).
SMS = 132  # [v]
CLOCK = 1755.0  # cycles a microsecond: boost under load [a]; the most is 1980 [v]
TENSOR = 790e6 / (SMS * CLOCK)  # bfloat16 FLOP a cycle and multiprocessor: 790 TFLOP/s of 990 are attained [s]
TENSOR_RATE = {"bf16": 1.0, "f16": 1.0, "f8": 2.0, "tf32": 0.5}  # [v]
LIBRARY_FP32 = 0.75  # what library products attain of 256 FLOP a cycle and multiprocessor [f]
WARP_MMA = 0.62  # what HMMA attains of HGMMA's rate [a, from published micro-benchmarks]
L2 = 5.5e6  # bytes a microsecond, all multiprocessors [s]
L2_BYTES = 50e6  # [v]
BOUNDARY = 1.25  # microseconds from one kernel of a CUDA graph to the next [s]; one row measured 1.16
START = 0.7  # microseconds in which a kernel with matrix products fetches its code, sets up, and drains [f]
L2_LATENCY, HBM_LATENCY = 270.0, 600.0  # cycles [s]
BARRIER = 30.0  # cycles [a]
MMA_LATENCY = 60.0  # cycles until a dependent instruction has the result of HGMMA or HMMA [a]
IN_FLIGHT = 2.0  # tiles on their way in a pipelined loop: num_stages 3, Triton's default


@dataclass(frozen=True)
class Device:
    """What differs between the two."""

    name: str
    hbm: float  # bytes a microsecond [v]


H100, H200 = Device("H100", 3.35e6), Device("H200", 4.8e6)

# Cycles of a multiprocessor that one warp's instruction takes on its pipe: lanes a cycle from the guide's table [v].
# Instructions that are not named take the integer unit.
PIPES = {
    "fp32": (r"FFMA|FADD|FMUL", 32 / 128),
    "fp32 imad": (r"IMAD", 32 / 64),
    "mufu": (r"MUFU", 32 / 16),
    "shuffle": (r"SHFL", 32 / 32),
    "none": (r"LDG|LDGSTS|STG|LDS|STS|LDSM|STSM|[HQ]G?MMA|BAR|BRA|RED|REDG|ATOMG?|EXIT|NOP|UTMALDG|SYNCS|HFMA2", 0.0),
}
ALU = 32 / 64


@dataclass(frozen=True)
class Work:
    """What a kernel does, per block unless said otherwise."""

    blocks: int
    resident: int  # blocks that a multiprocessor holds
    cycles: dict[str, float]  # of a multiprocessor, by pipe
    waits: float  # cycles in which the block can do nothing
    l2_bytes: float  # read and written by all blocks
    hbm_bytes: float  # of all blocks, each once


def microseconds(work: Work, device: Device) -> dict[str, float]:
    """What limits a kernel, and "total": the longest of them with boundary and start."""
    busiest = -(-work.blocks // SMS)
    together = min(work.resident, busiest)
    c = max(work.cycles.values())
    rounds = -(-busiest // together)
    limits = {"hbm": work.hbm_bytes / device.hbm, "l2": work.l2_bytes / L2}
    limits["blocks"] = rounds * max(together * c, c + work.waits) / CLOCK
    return limits | {"total": BOUNDARY + START + max(limits.values())}


def executed(row: dict[str, Any], trips: Sequence[float], share: float = 1.0) -> tuple[collections.Counter[str], float]:
    """Instructions that each warp of a block executes, and the cycles it waits for results.

    Args:
        row: Of `code.examine` for sm_90.
        trips: Of each loop that does more than wait for memory, by address; those of one trip may be gone, or all of
            up to four.
        share: Of the blocks that execute what a block can jump over.

    Raises:
        ValueError: if the machine code has another number of such loops.
    """
    loops = row["loops"]
    working = [loop for loop in loops if loop["fp32"] + loop["tensor"] + loop["global"] + loop["shared"]]
    for unrolled in (1, 4):
        if len(trips) != len(working):
            trips = [count for count in trips if count > unrolled]
    if len(trips) != len(working):
        raise ValueError(f"trips must be given for {len(working)} loops of {row['kernel']}, got {list(trips)}")
    turns = iter(trips)
    own = [next(turns) if any(loop is one for one in working) else 1 for loop in loops]

    def times(index: int | None) -> float:
        return 1.0 if index is None else own[index] * times(loops[index]["within"])

    total: collections.Counter[str] = collections.Counter()
    waits = 0.0
    for index, region in [(None, row["outside"]), *enumerate(loops)]:
        base: collections.Counter[str] = collections.Counter()
        for op, count in region["ops"].items():
            count = times(index) * (count - (1 - share) * region["skipped"].get(op, 0))
            total[op] += count
            base[op.split(".")[0]] += count
        loads = L2_LATENCY if base["LDG"] else L2_LATENCY / IN_FLIGHT if base["LDGSTS"] + base["UTMALDG"] else 0.0
        tensor = MMA_LATENCY * any(re.fullmatch(code.TENSOR, op) for op in base)
        waits += times(index) * (loads + tensor) + BARRIER * base["BAR"]
    return total, waits


def _bytes(op: str) -> int:
    """Bytes that one warp moves with a load or store."""
    if op.startswith(("LDSM", "STSM")):
        return 128 * int(op[-1]) if op[-1] in "24" else 128
    bits = re.search(r"\.(U?8|S8|U16|S16|64|128)\b", op)
    return 32 * (int(re.sub(r"\D", "", bits[1])) // 8 if bits else 4)


def _flop(op: str) -> tuple[float, str]:
    """FLOP of one warp's tensor-core instruction, and the type it multiplies."""
    kind = "f8" if re.search(r"E4M3|E5M2|QG?MMA", op) else "tf32" if "TF32" in op else "bf16"
    if wide := re.match(r"\wGMMA\.(\d+)x(\d+)x(\d+)", op):  # four warps together
        return 2.0 * int(wide[1]) * int(wide[2]) * int(wide[3]) / 4, kind
    shape = re.match(r"\wMMA\.(16)(8)(\d+)", op)
    return (2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0.0), kind


def work_of(launch: code.Launch, row: dict[str, Any], trips: Sequence[float], share: float = 1.0) -> Work:
    """The work of a launch, whose row on sm_90 is given, with trips and share of `executed`."""
    ops, waits = executed(row, trips, share)
    warps = row["warps"]
    cycles: collections.Counter[str] = collections.Counter()
    moved = 0.0
    for op, count in ops.items():
        base = op.split(".")[0]
        count *= warps
        cycles["issue"] += count / 4
        pipe, cost = next(((p, c) for p, (kinds, c) in PIPES.items() if re.fullmatch(kinds, base)), ("alu", ALU))
        cycles["fp32" if pipe == "fp32 imad" else "shared" if pipe == "shuffle" else pipe] += count * cost
        if base in ("LDS", "STS", "LDSM", "STSM"):
            cycles["shared"] += count * _bytes(op) / 128
        elif base in ("LDG", "LDGSTS", "STG", "RED", "REDG", "ATOMG"):
            moved += count * _bytes(op)
        elif re.fullmatch(code.TENSOR, base):
            flop, kind = _flop(op)
            cycles["tensor"] += count * flop / (TENSOR * TENSOR_RATE[kind] * (1 if base[1] == "G" else WARP_MMA))
    blocks = 1
    for size in launch.grid:
        blocks *= size
    tensors = {id(a): a.numel() * a.element_size() for a in launch.args if hasattr(a, "element_size")}
    once = float(sum(tensors.values()))
    cold = once > L2_BYTES
    waits += HBM_LATENCY if cold else L2_LATENCY  # the first load, which nothing hides
    waits += L2_LATENCY * CHAIN.get(row["kernel"], 0)
    return Work(
        blocks,
        max(row["occupancy"], 1),
        dict(cycles),
        waits,
        blocks * moved,
        min(once, blocks * moved) if cold else 0.0,
    )


def library_layer(rows: int, kind: str, device: Device = H100) -> float:
    """Microseconds of one predictor layer's four products and GELU with library kernels in a graph, at the best tiles.

    What `benches/results/gemm-floor-*.jsonl` measured: the fitted constants come from there.

    Args:
        rows: M of all products.
        kind: "bf16", "tf32" or "fp32".
        device: H100 or H200.
    """
    size = 2 if kind == "bf16" else 4

    def product(n: int, k: int, tile_m: int, tile_n: int, splits: int) -> float:
        depth = k / splits
        rate = LIBRARY_FP32 * 256 if kind == "fp32" else TENSOR * TENSOR_RATE[kind]
        waits = 2 * L2_LATENCY + depth * size / 128 * L2_LATENCY / (IN_FLIGHT + 1)  # 128 bytes a row and step
        blocks = -(-rows // tile_m) * -(-n // tile_n) * splits
        once = (rows * k + k * n + rows * n) * size
        l2 = (blocks * (tile_m + tile_n) * depth + rows * n) * size
        cycles = {"product": 2 * tile_m * tile_n * depth / rate}
        work = Work(blocks, 1, cycles, waits, l2, once if once > L2_BYTES else 0)
        return microseconds(work, device)["total"] + (splits > 1) * (BOUNDARY + 2 * L2_LATENCY / CLOCK)

    tiles = [(m, n, splits) for m in (64, 128, 256) for n in (64, 128, 256) for splits in (1, 2, 4, 8) if m * n < 2**16]
    best = sum(
        min(product(n, k, *tile) for tile in tiles) for n, k in ((3072, 192), (192, 1024), (2048, 192), (192, 2048))
    )
    moved = 2.0 * rows * 2048 * size
    gelu = Work(rows * 2, 8, {"alu": 256.0}, 2 * L2_LATENCY, moved, moved if moved > L2_BYTES else 0)
    return best + microseconds(gelu, device)["total"]


# Loads outside of loops that depend on an earlier one: the operand is written and read again, then come the attention's
# output matrix and gate; the MLP's weights; order, elites and the best of the elites.
CHAIN = {"_attention_kernel": 3, "_mlp_kernel": 1, "_refit_kernel": 3}


def _attention_trips(a: dict[str, Any]) -> list[float]:
    """Position 0's loops, one for each tile of columns, then that over heads and the one inside it."""
    tiles = a["N"] // a["C"]
    turns = tiles if tiles > 4 else 1  # the compiler unrolls short loops
    return [*[turns] * (tiles if a["ASKS"] == 0 else 0), a["HEADS"] // a["SPLITS"], turns]


# Trips of a kernel's loops by address, from its arguments by name; a kernel that is not named has no loops.
TRIPS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "_sigreg_fwd_kernel": lambda a: [-(-a["B"] // a["BLOCK_B"]), -(-a["D"] // a["BLOCK_D"]), a["KNOTS"] - 1],
    "_attention_kernel": _attention_trips,
    "_condition_kernel": lambda a: [a["HIDDEN"] // a["CHUNK"]],
    "_mlp_kernel": lambda a: [a["HIDDEN"] // a["SPLITS"] // a["CHUNK"]],
    "_refit_kernel": lambda a: [-(-a["K"] // a["CHUNK"]), -(-a["K"] // a["CHUNK"])],
    "_sigreg_bwd_kernel": lambda a: [-(-a["columns_per_split"] // a["BLOCK_P"]), -(-a["D"] // a["BLOCK_D"])],
}


Run = tuple[str, list[tuple[code.Launch, int]]]


def plan(environments: int, precision: str, prefix: bool = False) -> Run:
    """All launches of a plan of the paper's size, 300 candidates and 30 iterations for each environment.

    With `prefix` that of an action-prefix model.
    """
    import torch

    from lewm.config import configure
    from lewm.kernels import planner, rollout
    from lewm.network import LeWM

    config, _ = configure("paper", 2, {"history": 1, "action_prefix": True} if prefix else {})
    with torch.device("meta"):
        weights = rollout.pack(config, LeWM(config).state_dict(), precision, "meta")
    search = rollout.Rollout(weights, 300 * environments, 1, 5)
    final = rollout.Rollout(weights, environments, 1, 5, cut=search.cut)  # of the final mean
    launches = [(launch, 30) for launch in code.record(search.run)] + [(launch, 1) for launch in code.record(final.run)]
    for _, function in planner.examples(90, environments):
        launches += [(launch, 30) for launch in code.record(function)]
    return f"plan of {environments}, {precision}{', prefixes' if prefix else ''}", launches


def runs(module: str) -> list[Run]:
    """What is predicted of a module: its examples of the paper's size, and of the rollout whole plans."""
    if module == "rollout":
        both = [(environments, precision) for environments in (1, 50) for precision in ("bfloat16", "float32")]
        return [plan(*one) for one in both] + [plan(*one, prefix=True) for one in both]
    found = [] if module == "planner" else list(code.examples(module))
    return [(label, [(x, 1) for x in code.record(call)]) for label, call in found if label.startswith("paper")]


def predict(module: str) -> list[dict[str, Any]]:
    """Times of `runs`, one row for each kind of launch. Must not run under TRITON_INTERPRET=1."""
    result = []
    examined: dict[tuple[str, ...], dict[str, Any]] = {}
    for example, run in runs(module):
        launches: dict[str, tuple[str, Work, int]] = {}
        for launch, count in run:
            names = [p.name for p in launch.kernel.params]
            arguments = dict(zip(names, launch.args, strict=False)) | launch.options
            name = launch.kernel.__name__
            key = f"{launch.form} {launch.grid}"
            if key not in launches:
                if launch.form not in examined:
                    examined[launch.form] = {"kernel": name, **code.examine(launch, "sm_90")}
                # What one of several splits does, the others jump over.
                trips, share = TRIPS.get(name, lambda a: [])(arguments), 1 / arguments.get("SPLITS", 1)
                label = f"{name} {arguments['WINDOW']}-{arguments['ASKS']}" if "ASKS" in arguments else name
                launches[key] = label, work_of(launch, examined[launch.form], trips, share), 0
            launches[key] = *launches[key][:2], launches[key][2] + count
        for name, work, count in launches.values():
            pipe = max(work.cycles, key=lambda p: work.cycles[p])
            row = {"example": example, "kernel": name, "launches": count, "blocks": work.blocks, "waits": work.waits}
            row |= {"pipe": pipe, "cycles": work.cycles[pipe], "l2_mb": work.l2_bytes / 1e6}
            result.append(row | {device.name: microseconds(work, device)["total"] for device in (H100, H200)})
    return result


HEADER = """# What the kernels should take

Written by `python -m lewm.kernels.times --write` with {versions}, from the machine
code for sm_90. **Nothing here was measured** but the column that says so; `benches.gpu` is what checks it. Work and
waits are cycles of one block, in the pipe that is busiest; L2 is MB that all blocks read and write there; the last
columns are microseconds a launch in a CUDA graph, boundary of {boundary} and start of {start} included. Of the
attention kernel the numbers are window and first position that is asked for. A plan has 300 candidates and 30
iterations for each environment, and the final mean's rollout; encoding the observation, uploads and downloads are not
in it.

"""
CALIBRATION = """
The same arithmetic for a predictor layer of library kernels (best tiles), against rows measured on an H100
(`benches/results/gemm-floor-h100-2026-11-22.jsonl`). Start and the share of float32 were fitted to these rows, so small
errors are no proof; the large ones show how far to trust the model.

"""


def table(found: list[dict[str, Any]]) -> list[str]:
    """The predictions as lines of a Markdown table; an example with several launches has a line for their sum."""
    lines = ["| example | kernel | launches | blocks | work | waits | L2 | H100 | H200 |", "|---" * 9 + "|"]
    for example in dict.fromkeys(row["example"] for row in found):
        group = [row for row in found if row["example"] == example]
        for row in group:
            cells = [example, row["kernel"], row["launches"], row["blocks"], f"{row['cycles']:.0f} {row['pipe']}"]
            cells += [f"{row['waits']:.0f}", f"{row['l2_mb']:.1f}", f"{row['H100']:.1f}", f"{row['H200']:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if (launches := sum(row["launches"] for row in group)) > 1:
            total = [sum(row["launches"] * row[device.name] for row in group) for device in (H100, H200)]
            lines.append(f"| {example} | **all** | {launches} | | | | | {total[0]:.0f} | {total[1]:.0f} |")
    return lines


def calibration() -> list[str]:
    """Predicted and measured library layers as lines of a Markdown table."""
    lines = ["| rows | type | predicted | measured | error |", "|---" * 5 + "|"]
    for row in map(json.loads, MEASURED.read_text().splitlines()):
        if row["name"] == "gemm floor":
            kind = {"bfloat16": "bf16", "float32": "fp32"}.get(row["precision"], row["precision"])
            us, measured = library_layer(row["rows"], kind), row["graph_us_per_layer"]
            lines.append(f"| {row['rows']} | {kind} | {us:.1f} | {measured} | {100 * (us / measured - 1):+.0f} % |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args(arguments)
    with code.compilers() as pool:
        lines = table([row for rows in pool.map(predict, code.modules()) for row in rows])
    print("\n".join(lines))
    if options.write:
        head = HEADER.format(versions=code.versions(), boundary=BOUNDARY, start=START)
        TABLE.write_text(head + "\n".join(lines) + "\n" + CALIBRATION + "\n".join(calibration()) + "\n")


if __name__ == "__main__":
    main()
