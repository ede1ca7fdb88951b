"""Makes traces of the kinds a to h and small, alike in law to those in tests/traces and different in every draw.

Models and the box are those of the public trace of the kind. Arrivals are fitted to it: Poisson streams as dense as
its own (d: bursts of 90 s on average, 900 s apart). Work is lognormal, half the jobs are interactive, half of the
others are due in 30 minutes. Small traces come with their optima: the least makespan and total wait of any schedule
in hindsight.
"""

from __future__ import annotations

import csv
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "a": "a-balanced",
    "b": "b-zipf8",
    "c": "c-alternate",
    "d": "d-bursty",
    "e": "e-bulk50k",
    "f": "f-flood",
    "g": "g-multigpu",
    "h": "h-hosttier",
}
"""Names without the seed."""
SMALL_SET = 12
"""Small traces are judged by the mean of so many."""
HOURS_2 = 7200.0
BURST_RATES = {"llama8b": 2.65, "sdxl": 0.27, "flux": 0.2, "coder32b": 1.42, "qwen14b": 1.7}
"""Arrivals a second within a burst of d."""
SMALL_COSTS = {"A": (20.0, 2.0), "B": (30.0, 4.0), "C": (40.0, 8.0)}
"""Seconds of a load and of a job."""

Job = tuple[float, str, str, str, str, float, int]


@dataclass(frozen=True)
class Pattern:
    """The public trace of a kind: head lines, work of a mean job and jobs in the trace by model."""

    head: list[str]
    work: dict[str, float]
    jobs: Counter[str]


def pattern(path: Path) -> Pattern:
    """Reads a public trace."""
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith(("#box", "#model"))]
    work = {}
    for line in head[1:]:
        fields = line.split(",")
        work[fields[1]] = float(fields[-1].removeprefix("mean_work_s="))
    rows = csv.DictReader(line for line in lines if line and not line.startswith("#"))
    return Pattern(head, work, Counter(row["model"] for row in rows))


def poisson(luck: random.Random, rate: float, begin: float, end: float) -> Iterator[float]:
    """Arrivals at a rate per second."""
    now = begin + luck.expovariate(rate)
    while now < end:
        yield now
        now += luck.expovariate(rate)


def lognormal(luck: random.Random, mean: float, sigma: float) -> float:
    """A draw with this mean."""
    return max(0.01, mean * luck.lognormvariate(-sigma * sigma / 2, sigma))


def mixed(luck: random.Random, at: float, model: str, mean: float) -> Job:
    """A job of the mixed kinds (a, b, d, g, h)."""
    tenant = f"t{luck.randrange(4)}"
    work = lognormal(luck, mean, 0.6)
    if luck.random() < 0.5:
        return at, model, "interactive", "", tenant, work, 1
    deadline = f"{at + 1800:.1f}" if luck.random() < 0.5 else ""
    return at, model, "batch", deadline, tenant, work, 1


def jobs_of(kind: str, it: Pattern, luck: random.Random) -> Iterator[Job]:
    """The jobs of a trace, in no order."""
    if kind == "c":
        gap = luck.uniform(4, 8)
        for n in range(400):
            yield n * gap, "AB"[n % 2], "interactive", "", f"t{n % 2}", lognormal(luck, 3, 0.3), 1
    elif kind == "d":
        for model, rate in BURST_RATES.items():
            begin = luck.expovariate(1 / 900)
            while begin < HOURS_2:
                end = begin + luck.expovariate(1 / 90)
                for at in poisson(luck, rate, begin, min(end, HOURS_2)):
                    yield mixed(luck, at, model, it.work[model])
                begin = end + luck.expovariate(1 / 900)
    elif kind == "e":
        yield 0.0, "llama8b", "batch", "14400.0", "t0", 2.0, 50_000
        for model, tenant in (("flux", "t1"), ("musicgen", "t2")):
            for at in poisson(luck, 1 / 240, 0, HOURS_2):
                yield at, model, "interactive", "", tenant, lognormal(luck, it.work[model], 0.45), 1
    elif kind == "f":
        for model, count, sigma in (("llama8b", 6000, 0.55), ("flux", 200, 0.3)):
            for n in range(count):
                yield n / 100, model, "batch", "", "t0", lognormal(luck, it.work[model], sigma), 1
        for tenant, model, face in SPARSE:
            for at in poisson(luck, 1 / 120, 0, HOURS_2 / 2):
                yield at, model, face, "", tenant, lognormal(luck, it.work[model], 0.4), 1
    else:
        for model, count in it.jobs.items():
            for at in poisson(luck, count / HOURS_2, 0, HOURS_2):
                yield mixed(luck, at, model, it.work[model])


def write(path: Path, head: list[str], seed: int, jobs: list[Job]) -> None:
    """A trace file."""
    box = head[0][: head[0].index(",seed=")]
    with path.open("w") as file:
        print(f"{box},seed={seed}", *head[1:], sep="\n", file=file)
        print("arrival_s,model,class,deadline_s,tenant,work_s,count", file=file)
        for at, model, face, deadline, tenant, work, count in jobs:
            print(f"{at:.2f},{model},{face},{deadline},{tenant},{work:.2f},{count}", file=file)


def best(jobs: list[Job]) -> tuple[float, float]:
    """Least makespan and least total wait of a small trace; loads only for jobs that have arrived."""
    names = sorted({job[1] for job in jobs})
    queues = [[job[0] for job in jobs if job[1] == name] for name in names]
    costs = [SMALL_COSTS[name] for name in names]
    states: dict[tuple[tuple[int, ...], int], list[tuple[float, float]]] = {(tuple(0 for _ in names), -1): [(0.0, 0.0)]}
    for _ in jobs:
        after: dict[tuple[tuple[int, ...], int], list[tuple[float, float]]] = {}
        for (done, loaded), points in states.items():
            for m, queue in enumerate(queues):
                if done[m] == len(queue):
                    continue
                arrival = queue[done[m]]
                load = 0.0 if loaded == m else costs[m][0]
                to = after.setdefault((done[:m] + (done[m] + 1,) + done[m + 1 :], m), [])
                for time, waited in points:
                    start = max(time, arrival) + load
                    to.append((start + costs[m][1], waited + start - arrival))
        states = {state: front(points) for state, points in after.items()}
    ends = [point for points in states.values() for point in points]
    return min(time for time, _ in ends), min(waited for _, waited in ends)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both."""
    kept: list[tuple[float, float]] = []
    least = math.inf
    for time, waited in sorted(points):
        if waited < least - 1e-9:
            kept.append((time, waited))
            least = waited
    return kept


def small_jobs(luck: random.Random) -> list[Job]:
    """30 jobs, ten of each model, within 140 to 1500 s."""
    order = list("ABC" * 10)
    luck.shuffle(order)
    gap = math.exp(luck.uniform(math.log(140), math.log(1500))) / 30
    jobs: list[Job] = []
    at = 0.0
    for model in order:
        at = round(at + luck.expovariate(1 / gap), 1)
        jobs.append((at, model, "interactive", "", f"t{'ABC'.index(model)}", SMALL_COSTS[model][1], 1))
    return jobs


def make(public: Path, into: Path, count: int, seed: int) -> list[Path]:
    """Writes `count` traces of each kind, as many sets of small ones, and small-optima.csv; their paths."""
    made: list[Path] = []
    for kind, name in KINDS.items():
        it = pattern(public / f"{name}-21.csv")
        for n in range(seed, seed + count):
            path = into / f"{name}-{n}.csv"
            write(path, it.head, n, sorted(jobs_of(kind, it, random.Random(f"{kind} {n}"))))
            made.append(path)
    head = pattern(public / "small-200.csv").head
    with (into / "small-optima.csv").open("w") as optima:
        print("trace,opt_makespan_s,opt_total_wait_s", file=optima)
        for n in range(seed * SMALL_SET, (seed + count) * SMALL_SET):
            path = into / f"small-{n}.csv"
            jobs = small_jobs(random.Random(f"small {n}"))
            write(path, head, n, jobs)
            makespan, waited = best(jobs)
            print(f"{path.stem},{makespan:.1f},{waited:.1f}", file=optima)
            made.append(path)
    return made


SPARSE = (
    ("t1", "flux", "batch"),
    ("t2", "musicgen", "batch"),
    ("t3", "llama8b", "batch"),
    ("t4", "flux", "interactive"),
    ("t5", "musicgen", "interactive"),
    ("t6", "llama8b", "interactive"),
)
"""The tenants of f beside the one that floods: model and class."""
