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
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
TABLE = Path(__file__).with_name("code-table.md")
EXACT = {"f32 ieee", "f32 tf32x3"}  # products that round to float32; the first takes no tensor cores
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


def modules() -> list[str]:
    """The modules beside this one that define kernels (functions named `..._kernel`)."""
    return sorted(path.stem for path in TABLE.parent.glob("*.py") if kernels(path.stem))


def kernels(module: str) -> list[str]:
    """Names of the kernels that a module defines, without importing it."""
    text = TABLE.with_name(f"{module}.py").read_text()
    return re.findall(r"^@triton\.jit\b.*\ndef (\w+_kernel)\(", text, re.MULTILINE)


def examples(module: str, target: str = "sm_90") -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is launched in practice, by a module of `lewm.kernels`: labels, and calls of host functions on `meta`."""
    capability = int(target[3:]) if target.startswith("sm") else 0
    return importlib.import_module(f"lewm.kernels.{module}").examples(capability)


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

    @property
    def form(self) -> tuple[str, ...]:
        """The same for two launches that Triton compiles to the same code."""
        return self.kernel.__name__, str([_specialised(value) for value in self.args]), str(self.options)


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
    """One instruction of SASS."""

    op: str  # with its modifiers: LDG.E.128
    falls: bool  # the next instruction may follow it
    target: str | None  # label that it may jump to


@dataclass
class Region:
    """What stands in one loop and in none inside it, or outside of all loops."""

    within: int | None  # index of the next larger loop, or None
    ops: collections.Counter[str] = field(default_factory=collections.Counter)
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)  # of them, what a pass may jump over


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
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+ )?\s*([\w.]+)([^;]*)", line):
            guard, op, rest = found.groups()
            jump = None if op.startswith("BSSY") else re.search(r"`\((\.L\w+)\)", rest)
            # BRA.U UP0, `(.L) has a condition, though none stands before it.
            always = not guard and not re.search(r"\bU?P\d", rest) and op.split(".")[0] in ("BRA", "EXIT", "RET")
            code.append(Instruction(op, not always, jump[1] if jump else None))
    return code, labels


def regions(code: list[Instruction], labels: dict[str, int]) -> tuple[Region, list[Region]]:
    """What is outside of all loops, and the natural loops by address.

    A loop is what leads from a block back to one that dominates it, so code that was only moved out of line is none.
    """
    starts = {0, *labels.values(), *(i + 1 for i, x in enumerate(code) if x.target or not x.falls)}
    first = sorted(i for i in starts if i < len(code))
    end = [*first[1:], len(code)]
    number = {i: n for n, i in enumerate(first)}
    after: list[set[int]] = []
    for n in range(len(first)):
        last = code[end[n] - 1]
        to = labels.get(last.target, len(code))
        # A trap behind the end jumps to itself for ever.
        jump = {number[to]} if to < len(code) and (last.falls or to != end[n] - 1) else set()
        after.append(jump | ({n + 1} if last.falls and n + 1 < len(first) else set()))
    before: list[set[int]] = [{m for m, to in enumerate(after) if n in to} for n in range(len(first))]

    dominators = [{0}] + [set(range(len(first)))] * (len(first) - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(first)):
            new = {n}.union(set.intersection(*(dominators[m] for m in before[n])) if before[n] else ())
            changed |= new != dominators[n]
            dominators[n] = new

    bodies: dict[int, set[int]] = {}
    always: dict[int | None, set[int]] = {}  # blocks that every turn of a loop, or every run to the end, goes through
    for tail, to in enumerate(after):
        if code[end[tail] - 1].op == "EXIT" and 0 in dominators[tail]:
            always[None] = always.get(None, dominators[tail]) & dominators[tail]
        for head in to & dominators[tail]:
            always[head] = always.get(head, dominators[tail]) & dominators[tail]
            body, todo = bodies.setdefault(head, {head}), [tail]
            while todo:
                if (n := todo.pop()) not in body:
                    body.add(n)
                    todo += before[n]
    heads = sorted(bodies)

    def innermost(n: int, but: int = -1) -> int | None:
        around = [head for head in heads if n in bodies[head] and head != but]
        return heads.index(min(around, key=lambda head: len(bodies[head]))) if around else None

    outside, loops = Region(None), [Region(innermost(head, head)) for head in heads]
    for n in range(len(first)):
        loop = innermost(n)
        region = outside if loop is None else loops[loop]
        ops = [x.op for x in code[first[n] : end[n]]]
        region.ops.update(ops)
        if n not in always.get(None if loop is None else heads[loop], ()):
            region.skipped.update(ops)
    return outside, loops


def grouped(ops: collections.Counter[str]) -> dict[str, int]:
    """Instruction counts by the columns of the table, and all of them."""
    bases = [(op.split(".")[0], n) for op, n in ops.items()]
    groups = {name: sum(n for op, n in bases if re.fullmatch(kinds, op)) for name, kinds in COUNTED.items()}
    return {"all": sum(ops.values()), **groups}


def occupancy(target: str, registers: int, warps: int, shared: int) -> int:
    """Blocks that one multiprocessor holds at a time."""
    limits = LIMITS[target]
    per_warp = -(-registers // 8) * 8 * 32
    by_registers = limits.registers // 4 // per_warp * 4 // warps  # each of four schedulers has a quarter
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
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "products": products(compiled.asm["ttir"]),
        "double": any(str(getattr(value, "dtype", "")) == "torch.float64" for value in launch.args),
    }
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        local, tensor = len(re.findall(r"\bscratch_(?:load|store)", text)), len(re.findall(r"\bv_mfma", text))
        return row | {"registers": number["vgpr_count"], "stack": number["vgpr_spill_count"], "loops": [], "hot": {},
                      "counts": {"tensor": tensor, "local": local}}  # fmt: skip
    outside, loops = regions(*parse(disassemble(compiled.asm["cubin"])))
    groups = [grouped(loop.ops) for loop in loops]
    row |= resources(compiled.asm["cubin"])
    return row | {
        "occupancy": occupancy(target, row["registers"], row["warps"], row["shared"]),
        "counts": grouped(sum((loop.ops for loop in loops), outside.ops)),
        "outside": vars(outside),
        "loops": [vars(loop) | group for loop, group in zip(loops, groups, strict=True)],
        # Work decides which loop is hot: tensor cores first, then float32 arithmetic.
        "hot": max(groups, key=lambda group: (group["tensor"], group["fp32"], group["all"]), default={}),
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: nothing for gfx942, which other tools read.

    Exact float32 may keep a register in local memory outside of its innermost loops, and a kernel that is given float64
    tensors calculates in float64.
    """
    if row["target"].startswith("gfx"):
        return []
    wrong = []
    exact = EXACT.issuperset(row["products"] or ["none"])
    around = {loop["within"] for loop in row["loops"]} if exact else set()
    if any(loop["local"] for index, loop in enumerate(row["loops"]) if index not in around):
        wrong.append("local memory in a loop")
    elif row["counts"]["local"] and not exact:
        wrong.append("local memory")
    if row["counts"]["fp64"] and not row["double"]:
        wrong.append("float64")
    if set(row["products"]) - {"f32 ieee"} and not row["counts"]["tensor"]:
        wrong.append(f"{', '.join(row['products'])} products without tensor cores")
    if row["products"] == ["f32 ieee"] and row["counts"]["tensor"]:
        wrong.append("exact float32 products on tensor cores")
    if row["occupancy"] < 1:
        wrong.append("does not fit on a multiprocessor")
    return wrong


@functools.cache
def forms(module: str, target: str, kernel: str = "") -> list[tuple[str, str, Launch]]:
    """Every form in which the kernels of a module are launched on a target: kernel, label and one such launch.

    Launches have the same form if Triton compiles them to the same code: types, constants, and what it asks of
    pointers and integers (a multiple of 16, 1). A form belongs to the first example that has it.
    """
    seen = set()
    groups: dict[tuple[str, str], list[Launch]] = {}
    for example, function in examples(module, target):
        for launch in record(function):
            name = launch.kernel.__name__
            form = launch.form
            if kernel in name and form not in seen:
                seen.add(form)
                groups.setdefault((name, example), []).append(launch)
    found = []
    for (name, example), launches in groups.items():
        every = [launch.constants for launch in launches]
        differing = [key for key in every[0] if len({str(constants.get(key)) for constants in every}) > 1]
        for constants, launch in zip(every, launches, strict=True):
            label = ", ".join([example, *(f"{key} {constants.get(key)}" for key in differing)])
            found.append((name, label, launch))
    return found


def _specialised(value: Any) -> tuple[Any, ...]:
    """What Triton compiles anew for."""
    if hasattr(value, "data_ptr"):
        return str(value.dtype), value.data_ptr() % 16 == 0
    return (value == 1, value % 16 == 0, value < 2**31) if type(value) is int else (value,)


def row(module: str, target: str, kernel: str, index: int, dump: str | None = None) -> dict[str, Any]:
    """The row of one of `forms`, with its faults. Must not run under TRITON_INTERPRET=1."""
    name, label, launch = forms(module, target, kernel)[index]
    found = {"module": module, "kernel": name, "form": label, "target": target}
    try:
        found |= examine(launch, target)
    except Exception as failure:  # whatever the compiler raises is a finding about this kernel
        error = f"{name} does not compile: {type(failure).__name__}: {failure}"
        return found | {"faults": [" ".join(error.split())[:200].replace("|", "/")]}
    if dump:
        asm = build(launch, target).asm
        print(f"// {name} ({label}), {target}")
        print(asm.get("amdgcn") or (asm["ptx"] if dump == "ptx" else disassemble(asm["cubin"])))
    return found | {"faults": faults(found)}


def compiled(module: str, target: str, kernel: str, index: int) -> None:
    """Leaves one of `forms` in Triton's cache, where a launch finds it."""
    with contextlib.suppress(Exception):  # the launch will say what is wrong
        build(forms(module, target, kernel)[index][2], target)


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
    """Rows of all modules on all targets."""
    with compilers() as pool:
        groups = [(module, target, kernel) for module in modules() for target in targets]
        counts = [pool.submit(_count, *group) for group in groups]
        jobs = [(*group, i) for group, count in zip(groups, counts, strict=True) for i in range(count.result())]
        if dump:
            return [row(*job, dump) for job in jobs]
        return [future.result() for future in [pool.submit(row, *job) for job in jobs]]


def _count(module: str, target: str, kernel: str) -> int:
    return len(forms(module, target, kernel))


@contextlib.contextmanager
def compilers(processes: int = 2) -> Iterator[concurrent.futures.Executor]:
    """Processes in which kernels are compiled, whether this one interprets them or not."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def table(found: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of a Markdown table."""
    lines = ["| kernel | form | target | registers | warps | shared | blocks | products | " + " | ".join(COUNTED)]
    lines[0] += " | faults |"
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for row in found:
        cells = [row.get(key, "") for key in ("kernel", "form", "target", "registers", "warps", "shared", "occupancy")]
        cells.append(", ".join(row.get("products", [])))
        for group in COUNTED:
            here, hot = row.get("counts", {}).get(group, ""), row.get("hot", {}).get(group)
            cells.append(f"{here} ({hot})" if hot else here)
        cells.append("; ".join(row["faults"]) or "none")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


HEADER = """# What the kernels become

Written by `python -m lewm.kernels.code --write` with {versions}.
One row for each form in which a kernel is launched, on each target; in brackets the part in its hot loop (the loop with
most tensor-core instructions, else float32 arithmetic, without the loops inside it). Counts are instructions in the
program, not executed ones.

- registers: per thread, on gfx942 vector registers; shared: bytes of a block; blocks: of them on one multiprocessor.
- products: types that the kernel's matrix products multiply; tensor: tensor-core instructions (HMMA, HGMMA, UTC.MMA,
  on gfx942 v_mfma); fp32: additions, products and both at once; global, shared, local: loads and stores; mufu: special
  functions; barrier: waits of a block.
- A fault: local memory; float64 in a kernel that is given no float64 tensor; products other than "ieee" without tensor
  cores, or that on them; a block that does not fit. If all products are exact float32 ("ieee", "tf32x3") only local
  memory in a loop that has no loop inside it is one. gfx942 is exempt.

"""


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
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "rows": found}, indent=1) + "\n")
    if options.write:
        TABLE.write_text(HEADER.format(versions=versions()) + "\n".join(table(found)) + "\n")
    if any(row["faults"] for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
