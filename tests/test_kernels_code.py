"""The kernels' machine code: what the checker reads, what it refuses, and the committed table."""

import collections
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lewm.kernels import code

NVDISASM = "backends/nvidia/bin/nvdisasm"
found = importlib.util.find_spec("triton")
compiles = pytest.mark.skipif(
    found is None or not (Path(found.origin).parent / NVDISASM).exists(), reason="needs a Triton that ships nvdisasm"
)

# An outer loop that ends in the kernel's end, one inside it, a slow path moved behind the end, and the trap there.
SASS = """
        .section        .text._k,"ax",@progbits
.text._k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P2 BRA `(.L_x_5) ;
.L_x_2:
        /*0040*/                   FFMA R8, R4, R5, R8 ;
        /*0050*/                   LDS.64 R4, [R9] ;
        /*0060*/                   BRA.U UP0, `(.L_x_2) ;
.L_x_4:
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   BSSY B0, `(.L_x_3) ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   MUFU.RCP R3, R3 ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_6:
        /*00e0*/                   BRA `(.L_x_6);
        /*00f0*/                   NOP;
.L_x_7:
"""


def test_loops():
    outside, loops = code.regions(*code.parse(SASS))
    assert [loop.within for loop in loops] == [None, 0]
    assert loops[0].ops == collections.Counter(
        ["LDG.E.128", "BRA", "BAR.SYNC.DEFER_BLOCKING", "BRA", "MUFU.RCP", "BRA"]
    )
    assert loops[1].ops == collections.Counter(["FFMA", "LDS.64", "BRA.U"])
    assert outside == collections.Counter(["LDC", "BRA", "BSSY", "STG.E", "EXIT", "BRA", "NOP"])


def test_groups():
    ops = ["FFMA", "FFMA2", "HFMA2.MMA", "HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32.BF16", "UTCHMMA",
           "QGMMA.64x8x32.F32", "LDL.LU", "STL.64", "LDGSTS.E.BYPASS.128", "REDG.E.ADD", "DFMA", "STS.128", "LDSM.16.M88.4"]  # fmt: skip
    want = {
        "all": 14,
        "tensor": 4,
        "fp32": 2,
        "fp64": 1,
        "mufu": 0,
        "global": 1,
        "shared": 2,
        "atomic": 1,
        "barrier": 0,
    }
    assert code.grouped(collections.Counter(ops)) == {**want, "local": 2}


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "blocks"),
    [
        ("sm_90", 128, 8, 18432, 2),  # 65536 / (128 x 256)
        ("sm_90", 129, 8, 18432, 1),  # given as 136
        ("sm_90", 32, 4, 0, 16),  # 64 warps
        ("sm_90", 32, 1, 0, 32),  # 32 blocks
        ("sm_90", 64, 4, 227 * 1024, 1),
        ("sm_90", 64, 4, 228 * 1024, 0),
        ("sm_90", 168, 12, 1024, 1),  # three warps a scheduler
        ("sm_80", 64, 4, 40 * 1024, 4),  # 164 / 41
        ("sm_120", 32, 4, 0, 12),  # 48 warps
    ],
)
def test_occupancy(target, registers, warps, shared, blocks):
    assert code.occupancy(target, registers, warps, shared) == blocks


def test_products():
    ttir = """
    %h = tt.dot %z, %u, %h_1 : tensor<128x16xf32> * tensor<16x32xf32> -> tensor<128x32xf32> loc(#loc1)
    %a = tt.dot %b, %c, %d, inputPrecision = tf32 : tensor<128x16xf32> * tensor<16x32xf32> -> tensor<128x32xf32>
    %e = tt.dot %b, %c, %d : tensor<16x64xbf16> * tensor<64x32xbf16> -> tensor<16x32xf32> loc(#loc1)
    """
    assert code.products(ttir) == ["bf16", "f32 ieee", "f32 tf32"]
    assert code.products("%a = tt.load %b : tensor<16x!tt.ptr<f32>>") == []


def row(products=("bf16",), loop_local=0, target="sm_90", occupancy=1, **counts):
    counts = dict.fromkeys(code.COUNTED, 0) | {"tensor": 8} | counts
    loops = [dict.fromkeys(code.COUNTED, 0) | {"local": loop_local}]
    return {"target": target, "products": list(products), "counts": counts, "loops": loops, "occupancy": occupancy}


def test_faults():
    exact = {"products": ["f32 ieee"], "tensor": 0}
    assert code.faults(row()) == []
    assert code.faults(row(**exact)) == []
    assert code.faults(row([], tensor=0)) == []
    assert code.faults(row(local=1)) == ["local memory"]
    assert code.faults(row([], tensor=0, local=1)) == ["local memory"]
    assert code.faults(row(**exact, local=1)) == []
    assert code.faults(row(**exact, local=1, loop_local=1)) == ["local memory in a loop"]
    assert code.faults(row(tensor=0)) == ["bf16 products without tensor cores"]
    assert code.faults(row(["f32 tf32"], tensor=0)) == ["f32 tf32 products without tensor cores"]
    assert code.faults(row(["f32 ieee"])) == ["exact float32 products on tensor cores"]
    assert code.faults(row(fp64=1)) == ["float64"]
    assert code.faults(row(occupancy=0)) == ["does not fit on a multiprocessor"]
    assert code.faults(row(tensor=0, local=9, target="gfx942")) == []


def test_every_module_with_kernels_is_surveyed():
    folder = Path(code.__file__).parent
    assert code.modules() == sorted(path.stem for path in folder.glob("*.py") if "_kernel[" in path.read_text())


@compiles
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in code.TARGETS if t != "sm_90")]
)
def test_machine_code(target):
    rows = code.survey((target,))
    assert {row["kernel"] for row in rows} == {name for module in code.modules() for name in code.kernels(module)}
    assert not [(row["kernel"], row["form"], row["faults"]) for row in rows if row["faults"]]
    lines = code.TABLE.read_text().splitlines()
    again = "write it again: python -m lewm.kernels.code --write"
    if code.versions() in "\n".join(lines):
        assert set(code.table(rows)) - set(lines) == set(), again
    else:  # another compiler, other numbers
        names = {tuple(line.split(" | ")[:3]) for line in lines}
        assert {tuple(line.split(" | ")[:3]) for line in code.table(rows)} <= names, again


SPILLS = """
import lewm.kernels.code as code
call = next(call for label, call in code.examples("sigreg") if label == "paper")
(launch,) = code.record(call)
assert launch.kernel.__name__ == "_sigreg_fwd_kernel" and launch.grid == (4, 32) and launch.constants["KNOTS"] == 17
launch.options["maxnreg"] = 64
print(code.faults(code.examine(launch, "sm_90")))
"""


@compiles
def test_too_few_registers_are_found():
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", SPILLS], capture_output=True, text=True, env=env)
    assert done.stdout == "['local memory in a loop']\n", done.stderr[-2000:]


@compiles
def test_command(tmp_path, capsys):
    code.main(["--target", "sm_90", "--kernel", "sigreg_fwd", "--json", str(tmp_path / "rows.json")])
    assert capsys.readouterr().out.count("_sigreg_fwd_kernel") == (tmp_path / "rows.json").read_text().count('"form"')
    with pytest.raises(SystemExit):
        code.main(["--write", "--target", "sm_90"])
