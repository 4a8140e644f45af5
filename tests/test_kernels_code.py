"""The kernels' machine code: what is read from it, what is refused, the times predicted from it, both tables."""

import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewm.kernels import code, times

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
    assert loops[0].skipped == collections.Counter(["MUFU.RCP", "BRA"])
    assert loops[1].ops == collections.Counter(["FFMA", "LDS.64", "BRA.U"])
    assert not loops[1].skipped
    assert outside.ops == collections.Counter(["LDC", "BRA", "BSSY", "STG.E", "EXIT", "BRA", "NOP"])
    assert outside.skipped == collections.Counter(["BRA", "NOP"])  # the trap


def test_groups():
    ops = ["FFMA", "FFMA2", "HFMA2.MMA", "HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32.BF16", "UTCHMMA", "LDL.LU"]
    ops += ["STL.64", "QGMMA.64x8x32.F32", "LDGSTS.E.BYPASS.128", "REDG.E.ADD", "DFMA", "STS.128", "LDSM.16.M88.4"]
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


def row(products=("bf16",), loop_local=0, outer_local=0, target="sm_90", occupancy=1, double=False, **counts):
    counts = dict.fromkeys(code.COUNTED, 0) | {"tensor": 8} | counts
    loops = [
        dict.fromkeys(code.COUNTED, 0) | {"local": n, "within": i} for n, i in ((outer_local, None), (loop_local, 0))
    ]
    return {"target": target, "products": list(products), "counts": counts, "loops": loops, "occupancy": occupancy,
            "double": double}  # fmt: skip


def test_faults():
    exact = {"products": ["f32 ieee"], "tensor": 0}
    assert code.faults(row()) == []
    assert code.faults(row(**exact)) == []
    assert code.faults(row([], tensor=0)) == []
    assert code.faults(row(local=1)) == ["local memory"]
    assert code.faults(row([], tensor=0, local=1)) == ["local memory"]
    assert code.faults(row(**exact, local=1)) == []
    assert code.faults(row(["f32 tf32x3"], local=1)) == []
    assert code.faults(row(**exact, local=1, loop_local=1)) == ["local memory in a loop"]
    assert code.faults(row(**exact, local=1, outer_local=1)) == []
    assert code.faults(row(local=1, outer_local=1)) == ["local memory in a loop"]
    assert code.faults(row(tensor=0)) == ["bf16 products without tensor cores"]
    assert code.faults(row(["f32 tf32"], tensor=0)) == ["f32 tf32 products without tensor cores"]
    assert code.faults(row(["f32 ieee"])) == ["exact float32 products on tensor cores"]
    assert code.faults(row(fp64=1)) == ["float64"]
    assert code.faults(row(fp64=1, double=True)) == []
    assert code.faults(row(occupancy=0)) == ["does not fit on a multiprocessor"]
    assert code.faults(row(tensor=0, local=9, target="gfx942")) == []


def test_every_module_with_kernels_is_surveyed():
    folder = Path(code.__file__).parent
    defining = [path.stem for path in folder.glob("*.py") if re.search(r"def \w+_kernel\(", path.read_text())]
    assert code.modules() == sorted(defining)


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


def work(**changes):
    fields = {"blocks": 132, "resident": 1, "cycles": {"fp32": 0.0}, "waits": 0.0, "l2_bytes": 0.0, "hbm_bytes": 0.0}
    return times.Work(**fields | changes)


def us(device=times.H100, **changes):
    return times.microseconds(work(**changes), device)["total"] - times.BOUNDARY - times.START


def test_floors():
    assert us() == 0
    assert us(hbm_bytes=3.35e12) == pytest.approx(1e6)  # a second of memory
    assert us(times.H200, hbm_bytes=4.8e12) == pytest.approx(1e6)
    assert us(l2_bytes=5.5e12) == pytest.approx(1e6)
    # 790 TFLOP/s of bfloat16 on 132 multiprocessors, and 59.3 of float32 at 1.755 GHz, 128 lanes.
    assert us(cycles={"tensor": 790e6 / 132 / times.TENSOR}) == pytest.approx(1.0)
    assert us(cycles={"fp32": 1e6 * 32 / 128}) == pytest.approx(132 * 32e6 * 2 / (132 * 128 * 2 * 1755))
    # 1000 cycles of work and 500 of waiting: alone, one after the other, together.
    one = {"cycles": {"fp32": 1000.0}, "waits": 500.0}
    assert us(**one) == pytest.approx(1500 / 1755)
    assert us(**one, blocks=133) == pytest.approx(3000 / 1755)
    assert us(**one, blocks=133, resident=2) == pytest.approx(2000 / 1755)
    assert us(**one | {"waits": 5000.0}, blocks=264, resident=2) == pytest.approx(6000 / 1755)


@given(
    st.fixed_dictionaries(
        {"blocks": st.integers(1, 10**5), "waits": st.floats(0, 1e6), "l2_bytes": st.floats(0, 1e9),
         "hbm_bytes": st.floats(0, 1e9), "resident": st.integers(1, 8),
         "cycles": st.fixed_dictionaries({"fp32": st.floats(0, 1e6), "shared": st.floats(0, 1e6)})}
    ),
    st.sampled_from(["blocks", "waits", "l2_bytes", "hbm_bytes", "fp32", "shared"]),
)  # fmt: skip
def test_more_work_takes_no_less_time(fields, more):
    if more in fields["cycles"]:
        larger = fields | {"cycles": fields["cycles"] | {more: 2 * fields["cycles"][more]}}
    else:
        larger = fields | {more: 2 * fields[more]}
    assert us(**larger) >= us(**fields)
    assert us(times.H200, **fields) <= us(**fields)


def test_executed():
    outside, loops = code.regions(*code.parse(SASS))
    rows = [vars(loop) | code.grouped(loop.ops) for loop in loops]
    found = {"kernel": "k", "outside": vars(outside), "loops": rows}
    ops, waits = times.executed(found, [3, 5])
    assert (ops["LDC"], ops["LDG.E.128"], ops["FFMA"], ops["LDS.64"], ops["MUFU.RCP"]) == (1, 3, 15, 15, 3)
    assert waits == 3 * (times.L2_LATENCY + times.BARRIER)
    ops, _ = times.executed(found, [3, 5], share=0.25)
    assert (ops["LDG.E.128"], ops["MUFU.RCP"]) == (3, 0.75)
    with pytest.raises(ValueError, match=r"trips must be given for 2 loops of k, got \[5\]"):
        times.executed(found, [5])


def test_flop_of_an_instruction():
    want = {
        "HMMA.16816.F32.BF16": (4096, "bf16"),
        "HMMA.1688.F32.TF32": (2048, "tf32"),
        "HGMMA.64x128x16.F32.BF16": (64 * 128 * 16 * 2 / 4, "bf16"),  # four warps together
        "QGMMA.64x64x32.F32.E4M3.E4M3": (64 * 64 * 32 * 2 / 4, "f8"),
    }
    assert {op: times._flop(op) for op in want} == want


def test_bytes_of_an_instruction():
    want = {"LDG.E": 128, "LDG.E.128": 512, "LDG.E.U16": 64, "LDS.64": 256, "LDGSTS.E.BYPASS.128": 512,
            "LDSM.16.M88.4": 512, "LDSM.16.M88": 128, "STS.U8": 32, "REDG.E.ADD.F32.FTZ.RN": 128}  # fmt: skip
    assert {op: times._bytes(op) for op in want} == want


@compiles
def test_predictions():
    with code.compilers() as pool:
        rows = [row for module in code.modules() for row in pool.submit(times.predict, module).result()]
    text = times.TABLE.read_text()
    if code.versions() in text:
        assert set(times.table(rows)) <= set(text.splitlines()), "write it again: python -m lewm.kernels.times --write"
    for row in rows:
        assert row["H200"] <= row["H100"]
        assert row["H100"] > times.BOUNDARY + times.START
    forward = next(row for row in rows if row["kernel"] == "_sigreg_fwd_kernel")
    # 4 x 128 x 192 x 1024 multiply-adds on 128 lanes of 128 multiprocessors.
    assert forward["H100"] > 4 * 128 * 192 * 1024 / (128 * 128 * 1755)


def test_library_layers():
    lines = times.calibration()
    assert len(lines) == 14
    errors = [int(line.split(" | ")[-1].split(" %")[0]) for line in lines[2:]]
    assert max(map(abs, errors)) <= 25
    assert set(lines) <= set(times.TABLE.read_text().splitlines())
