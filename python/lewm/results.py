"""What result JSONs say together: the paired difference of two, and the table of all (RESULTS.md)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lewm.config import TERMS
from lewm.evaluation import OPTIONAL_PARTS, PROTOCOLS, Moved, Result, Training, wilson

__all__ = ["Comparison", "compare", "table"]


@dataclass(frozen=True)
class Comparison:
    """Two results on the same pairs; `a - b` throughout.

    Attributes:
        difference: Of the success rates.
        interval: Its 95 % interval, `paired_interval`.
        p_value: Of McNemar's exact test, two-sided: how likely the pairs that only one solved are to be shared out as
            unevenly as this, or more, if each fell to either by a fair coin.
        n: Number of pairs.
        both, only_a, only_b, neither: How many of them were solved by which.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    n: int
    both: int
    only_a: int
    only_b: int
    neither: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"a - b: {100 * self.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] "
            f"(95 % interval of the paired difference), McNemar's exact p {self.p_value:.3g}\n"
            f"of {self.n} pairs: both solved {self.both}, only a {self.only_a}, only b {self.only_b}, "
            f"neither {self.neither}"
        )


def compare(a: Result | str | os.PathLike[str], b: Result | str | os.PathLike[str]) -> Comparison:
    """How much more often `a` solved the same pairs than `b` did.

    Args:
        a, b: Results, or the paths of result JSONs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is no result, or the two are not of the same protocol and pairs; the text says what differs.
    """
    a, b = (each if isinstance(each, Result) else Result.load(each) for each in (a, b))
    if differing := _differences(a, b):
        raise ValueError(f"a and b must be results on the same pairs of one protocol, but differ in {differing}")
    both = sum(x and y for x, y in zip(a.success, b.success, strict=True))
    counts = both, sum(a.success) - both, sum(b.success) - both, a.n - sum(a.success) - sum(b.success) + both
    return Comparison(
        a.success_rate - b.success_rate, paired_interval(*counts), mcnemar(counts[1], counts[2]), a.n, *counts
    )


def paired_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two success rates on the same pairs, low and high in [-1, 1].

    Method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17 (1998), 2635-2650: the distances from each rate to its Wilson limits are
    added as the sides of a triangle are, whose angle is the correlation of the two, corrected for continuity where it
    is positive.
    """
    n = both + only_a + only_b + neither
    rate_a, rate_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    spread = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    correlation = covariance / math.sqrt(spread) if spread else 0.0

    def side(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    difference = rate_a - rate_b
    return (
        max(-1.0, difference - side(rate_a - low_a, high_b - rate_b)),
        min(1.0, difference + side(high_a - rate_a, rate_b - low_b)),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: twice the smaller tail of Binomial(only_a + only_b, 1/2), at most 1."""
    n = only_a + only_b
    log_ways = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(only_a, only_b) + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(ways - n * math.log(2)) for ways in log_ways))


def _differences(a: Result, b: Result) -> str:
    """What keeps two results from being compared; empty if nothing does."""
    # How many pairs a protocol has by default is not what was solved.
    one, other = (replace(result.protocol, pairs=result.n) for result in (a, b))
    found = [
        f"{name} ({getattr(one, field.name)!r} and {getattr(other, field.name)!r})"
        for field in fields(one)
        for name in [{"name": "protocol", "pairs": "n"}.get(field.name, field.name)]
        if getattr(one, field.name) != getattr(other, field.name)
    ]
    if a.data != b.data:
        found.append(f"data ({a.data} and {b.data})")
    if not found and a.pairs != b.pairs:
        i = next(i for i, (x, y) in enumerate(zip(a.pairs, b.pairs, strict=True)) if x != y)
        found.append(f"pairs (pair {i} is {a.pairs[i]} and {b.pairs[i]})")
    return ", ".join(found)


# ----------------------------------------------------------------------------------------------------------- RESULTS.md

_HEAD = """# Results

Made by `lewm results results --out RESULTS.md` from the files that `lewm evaluate --out` wrote; never edited by hand.

Task: a protocol; its pairs of start and goal are from fresh episodes, which no training can have seen, unless it says
"pairs from" a data set. Method: preset, loss terms, what plans are scored by, heads, other settings. Random: uniform
actions on the same pairs; blind: who sees the agent alone and takes it straight to its place in the goal; and how many
pairs count as solved at the start. Moved: the pairs in which more than the agent moved, where the task can tell. Plan:
median time of a plan for one environment. `lewm compare` gives the paired difference of two results.
"""
_SUMMARY_HEAD = """
## Over training seeds

Solved: the mean over seeds of the share of pairs solved. Its interval is Wilson's for that mean with the pairs of one
seed: all seeds meet the same pairs, so more of them say nothing of other pairs, and an interval of the pooled n would
be too narrow. Seeds: the lowest and the highest, which is what another training may give.
"""
_SUMMARY_COLUMNS = ("task", "method", "solved", "seeds", "n", "random", "moved", "training", "plan")
_ROW_HEAD = """
## Each training seed

Solved: share of n pairs, with its 95 % Wilson interval.
"""
_ROW_COLUMNS = ("task", "method", "solved", "n", "random", "moved", "training", "plan", "model", "command")


def table(folder: str | os.PathLike[str]) -> str:
    """The text of RESULTS.md, by task and method: a line over all training seeds, then one for each result JSON.

    Raises:
        NotADirectoryError: There is no such folder.
        ValueError: A file named *.json in it is no result.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"results must be a folder of result JSONs, got {folder}")
    # By name first, so that equal rows have an order too.
    found = [Result.load(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        return f"{_HEAD}\nNo results yet.\n"
    tasks = list(PROTOCOLS)
    found.sort(
        key=lambda r: (
            tasks.index(r.protocol.name) if r.protocol.name in tasks else len(tasks),
            r.protocol.name,
            _method(r),
            r.training.seed if r.training else 0,
        )
    )
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in found:
        groups.setdefault(_group(result), []).append(result)
    summary = _markdown(_SUMMARY_COLUMNS, map(_summary, groups.values()))
    return f"{_HEAD}{_SUMMARY_HEAD}\n{summary}{_ROW_HEAD}\n{_markdown(_ROW_COLUMNS, map(_row, found))}"


def _group(result: Result) -> tuple[Any, ...]:
    """What results have in common that differ by their training seed alone."""
    training = result.training
    return (
        str(replace(result.protocol, pairs=result.n)),
        *(str(result.pairs), result.data, str(result.planner), result.execute, result.shrink, result.seed),
        *(result.backend, result.precision, _method(result)),
        (training.episodes, training.policy) if training else result.model_hash,  # no unknown method is like another
    )


def _summary(group: list[Result]) -> tuple[str, ...]:
    first, trained = group[0], [result.training for result in group if result.training]
    rates, moved = [result.success_rate for result in group], [result.moved for result in group if result.moved]
    seeds = ", ".join(str(training.seed) for training in trained)
    return (
        _task(first),
        _method(first),
        _solved(rates, first.n),
        f"{seeds}: {_span('{:.1%}', rates)}" if len(group) > 1 else seeds,
        f"{len(group)} x {first.n} = {len(group) * first.n:,}" if len(group) > 1 else str(first.n),
        _random(first),
        _moved([each.success_rate for each in moved], moved[0]) if moved else "",
        _training(trained),
        _plan(group),
    )


def _row(result: Result) -> tuple[str, ...]:
    training, moved = result.training, result.moved
    return (
        _task(result),
        f"{_method(result)}, seed {training.seed}" if training else _method(result),
        _solved([result.success_rate], result.n),
        str(result.n),
        _random(result),
        _moved([moved.success_rate], moved) if moved else "",
        _training([training] if training else []),
        _plan([result]),
        result.model_hash[:12],
        f"`{result.command.replace('`', '')}`",
    )


def _task(result: Result) -> str:
    task = [result.protocol.name, *_settings(result.protocol.env_kwargs)]
    if result.data is not None:
        task.append(f"pairs from {result.data[:12]}")
    return ", ".join(task)


def _method(result: Result) -> str:
    """Preset, loss terms, what plans are scored by, what helps them, other settings: all but the training's seed."""
    training = result.training
    if training is None:
        return "unknown"
    changes, parts = training.changes, training.parts
    if parts is None:  # an older file, of presets that had none
        parts = {name: changes[name] for name in OPTIONAL_PARTS if changes.get(name)}
    terms = ["prediction" if changes.get("sigreg_weight") == 0 else "two terms"]
    terms += [f"{name.replace('_', ' ')} {parts[name]}" for name in TERMS if name in parts]
    helps = [name.replace("_", " ") for name in ("action_prior", "action_prefix") if name in parts]
    cost = result.planner["cost"]
    return ", ".join(
        [
            training.preset,
            " + ".join(terms),
            *([f"{cost} cost"] if cost else []),
            *helps,
            *_settings({name: value for name, value in changes.items() if name not in OPTIONAL_PARTS}),
        ]
    )


def _solved(rates: list[float], n: int) -> str:
    """The mean of rates on the same n pairs, and its interval."""
    rate = math.fsum(rates) / len(rates)
    return f"**{rate:.1%}** {_interval(wilson(rate * n, n))}"


def _random(result: Result) -> str:
    blind = "" if result.blind_floor is None else f"; blind {result.blind_floor:.1%}"
    return f"{result.random_floor:.1%}{blind}; {result.solved_at_start} at the start"


def _moved(rates: list[float], moved: Moved) -> str:
    solved = _solved(rates, moved.n).replace("**", "")
    blind = "" if moved.blind_floor is None else f", blind {moved.blind_floor:.1%}"
    return f"{solved} of {moved.n}; random {moved.random_floor:.1%}{blind}"


def _training(trained: list[Training]) -> str:
    if not trained:
        return ""
    steps, seconds = [each.steps for each in trained], [each.seconds for each in trained]
    text = f"{_span('{:,}', steps)} steps, {_span('{:,.0f}', seconds)} s, {trained[0].device}"
    episodes, policy = trained[0].episodes, trained[0].policy
    return text if episodes is None else f"{text}; {episodes:,} episodes{f' of {policy}' if policy else ''}"


def _plan(results: list[Result]) -> str:
    first, planner = results[0], results[0].planner
    search = f"{planner['name'].upper()} {planner['samples']} x {planner['iterations']}"
    blocks = f"{first.execute} of {planner['horizon']} blocks executed{', horizon shrinking' * first.shrink}"
    machine = " ".join(filter(None, [first.backend, first.precision, first.versions.get("cpu", "")]))
    return f"{_span('{:.3g}', [result.plan_ms['p50'] for result in results])} ms: {search}, {blocks}; {machine}"


def _span(form: str, values: Sequence[float]) -> str:
    """The lowest and the highest, or the one if they are written alike."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _settings(settings: dict[str, object]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def _interval(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.1%}, {interval[1]:.1%}]"


def _markdown(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join("| " + " | ".join(map(_cell, row)) + " |\n" for row in (columns, ("---",) * len(columns), *rows))


def _cell(text: str) -> str:
    """Text from a file that keeps to its cell."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text.encode("utf-8", "replace").decode()
