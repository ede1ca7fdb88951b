"""What the records come to: figures beside their goals."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from gpu.common import Json

PARK_WAKE_GOALS_S = {"flux-transformer": 0.6, "flux": 0.75, "text": 1.2}
GAP_EXTRA_S = 0.4
LINK_SHARE = 0.9
RATIO = 0.95
COLD_GOAL_S = 5.0
WHY_MAX_CHARS = 400


@dataclass(frozen=True)
class Row:
    """One line of the table. `met` is None where there is no goal, or it could not be measured."""

    figure: str
    value: str
    goal: str
    met: bool | None


def latest(records: list[Json], part: str) -> Json | None:
    """The last one of a part."""
    found = [record for record in records if record["part"] == part]
    return found[-1] if found else None


def spread(values: list[float], unit: str = "s") -> str:
    """Median and worst."""
    return f"{statistics.median(values):.2f} {unit} (worst {max(values):.2f}, n={len(values)})"


def settled(swaps: list[Json]) -> list[Json]:
    """From the second cycle on; of each model those of the latest call that got so far."""
    late = [s for s in swaps if s.get("cycle", 0) >= 2]
    last = {s["model"]: s.get("run") for s in late}
    return [s for s in late if s.get("run") == last[s["model"]]]


def park_wake(swaps: list[Json], model: str) -> tuple[list[float], list[float]]:
    """Its parks and its wakes by the server's log, in seconds."""
    parks = [s["parked_ms"] / 1e3 for s in swaps if s["came_from"] == model and s.get("parked_ms") is not None]
    wakes = [s["load_ms"] / 1e3 for s in swaps if s["model"] == model and s.get("how") == "parked"]
    return parks, wakes


def took_turns(records: list[Json]) -> list[str]:
    """The models of the last call of `swaps`, if that came to its end: a goal of theirs without a figure is missed.

    Of none if it had one cycle: figures are of those from the second on.
    """
    ends = [at for at, r in enumerate(records) if r["part"] in ("done", "failed") and r["what"] == "swaps"]
    if not ends or records[ends[-1]]["part"] == "failed":
        return []
    turns = [r for r in records[: ends[-1]] if r["part"] == "swap" and r["came_from"]]
    turns = [r for r in turns if r.get("run") == turns[-1].get("run")]
    if all(r.get("cycle", 0) < 2 for r in turns):
        return []
    return list(dict.fromkeys(r["model"] for r in turns))


def not_measured(figure: str, goal: str, why: str = "not measured") -> Row:
    """A goal whose part came to its end without the figure."""
    return Row(figure, why, goal, False)


def rows(records: list[Json]) -> list[Row]:
    """All figures that the records give."""
    out: list[Row] = []
    link = latest(records, "link") or {}
    if "to_gpu_pinned" in link:
        speeds = f"{link['to_gpu_pinned']} / {link['to_host_pinned']} GB/s"
        out.append(Row("link, page-locked, to GPU / to host", speeds, "", None))
        if "to_gpu_after_free" in link:
            speeds = f"{link['to_gpu_new']}, {link['to_gpu_after_free']} GB/s"
            out.append(Row("link, 26 GB into new memory; right after 34 GB were freed by another", speeds, "", None))
        speeds = f"{link['to_gpu_pageable']} / {link['to_host_pageable']} GB/s"
        out.append(Row("link, pageable, to GPU / to host", speeds, "", None))
    swaps = [r for r in records if r["part"] == "swap"]
    late = settled(swaps)
    sizes = {r["model"]: r["bytes"] for r in records if r["part"] == "weights"}
    turns = took_turns(records)
    for model in dict.fromkeys([*sizes, *turns]):
        out += of_model(model, late, sizes.get(model, 0), link.get("to_gpu_pinned"), model in turns)
    out += overhead(late, bool(turns))
    out += cold(swaps, records)
    out += answers(swaps)
    for part, name in (("text", "5 000 short prompts through the server / direct"), ("music", "music / best batch")):
        if record := latest(records, part):
            ratio = record["ratio"]
            through, direct = record["through_per_s"], record["direct_per_s"]
            name = name.replace("5 000", f"{record['jobs']:,}".replace(",", " "))
            of = ""
            if ratios := record.get("ratios"):  # else of an earlier version
                of = f"median of {len(ratios)} rounds, {min(ratios)} to {max(ratios)}; "
            value = f"{ratio:.3f} ({of}{through}/s, direct {direct}/s)"
            out.append(Row(name, value, f">= {RATIO}x", ratio >= RATIO))
    for after, record in {r["after"]: r for r in records if r["part"] == "left"}.items():
        what = "; ".join(record["left"][:3]) or f"nothing, {record['s']} s later"
        out.append(Row(f"left behind after {after}", what, "nothing in 15 s", not record["left"]))
    out += [way(record) for record in {r["model"]: r for r in records if r["part"] == "way"}.values()]
    for record in {r["what"]: r for r in records if r["part"] == "two-gpus"}.values():
        out.append(Row(f"two GPUs: {record['what']}", record["value"], "works", record["met"]))
    ends = {r["what"]: r for r in records if r["part"] in ("done", "failed")}
    for what, record in ends.items():
        if record["part"] == "failed":
            out.append(Row(f"part {what}", f"failed: {brief(record['why'])}", "", False))
    return out


def way(record: Json) -> Row:
    """One model that is parked by the driver's checkpoint, or without a copy."""
    parks, wakes = record["parks"], record["wakes"]
    each = ", ".join(f"{park:.2f} + {wake:.2f}" for park, wake in zip(parks, wakes, strict=False))
    value = f"{each or 'never parked'} s, answers {'the same' if record['same'] else 'differ'}"
    return Row(f"{record['model']} parked by way of {record['way']}", value, "works", bool(wakes) and record["same"])


def brief(why: str) -> str:
    """Why a part failed, for one line of a table. What is too long is cut in the middle: the cause is at the end."""
    line = why.partition("\n")[0].replace("|", "/")
    half = WHY_MAX_CHARS // 2
    return line if len(line) <= WHY_MAX_CHARS else f"{line[:half]} ... {line[-half:]}"


def of_model(model: str, late: list[Json], size: int, link: float | None, is_due: bool) -> list[Row]:
    """One model's parks and wakes from the second cycle on. `is_due`: a goal without a figure is missed."""
    parks, wakes = park_wake(late, model)
    goal = PARK_WAKE_GOALS_S.get(model)
    limit = f"<= {goal} s" if goal else ""
    if not parks or not wakes:
        why = f"never {'woken' if parks else 'parked'} from the second cycle on"
        return [not_measured(f"{model}: park + wake", limit, why)] if goal and is_due else []
    out = []
    total = statistics.median(parks) + statistics.median(wakes)
    out.append(Row(f"{model}: park", spread(parks), "", None))
    out.append(Row(f"{model}: wake", spread(wakes), "", None))
    out.append(Row(f"{model}: park + wake", f"{total:.2f} s", limit, None if goal is None else total <= goal))
    own = [s["worker_wake_s"] for s in late if s["model"] == model and s.get("worker_wake_s")]
    judged = link is not None and model in ("flux", "flux-transformer")
    share_goal = f">= {LINK_SHARE:.0%} of the link" if judged else ""
    if size and own:
        rate = size / 1e9 / statistics.median(own)
        share = f", {100 * rate / link:.0f} % of the link" if link else ""
        met = rate >= LINK_SHARE * link if judged and link else None
        value = f"{rate:.1f} GB/s{share} ({size / 1e9:.1f} GB)"
        out.append(Row(f"{model}: speed of its wake", value, share_goal, met))
    elif size and judged and is_due:
        out.append(not_measured(f"{model}: speed of its wake", share_goal))
    kept = [s["left_mib"] for s in late if s["came_from"] == model and s.get("left_mib") is not None]
    if kept:
        out.append(Row(f"{model}: GPU memory while parked", f"{max(kept)} MiB", "", None))
    gaps = [s["gap_ms"] / 1e3 for s in late if s["model"] == model and s.get("gap_ms") is not None]
    text = f"<= {goal + GAP_EXTRA_S:.2f} s" if goal else ""
    if gaps:
        met = statistics.median(gaps) <= goal + GAP_EXTRA_S if goal else None
        out.append(Row(f"to {model}: decision to its job running", spread(gaps), text, met))
    elif goal and is_due:
        out.append(not_measured(f"to {model}: decision to its job running", text))
    return out


def overhead(late: list[Json], is_due: bool) -> list[Row]:
    """What lies between decision and job beyond the park and the wake of the pair."""
    figure, goal = "decision to job running, beyond park + wake", f"<= {GAP_EXTRA_S} s"
    whole = [s for s in late if s.get("gap_ms") is not None and s.get("parked_ms") is not None and s.get("load_ms")]
    if not whole:
        return [not_measured(figure, goal)] if is_due else []
    extra = [(s["gap_ms"] - s["parked_ms"] - s["load_ms"]) / 1e3 for s in whole]
    met = statistics.median(extra) <= GAP_EXTRA_S
    return [Row(figure, spread(extra), goal, met)]


def cold(swaps: list[Json], records: list[Json]) -> list[Row]:
    out = []
    for model in dict.fromkeys(s["model"] for s in swaps if s.get("how") == "cold"):
        first = next(s for s in swaps if s["model"] == model and s.get("how") == "cold")
        out.append(Row(f"{model}: first cold load", f"{first['load_ms'] / 1e3:.1f} s", "", None))
    again = [r for r in records if r["part"] == "cold"]
    again = [r for r in again if r.get("run") == again[-1].get("run")]
    for model in dict.fromkeys(r["model"] for r in again):
        mine = [r for r in again if r["model"] == model]
        loads = [r["load_ms"] / 1e3 for r in mine]
        without = sum(not r.get("was_spare", True) for r in mine)
        judged = model == "flux-transformer" and any(r.get("spare") for r in again)
        goal = f"< {COLD_GOAL_S:g} s" if judged else ""
        value = spread(loads) + (", no spare" if not judged else f", {without} without the spare" if without else "")
        met = statistics.median(loads) < COLD_GOAL_S and not without if judged else None
        out.append(Row(f"{model}: cold load from page cache", value, goal, met))
    return out


def answers(swaps: list[Json]) -> list[Row]:
    """Whether each model's answers stayed the same, in the latest call that swapped it."""
    out = []
    for model in dict.fromkeys(s["model"] for s in swaps):
        last = [s for s in swaps if s["model"] == model and s["came_from"]][-1:]
        run = last[0].get("run") if last else None
        seen = [s["answer"] for s in swaps if s["model"] == model and s.get("run") == run]
        if last and len(seen) > 1:
            kinds = len(set(seen))
            value = f"{len(seen)} answers, " + ("all the same" if kinds == 1 else f"{kinds} different ones")
            out.append(Row(f"{model}: the same answer before and after", value, "identical", len(set(seen)) == 1))
    return out


def pairs(records: list[Json]) -> list[str]:
    """Decision to job running of each pair, as markdown: parked, from the second cycle on, and cold, in the first."""
    swaps = [r for r in records if r["part"] == "swap" and r.get("gap_ms") is not None]
    late = settled(swaps)
    names = list(dict.fromkeys(s["model"] for s in late))
    if not late:
        return []
    lines = ["| from, to | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for before in names:
        cells = []
        for after in names:
            warm, colds = (
                [s["gap_ms"] / 1e3 for s in of if (s["came_from"], s["model"], s.get("how")) == (before, after, how)]
                for of, how in ((late, "parked"), (swaps, "cold"))
            )
            told = [f"{statistics.median(warm):.2f} s"] if warm else []
            cells.append(", ".join(told + ([f"cold {colds[-1]:.1f} s"] if colds else [])))
        lines.append(f"| {before} | " + " | ".join(cells) + " |")
    return lines


def verdict(row: Row) -> str:
    return "" if row.met is None else "met" if row.met else "MISSED"


def markdown(records: list[Json]) -> str:
    """A block for docs/BENCHMARKS.md."""
    start = latest(records, "start") or {}
    link = latest(records, "link") or {}
    cards = ", ".join(f"{gpu['name']}, driver {gpu['driver']}" for gpu in start.get("gpus", [])) or "no GPU"
    head = f"{cards}; torch {link.get('torch', '?')}; {start.get('at', '')}; scale {start.get('scale', '?')}."
    lines = [head, "", "| figure | measured | goal | |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.figure} | {row.value} | {row.goal} | {verdict(row)} |" for row in rows(records)]
    if table := pairs(records):
        lines += ["", "Decision to next job running, parked (median from the second cycle on) and cold:", "", *table]
    return "\n".join(lines) + "\n"


def plain(records: list[Json]) -> str:
    """The same for a terminal."""
    found = rows(records)
    wide = max((len(row.figure) for row in found), default=10)
    return "\n".join(
        f"{verdict(row):<7} {row.figure:<{wide}}  {row.value}  {row.goal and f'[{row.goal}]'}" for row in found
    )
