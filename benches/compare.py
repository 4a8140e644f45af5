"""Whether a ratio fell: what `make bench` measured against `benches/baseline.json`.

    python -m benches.compare [FILE.json ...] [--update]

`FILE.json` is what pytest-benchmark wrote, by default that of the last `make bench`; of several the median of each row
counts. A row that is more than 15 % below the baseline is measured once more, and that counts. The exit status is 1 if
a row fell, or if one of the baseline was not measured. Ratios of one kind of processor hold for no other: on one that
the baseline does not have nothing is compared. `--update` makes what was measured the baseline of its processor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benches.common import kind

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "benches" / "baseline.json"
LAST = ROOT / ".benchmarks" / "cpu.json"
MAY_FALL = 0.15
VERSIONS = ("lewm", "torch", "numpy", "h5py", "python")


class Run(NamedTuple):
    """What one or more runs measured.

    Attributes:
        kind: Processor and threads, as `common.kind` names them.
        ratios: Of each row, under the id that pytest knows it by.
        versions: Of what was compared.
    """

    kind: str
    ratios: dict[str, float]
    versions: dict[str, str]


def measured(paths: Sequence[Path]) -> Run:
    """What pytest-benchmark wrote.

    Raises:
        SystemExit: There is no such file, it is damaged or empty, or the files are of several kinds of processor.
    """
    ratios: dict[str, list[float]] = {}
    versions: dict[str, str] = {}
    kinds = set()
    for path in paths:
        try:
            for bench in json.loads(path.read_bytes())["benchmarks"]:
                info = bench["extra_info"]
                ratios.setdefault(bench["fullname"], []).append(info["ratio"])
                versions |= {package: info[package] for package in VERSIONS if package in info}
                kinds.add(info["kind"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not what `make bench` writes ({error!r}): run `make bench`") from None
    if len(kinds) != 1:
        raise SystemExit(f"want rows of one kind of processor, got {sorted(kinds)} in {', '.join(map(str, paths))}")
    return Run(kinds.pop(), {name: statistics.median(each) for name, each in ratios.items()}, versions)


def committed(path: Path) -> dict[str, dict[str, Any]]:
    """The baseline: for each kind of processor date, versions and ratios.

    Raises:
        SystemExit: It is damaged.
    """
    try:
        entries = json.loads(path.read_bytes())
        for entry in entries.values():
            for name, ratio in entry["ratios"].items():
                if not (isinstance(ratio, float) and math.isfinite(ratio) and ratio > 0):
                    raise ValueError(f"{name} is {ratio!r}, want a number above 0")
            entry["date"], entry["versions"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"{path} is damaged ({error!r}): restore it, or write {{}} into it and begin anew with "
            "`python -m benches.compare --update`"
        ) from None
    return entries


def again(names: Sequence[str]) -> dict[str, float]:
    """Those ratios measured anew; none if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "again.json"
        done = subprocess.run([sys.executable, "-m", "pytest", f"--benchmark-json={out}", *names], cwd=ROOT)
        return {} if done.returncode else measured([out]).ratios


def table(baseline: dict[str, float], now: dict[str, float]) -> tuple[list[str], bool]:
    """The lines to print, and whether all is well."""
    width = max(map(len, baseline | now))
    lines, well = [f"{'':{width}}  baseline      now   change"], True
    for name in sorted(baseline | now):
        was, found = baseline.get(name), now.get(name)
        line = f"{name:{width}} {was or math.nan:9.2f} {found or math.nan:8.2f}"
        if found is None:
            line, well = f"{line}          missing", False
        elif was is None:
            line += "          new"
        else:
            line += f" {found / was - 1:+8.0%}"
            if fell(was, found):
                line, well = f"{line} FELL", False
        lines.append(line)
    return lines, well


def fell(was: float, found: float) -> bool:
    """Whether a ratio is too far below the baseline's."""
    return found < (1 - MAY_FALL) * was


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares or updates; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[LAST], metavar="FILE.json")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="another baseline than the committed one")
    parser.add_argument("--update", action="store_true", help="write the baseline of this processor")
    options = parser.parse_args(arguments)
    run, entries = measured(options.files), committed(options.baseline)
    if options.update:
        date = datetime.date.today().isoformat()
        ratios = {name: round(ratio, 2) for name, ratio in sorted(run.ratios.items())}
        entries[run.kind] = {"date": date, "versions": run.versions, "ratios": ratios}
        options.baseline.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")
        print(f"{options.baseline}: {len(ratios)} rows of {run.kind}")
        return 0
    if run.kind not in entries:
        print(f"no baseline for {run.kind}, nothing compared; there is one for: {'; '.join(entries) or 'none'}")
        print("add one with `python -m benches.compare --update`")
        return 0
    entry = entries[run.kind]
    low = [name for name, was in entry["ratios"].items() if name in run.ratios and fell(was, run.ratios[name])]
    if low and run.kind == kind():
        print(f"{len(low)} below the baseline by more than {MAY_FALL:.0%}, measured once more: {', '.join(low)}")
        run.ratios.update(again(low))
    lines, well = table(entry["ratios"], run.ratios)
    print(f"{run.kind}, baseline of {entry['date']}", *lines, sep="\n")
    before = entry["versions"]
    if changed := [
        f"{name} {before.get(name)} -> {now}" for name, now in run.versions.items() if before.get(name) != now
    ]:
        print(f"other versions than the baseline's: {', '.join(changed)}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
