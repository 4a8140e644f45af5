"""What the kernels become on each GPU, read back from their machine code. Needs no GPU.

    python -m lewm.kernels.code [--target sm_90 ...] [--kernel NAME] [--sass | --ptx] [--json FILE] [--write]

Host functions are called with tensors of the `meta` device; every launch they make is recorded and compiled for each
target with Triton's own ptxas, exactly as it would be on a GPU (alignment and ones included), and disassembled with
the nvdisasm beside it. A row says what one form of one kernel is made of: registers, shared memory, local memory,
tensor-core instructions, and what stands in its hot loop. `faults` says which rows are not allowed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
TABLE = Path(__file__).with_name("code-table.md")
TENSOR = r"[HQIDO]G?MMA|UTC\w*MMA"  # Ampere to consumer Blackwell, Hopper, datacenter Blackwell
# Columns of the table, and the instructions that each counts.
COUNTED = {
    "tensor": TENSOR,
    "fp32": r"FFMA2?|FMUL2?|FADD2?",
    "fp64": r"D(FMA|MUL|ADD|SETP)",
    "mufu": r"MUFU",
    "global": r"LDG|LDGSTS|UTMALDG|STG|UTMASTG|LD|ST",
    "shared": r"LDS|STS|LDSM|STSM",
    "atomic": r"RED\w*|ATOM\w*",
    "barrier": r"BAR|SYNCS",
    "local": r"LDL|STL",
}


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds (CUDA programming guide, table of compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes, of which each block takes 1 KB for the system
    registers: int = 65536


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024),
}


# What is launched in practice


def sigreg_examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """SIGReg at the paper's size, in the types that training gives it, and at its smallest."""
    import torch

    import lewm.kernels.sigreg as sigreg

    def forward(T, B, D, P, knots=17, dtype=torch.float32, precision="ieee"):
        z, u = torch.empty(T, B, D, dtype=dtype, device="meta"), torch.empty(D, P, device="meta")
        return lambda: sigreg.sigreg_forward._init_fn(z, u, knots, precision)

    def backward(T, B, D, P, statistic=True, ecf=False, knots=17, dtype=torch.float32, precision="ieee"):
        z, u = torch.empty(T, B, D, dtype=dtype, device="meta"), torch.empty(D, P, device="meta")
        saved = torch.empty(T, 2, knots - 1, P, device="meta")
        grad = torch.empty(T, P, device="meta") if statistic else None
        return lambda: sigreg.sigreg_backward._init_fn(z, u, saved, grad, saved if ecf else None, knots, precision)

    paper = 4, 128, 192, 1024
    yield "paper", forward(*paper)
    yield "paper, bfloat16 input", forward(*paper, dtype=torch.bfloat16)
    yield "paper, tf32", forward(*paper, precision="tf32")
    yield "ones", forward(1, 1, 1, 1, knots=2)
    yield "paper", backward(*paper)
    yield "paper, bfloat16 input", backward(*paper, dtype=torch.bfloat16)
    yield "paper, tf32", backward(*paper, precision="tf32")
    yield "paper, gradient of the characteristic function", backward(*paper, statistic=False, ecf=True)
    yield "ones", backward(1, 1, 1, 1, knots=2)


def modules() -> list[str]:
    """The modules beside this one that define kernels."""
    return sorted(path.stem for path in TABLE.parent.glob("*.py") if "@triton.jit" in path.read_text().splitlines())


def examples(module: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """`examples()` of `lewm.kernels.<module>`: a label and a call of a host function on `meta` tensors, each."""
    if module == "sigreg":
        return sigreg_examples()
    return importlib.import_module(f"lewm.kernels.{module}").examples()


@dataclass(frozen=True)
class Launch:
    """One kernel launch as a host function made it."""

    kernel: Any  # triton.runtime.JITFunction
    args: tuple[Any, ...]
    grid: tuple[int, ...]
    options: dict[str, Any]  # keyword arguments: constexprs and compile options

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments by name."""
        names = [p.name for p in self.kernel.params]
        given = dict(zip(names, self.args, strict=False)) | self.options
        return {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr and p.name in given}


def record(function: Callable[[], Any]) -> list[Launch]:
    """The launches that `function` makes, in order; nothing is run."""
    from triton.runtime.jit import JITFunction

    launches = []

    def note(kernel, *args, grid, warmup=False, **options):
        names = [p.name for p in kernel.params]
        grid = grid(dict(zip(names, args, strict=False)) | options) if callable(grid) else grid
        launches.append(Launch(kernel, args, tuple(grid) if isinstance(grid, (tuple, list)) else (grid,), options))

    run = JITFunction.run
    JITFunction.run = note
    try:
        function()
    finally:
        JITFunction.run = run
    return launches


def build(launch: Launch, target: str) -> Any:
    """The compiled kernel of a launch on `target` (Triton's CompiledKernel: `asm`, `metadata`)."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)

    class Driver:
        """Stands in for a GPU: Triton asks which it should compile for, and keeps what it compiled under the device."""

        get_current_target = staticmethod(lambda: gpu)
        get_current_device = staticmethod(lambda: target)
        get_current_stream = staticmethod(lambda device: 0)

    triton.runtime.driver.set_active(Driver)
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)


# Machine code


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    op: str  # without modifiers
    text: str
    conditional: bool
    target: str | None  # label that it may jump to


@dataclass
class Loop:
    """A natural loop."""

    first: int  # index of its first instruction
    counts: collections.Counter[str]
    inner: bool  # no other loop inside


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin, by the nvdisasm that Triton ships."""
    return _tool("nvdisasm", "-c", cubin=cubin)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack, by the cuobjdump that Triton ships."""
    text = _tool("cuobjdump", "-res-usage", cubin=cubin)
    return {
        name: int(re.search(rf"\b{key}:(\d+)", text)[1]) for name, key in (("registers", "REG"), ("stack", "STACK"))
    }


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index that each label stands before."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+ )?\s*(\w+)([^;]*)", line):
            guard, op, rest = found.groups()
            jump = re.search(r"`\((\.L\w+)\)", rest) if op != "BSSY" else None
            # BRA.U UP0, `(.L) is conditional though nothing stands before it.
            conditional = bool(guard) or bool(re.search(r"\bU?P\d", rest)) or op not in ("BRA", "EXIT", "RET")
            code.append(Instruction(op, line.strip(), conditional, jump[1] if jump else None))
    return code, labels


def loops(code: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Natural loops (header dominates the jump back to it), by address: code moved out of line is not one."""
    leaders = sorted({0, *labels.values(), *(i + 1 for i, x in enumerate(code) if x.target or x.op in ("EXIT", "RET"))})
    leaders = [i for i in leaders if i < len(code)]
    block_of = {i: n for n, i in enumerate(leaders)}
    ends = [*leaders[1:], len(code)]
    after: list[set[int]] = []
    for n, end in enumerate(ends):
        last = code[end - 1]
        to = labels.get(last.target, len(code))
        # A trap behind the end jumps to itself for ever.
        jumps = {block_of[to]} if to < len(code) and (last.conditional or to != end - 1) else set()
        after.append(jumps | ({n + 1} if last.conditional and n + 1 < len(ends) else set()))
    before = [{m for m, to in enumerate(after) if n in to} for n in range(len(ends))]

    everything = set(range(len(ends)))
    dominators = [{0}] + [everything] * (len(ends) - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(ends)):
            new = {n} | (set.intersection(*(dominators[m] for m in before[n])) if before[n] else set())
            changed |= new != dominators[n]
            dominators[n] = new

    bodies: dict[int, set[int]] = {}
    for tail, to in enumerate(after):
        for head in to & dominators[tail]:
            body, todo = bodies.setdefault(head, {head}), [tail]
            while todo:
                if (n := todo.pop()) not in body:
                    body.add(n)
                    todo += before[n]
    return [
        Loop(
            leaders[head],
            collections.Counter(x.op for n in body for x in code[leaders[n] : ends[n]]),
            not any(other != head and other in body for other in bodies),
        )
        for head, body in sorted(bodies.items())
    ]


def grouped(counts: collections.Counter[str]) -> dict[str, int]:
    """Instruction counts by the columns of the table, and all of them."""
    groups = {name: sum(n for op, n in counts.items() if re.fullmatch(ops, op)) for name, ops in COUNTED.items()}
    return {"all": sum(counts.values()), **groups}


def occupancy(target: str, registers: int, warps: int, shared: int) -> int:
    """Blocks that one multiprocessor holds at a time."""
    limits = LIMITS[target]
    per_warp = -(-registers // 8) * 8 * 32  # registers are given by 256 to a warp
    by_registers = limits.registers // (per_warp * -(-warps // 4) * 4)
    return min(limits.blocks, limits.warps // warps, by_registers, limits.shared // (shared + 1024))


def products(ttir: str) -> list[str]:
    """What the kernel's matrix products multiply: "bf16", "f8E4M3FN", "f32 ieee", "f32 tf32"..."""
    kinds = set()
    for attributes, kind in re.findall(r"\btt\.dot\w*\s([^:]*): tensor<[0-9x]+x(\w+)", ttir):
        precision = re.search(r"inputPrecision = (\w+)", attributes)
        kinds.add(f"f32 {precision[1] if precision else 'ieee'}" if kind == "f32" else kind)
    return sorted(kinds)


def examine(launch: Launch, target: str) -> dict[str, Any]:
    """The row of one launch on one target."""
    compiled = build(launch, target)
    row = {
        "target": target,
        "kernel": launch.kernel.__name__,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "products": products(compiled.asm["ttir"]),
    }
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        local, tensor = len(re.findall(r"\bscratch_(?:load|store)", text)), len(re.findall(r"\bv_mfma", text))
        return row | {"registers": number["vgpr_count"], "stack": number["vgpr_spill_count"],
                      "counts": {"tensor": tensor, "local": local}, "loops": [], "hot": None}  # fmt: skip
    code, labels = parse(disassemble(compiled.asm["cubin"]))
    found = loops(code, labels)
    every = [grouped(loop.counts) for loop in found]
    # Work decides which loop is hot: tensor-core instructions first, then float32 arithmetic.
    inner = [counts for loop, counts in zip(found, every, strict=True) if loop.inner]
    hot = max(inner, key=lambda c: (c["tensor"], c["fp32"], c["all"]), default=None)
    row |= resources(compiled.asm["cubin"])
    row |= {"counts": grouped(collections.Counter(x.op for x in code)), "loops": every, "hot": hot}
    row["occupancy"] = occupancy(target, row["registers"], row["warps"], row["shared"])
    return row


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: nothing for gfx942, which other tools read.

    Exact float32 may keep a register in local memory outside of its loops, and uses no tensor cores.
    """
    if row["target"].startswith("gfx"):
        return []
    wrong = []
    if any(loop["local"] for loop in row["loops"]):
        wrong.append("local memory in a loop")
    elif (row["counts"]["local"] or row["stack"]) and row["products"] != ["f32 ieee"]:
        wrong.append("local memory")
    if row["counts"]["fp64"]:
        wrong.append("float64")
    if set(row["products"]) - {"f32 ieee"} and not row["counts"]["tensor"]:
        wrong.append(f"{', '.join(row['products'])} products without tensor cores")
    if row["occupancy"] < 1:
        wrong.append("does not fit on a multiprocessor")
    return wrong


def rows(module: str, target: str, kernel: str = "", dump: str | None = None) -> list[dict[str, Any]]:
    """One row for each form in which the kernels of a module are launched. Must not run under TRITON_INTERPRET=1."""
    forms: dict[tuple[str, str], dict[Any, Launch]] = {}
    for example, function in examples(module):
        for launch in record(function):
            name = launch.kernel.__name__
            if kernel in name:
                forms.setdefault((name, example), {}).setdefault(build(launch, target).hash, launch)
    result = []
    for (_, example), launches in forms.items():
        every = [launch.constants for launch in launches.values()]
        differing = [name for name in every[0] if len({str(c.get(name)) for c in every}) > 1]
        for constants, launch in zip(every, launches.values(), strict=True):
            form = ", ".join([example, *(f"{name}={constants.get(name)}" for name in differing)])
            row = {"module": module, "form": form, **examine(launch, target)}
            result.append(row | {"faults": faults(row)})
            if dump:
                asm = build(launch, target).asm
                print(f"// {row['kernel']} ({form}), {target}")
                print(asm.get("amdgcn") or (asm["ptx"] if dump == "ptx" else disassemble(asm["cubin"])))
    return result


def versions() -> str:
    """Triton and the two assemblers that it ships."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = {}
    for tool in ("ptxas", "ptxas-blackwell"):
        with contextlib.suppress(OSError):
            text = subprocess.run([folder / tool, "--version"], capture_output=True, text=True).stdout
            found[tool] = text.rsplit("release ", 1)[-1].split(",")[0]
    return ", ".join([f"Triton {triton.__version__}", *(f"{tool} {version}" for tool, version in found.items())])


def survey(targets: tuple[str, ...] = TARGETS, kernel: str = "", dump: str | None = None) -> list[dict[str, Any]]:
    """Rows of all modules on all targets, from processes of their own that do not interpret the kernels."""
    jobs = [(module, target) for module in modules() for target in targets]
    if dump:
        return [row for job in jobs for row in rows(*job, kernel, dump)]
    context = multiprocessing.get_context("spawn")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            results = [pool.submit(rows, *job, kernel) for job in jobs]
            return [row for result in results for row in result.result()]
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown, kernel by kernel."""
    head = ["kernel", "form", "target", "registers", "warps", "shared", "blocks/SM", "products", *COUNTED]
    lines = [f"| {' | '.join([*head, 'faults'])} |", "|" + "---|" * (len(head) + 1)]
    for row in found:
        hot = row["hot"] or {}
        cells = [f"{row['counts'].get(n, '')}" + (f" ({hot[n]})" if hot.get(n) else "") for n in COUNTED]
        start = [row["kernel"], row["form"], row["target"], row["registers"], row["warps"], row["shared"]]
        line = [
            *start,
            row.get("occupancy", ""),
            ", ".join(row["products"]),
            *cells,
            "; ".join(row["faults"]) or "none",
        ]
        lines.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, and ends with status 1 if a row has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="all of them unless given")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--sass", dest="dump", action="store_const", const="sass", help="print the machine code, too")
    parser.add_argument("--ptx", dest="dump", action="store_const", const="ptx", help="print the PTX, too")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args(arguments)
    if options.dump and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: there is no machine code in the interpreter")
    if options.write and (options.target or options.kernel):
        parser.error("--write is for the whole table: leave --target and --kernel out")
    found = survey(tuple(options.target or TARGETS), options.kernel, options.dump)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "rows": found}, indent=1) + "\n")
    if options.write:
        TABLE.write_text(f"{table(found)}\n")
    if any(row["faults"] for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
