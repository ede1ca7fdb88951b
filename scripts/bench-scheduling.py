"""Compares `roundhouse simulate` with the targets for the scheduler: see scripts/bench-scheduling.sh."""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/lib"))

import fresh_traces  # noqa: E402  (beside common.sh)

POLICIES = ("roundhouse", "fifo", "exhaustive", "llama-swap")
SEVERAL = 5
"""Targets for the median or mean of several traces of a kind count from this many on."""

Row = dict[str, float]


@dataclass(frozen=True)
class Played:
    """One trace: what our scheduler did, what others did, and the optimum, if known."""

    name: str
    path: Path
    ours: Row
    others: dict[str, Row]
    is_own: bool
    """The others are our versions of the policies."""
    optimum: dict[str, float] | None

    def ratio(self, column: str, policy: str) -> float:
        """Our measure in parts of another policy's; equal if both are 0."""
        return over(self.ours[column], self.others[policy][column])


@dataclass(frozen=True)
class Target:
    """A measure of the traces of one kind and what it may be."""

    kind: str
    what: str
    measure: Callable[[Played], float]
    limit: float
    at_least: bool = False
    among: str = "each"
    """`each` trace must meet it, or the `mean` or `median` of several."""

    def meets(self, got: float) -> bool:
        """Whether a value is good enough."""
        return got >= self.limit if self.at_least else got <= self.limit


def over(value: float, other: float) -> float:
    """value / other, where 0 / 0 is 1."""
    if other:
        return value / other
    return 1.0 if not value else float("inf")


def to(column: str, policy: str) -> Callable[[Played], float]:
    """The ratio of a column to another policy's."""
    return lambda played: played.ratio(column, policy)


def own(column: str) -> Callable[[Played], float]:
    """A column as it is."""
    return lambda played: played.ours[column]


def wakes_of_swaps(played: Played) -> float:
    """Which part of the loads came from host memory."""
    return over(played.ours["wakes"], played.ours["swaps"])


def total_wait(row: Row, path: Path) -> float:
    """Seconds waited by all jobs together."""
    interactive, batch = jobs_by_class(path)
    return row["int_mean"] * interactive + row["bat_mean"] * batch


def wait_to_optimum(played: Played) -> float:
    """Total wait in parts of the least that any schedule could have had."""
    assert played.optimum is not None
    return over(total_wait(played.ours, played.path), played.optimum["opt_total_wait_s"])


def wait_to_llama_swap(played: Played) -> float:
    """Total wait in parts of llama-swap's."""
    return over(total_wait(played.ours, played.path), total_wait(played.others["llama-swap"], played.path))


def makespan_to_optimum(played: Played) -> float:
    """Makespan in parts of the least that any schedule could have had."""
    assert played.optimum is not None
    return over(played.ours["makespan"], played.optimum["opt_makespan_s"])


TARGETS = (
    Target("a", "swaps / fifo", to("swaps", "fifo"), 0.11),
    Target("a", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 1.3),
    Target("a", "makespan / lower bound", own("span/LB"), 1.06),
    Target("b", "swaps / fifo", to("swaps", "fifo"), 0.026),
    Target("b", "swaps / exhaustive", to("swaps", "exhaustive"), 1.15),
    Target("b", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 1.10),
    Target("b", "batch p99 / exhaustive", to("bat_p99", "exhaustive"), 1.7),
    Target("b", "makespan / lower bound", own("span/LB"), 1.10),
    Target("c", "swaps / llama-swap", to("swaps", "llama-swap"), 1.1),
    Target("c", "interactive p99 / llama-swap", to("int_p99", "llama-swap"), 1.1),
    Target("c", "swaps / fifo", to("swaps", "fifo"), 0.26),
    Target("d", "swaps / exhaustive", to("swaps", "exhaustive"), 1.15),
    Target("d", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 1.4),
    Target("d", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 0.85, among="median"),
    Target("d", "makespan / lower bound", own("span/LB"), 1.07),
    Target("e", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 0.045),
    Target("e", "interactive max, s", own("int_max"), 300),
    Target("e", "makespan / lower bound", own("span/LB"), 1.5),
    Target("e", "deadlines missed, %", own("dl_miss%"), 0),
    Target("f", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 0.12),
    Target("f", "sparse tenants' p99 / exhaustive", to("sparse_p99", "exhaustive"), 0.30),
    Target("f", "Jain index over tenants", own("jain"), 0.97, at_least=True),
    Target("f", "makespan / lower bound", own("span/LB"), 1.5),
    Target("g", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 0.22),
    Target("g", "interactive max, s", own("int_max"), 1200),
    Target("g", "makespan / lower bound", own("span/LB"), 1.08),
    Target("g", "deadlines missed, %", own("dl_miss%"), 6),
    Target("g", "deadlines missed, %", own("dl_miss%"), 2, among="mean"),
    Target("h", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 0.85),
    Target("h", "interactive p99 / exhaustive", to("int_p99", "exhaustive"), 0.6, among="median"),
    Target("h", "batch p99 / exhaustive", to("bat_p99", "exhaustive"), 2.0),
    Target("h", "batch p99 / exhaustive", to("bat_p99", "exhaustive"), 0.85, among="median"),
    Target("h", "makespan / lower bound", own("span/LB"), 1.07),
    Target("h", "wakes / swaps", wakes_of_swaps, 0.45, at_least=True),
    Target("small", "total wait / optimum", wait_to_optimum, 1.75, among="mean"),
    Target("small", "total wait / llama-swap", wait_to_llama_swap, 1.15, among="mean"),
    Target("small", "makespan / optimum", makespan_to_optimum, 1.08, among="mean"),
)


def main() -> int:
    """Plays, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/roundhouse")
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--fresh", type=int, metavar="N", help="make and play N new traces of each kind")
    parser.add_argument("--seed", type=int, default=1000, help="of the first new trace; the others have the next ones")
    options = parser.parse_args()
    if options.fresh is None:
        traces = options.traces or public_traces()
        code = judge(by_kind(options.binary, traces))
        print(f"\n{'trace':<22} started within the range told at arrival (width of the range / wait, median)")
        for name, line in told(options.binary, traces):
            print(f"{name:<22} {line}")
        return code
    if options.traces or options.fresh < 1:
        parser.error("--fresh N: N is at least 1, and no TRACE is named beside it")
    with tempfile.TemporaryDirectory() as folder:
        made = fresh_traces.make(ROOT / "tests/traces", Path(folder), options.fresh, options.seed)
        return judge(by_kind(options.binary, made), medians=True)


def by_kind(binary: Path, traces: list[Path]) -> dict[str, list[Played]]:
    """What was played, by the kind that a trace's name tells."""
    kinds: dict[str, list[Played]] = {}
    for played in play(binary, traces):
        kinds.setdefault(played.name.split("-")[0], []).append(played)
    unknown = sorted(set(kinds) - {target.kind for target in TARGETS})
    if unknown:
        print(f"no targets for traces named {', '.join(f'{kind}-' for kind in unknown)}", file=sys.stderr)
    return kinds


def told(binary: Path, traces: list[Path]) -> Iterator[tuple[str, str]]:
    """How good the announced starts were: for each trace a line in words."""
    command = [str(binary), "simulate", *map(str, traces)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{binary} simulate failed: it says why above")
    for block in done.stdout.strip().split("\n\n"):
        name, _, rest = block.partition(":")
        got = {words[0]: words[1] for words in map(str.split, rest.splitlines()) if len(words) > 1}
        parts = (
            f"{what} {got[key + '_in_range%']:>6} % ({got[key + '_range/wait']} x)"
            for what, key in (("interactive", "int"), ("batch", "bat"))
            if got.get(key + "_in_range%", "-") != "-"
        )
        yield name, "  ".join(parts)


def judge(kinds: dict[str, list[Played]], medians: bool = False) -> int:
    """Prints a line for each target; the exit code. With `medians`, traces of a kind are judged together."""
    print(f"{'trace':<22} {'measure':<36} {'target':>9} {'got':>9}")
    judged = missed = 0
    for target in TARGETS:
        all_played = kinds.get(target.kind, [])
        for name, got, note in values(target, all_played, medians):
            ok = target.meets(got)
            judged += 1
            missed += not ok
            sign = ">=" if target.at_least else "<="
            bound = f"{sign} {target.limit:g}"
            print(f"{name:<22} {target.what:<36} {bound:>9} {got:>9.3f}  {'ok' if ok else 'MISSED'}{note}")
    print(f"\n{judged - missed} of {judged} met" + ("" if judged else ": nothing was compared"))
    return 1 if missed or not judged else 0


def values(target: Target, all_played: list[Played], medians: bool) -> Iterator[tuple[str, float, str]]:
    """What a target is compared with: name, value, note. With `medians` the note has the range of the traces."""
    usable = [played for played in all_played if target.kind != "small" or played.optimum is not None]
    note = "  (to our own baselines)" if "/" in target.what and any(played.is_own for played in usable) else ""
    if medians and usable and target.kind == "small":
        sets = [usable[at : at + fresh_traces.SMALL_SET] for at in range(0, len(usable), fresh_traces.SMALL_SET)]
        yield middle_of(target, [statistics.fmean(map(target.measure, each)) for each in sets], "small sets")
    elif medians and usable and (target.among == "each" or len(usable) >= SEVERAL):
        yield middle_of(target, [target.measure(played) for played in usable], target.kind)
    elif target.among == "each":
        for played in usable:
            own_note = note if played.is_own else ""
            yield played.name, target.measure(played), own_note
    elif usable and (len(usable) >= SEVERAL or target.kind == "small"):
        each = [target.measure(played) for played in usable]
        middle = statistics.fmean(each) if target.among == "mean" else statistics.median(each)
        yield f"{target.among} of {len(each)} {target.kind}", middle, note


def middle_of(target: Target, each: list[float], what: str) -> tuple[str, float, str]:
    """The median (or the mean, if the target is one of traces), and how far the traces reach."""
    is_mean = target.among == "mean" and target.kind != "small"
    middle = statistics.fmean(each) if is_mean else statistics.median(each)
    missed = sum(not target.meets(value) for value in each)
    note = f"  ({min(each):.3f} to {max(each):.3f}" + (f"; {missed} beyond)" if missed else ")")
    return f"{'mean' if is_mean else 'median'} of {len(each)} {what}", middle, note


def play(binary: Path, traces: list[Path]) -> Iterator[Played]:
    """Runs the simulations, all with one call."""
    command = [str(binary), "simulate", "--csv", "--policy", ",".join(POLICIES), *map(str, traces)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{binary} simulate failed: it says why above")
    rows = read(io.StringIO(done.stdout))
    for path in traces:
        name = path.stem
        mine = rows[name]
        reference = path.with_name("reference.csv")
        known = read(reference.open()).get(name, {}) if reference.exists() else {}
        is_own = any(policy not in known for policy in POLICIES[1:])
        others = mine if is_own else known
        yield Played(name, path, mine["roundhouse"], others, is_own, optimum(path))


def read(lines: Iterable[str]) -> dict[str, dict[str, Row]]:
    """Rows by trace and policy."""
    rows: dict[str, dict[str, Row]] = {}
    for row in csv.DictReader(lines):
        trace, policy = row.pop("trace"), row.pop("policy")
        rows.setdefault(trace, {})[policy] = {column: float(value) for column, value in row.items()}
    return rows


def optimum(path: Path) -> dict[str, float] | None:
    """What is known of the best schedule of a small trace."""
    file = path.with_name("small-optima.csv")
    if not file.exists():
        return None
    for row in csv.DictReader(file.open()):
        if row.pop("trace") == path.stem:
            return {column: float(value) for column, value in row.items()}
    return None


def jobs_by_class(path: Path) -> tuple[int, int]:
    """Interactive and batch jobs of a trace."""
    rows = csv.DictReader(line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    interactive = batch = 0
    for row in rows:
        if row["class"] == "interactive":
            interactive += int(row["count"])
        else:
            batch += int(row["count"])
    return interactive, batch


def public_traces() -> list[Path]:
    """Those of the repository."""
    found = sorted((ROOT / "tests/traces").glob("*.csv"))
    return [path for path in found if path.name not in ("reference.csv", "small-optima.csv")]


if __name__ == "__main__":
    raise SystemExit(main())
