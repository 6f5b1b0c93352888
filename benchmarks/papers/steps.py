"""What stop rules and step control save: quality against mean steps, which no paper shows.

The same proposals are refined by Collaborative (nonsaturating, sgd), with fixed steps and with backtracking, and stopped:
all after K steps (one run gives every K), at the median real logit, at the logit of a real sample drawn for each
(`ReferenceSample`), or after each step with probability p (`Hazard`), at the latest after the largest K. Sets: the imbalanced
ring of [CS] in data space and the demo's early-stopped digits at their recipe's layer, each by a D shaped on samples left at
a uniformly drawn step, as in [CS], and by one shaped on samples left at the median stop, as in the demo.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import fastrefine as fr
from benchmarks.papers import cases, plots
from benchmarks.papers.cases import CONTROLS, QUICK_RING, Case, Quality, curve
from benchmarks.papers.cells import trained_judge
from benchmarks.papers.plane import RING
from benchmarks.papers.result_file import Row, against, claim, mean, pick
from benchmarks.papers.run import Recipe, Run, Table
from fastrefine.demo.gan import build
from fastrefine.demo.recipes import DIGITS
from fastrefine.stopping import StopRule

JUDGE = 0  # seeds the one classifier that judges all digits, so that seeds differ by shaping and sampling alone

GOOD = Quality("good", "good samples", 0.01, higher=True)
JS = Quality("js", "JS (nats)", 0.01)
FRECHET = Quality("frechet_distance", "Frechet distance", 0.1, relative=True)
SCORE = Quality("classifier_score", "classifier score", 0.1, higher=True)
QUALITIES = {"ring": (JS, GOOD), "digits": (FRECHET, SCORE)}  # the first is the one of the claims
FIXED, MEDIAN, REFERENCE, HAZARD = "K steps", "median stop", "reference sample", "hazard"
SHAPED_AT = ("a uniform step", "the median stop")
# sets: of QUALITIES x SHAPED_AT. *_step: step sizes by control, chosen on seed 0: those that serve the median stop best (on the
# ring in `step_control`, on digits of 1, 3, 10 and of .3, 3). ks: numbers of steps of all samples, the largest also the last
# step of the other rules. hazards: stopping probabilities after a step. digits_iterations: of shaping.
FULL = Recipe(
    step_size=1.0, shaping_iterations=500, shaping_batch=500, shaping_rate=8e-3, shaping_steps=50, samples=10_000,
    classifier_steps=DIGITS.classifier_steps,
    own=dict(
        ring=RING, ring_steps=3000, sets=tuple((base, at) for base in QUALITIES for at in SHAPED_AT),
        point_step={"fixed": 1.0, "backtracking": 1.0}, image_step={"fixed": 10.0, "backtracking": 3.0},
        ks=(0, 1, 2, 5, 10, 15, 20, 25, 30, 40, 50), hazards=(0.02, 0.05, 0.1, 0.2, 0.5), images=4000,
        digits_iterations=DIGITS.shaping_iterations,
    ),
)  # fmt: skip
QUICK = FULL.but(
    ring=QUICK_RING, sets=(("digits", SHAPED_AT[1]),), image_step={"fixed": 10.0, "backtracking": 6.0}, ks=(0, 8, 30),
    hazards=(0.2,), images=120, digits_iterations=12, classifier_steps=100,
)  # fmt: skip
REDUCTIONS = ()


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Of every set; seed: of the ring's training, of shaping and of sampling. The digits' GAN is the embedded one."""
    recipe, table = run.recipe, Table(run.cells(), run.recipe, seed)
    for base, shaped_at in recipe.sets:
        case = trained_case(table, base, shaped_at)
        sizes, samples = (recipe.point_step, recipe.samples) if base == "ring" else (recipe.image_step, recipe.images)
        yield from sweep(table, case, sizes, samples)


def trained_case(table: Table, base: str, shaped_at: str) -> Case:
    """The ring, trained here, or the digits' embedded pair, with its discriminator shaped."""
    name, key, recipe = f"{base}, D shaped at {shaped_at}", f"D-{base}-{SHAPED_AT.index(shaped_at)}", table.recipe
    stop = None if shaped_at == SHAPED_AT[0] else fr.stopping.MedianOfReal()
    if base == "ring":
        return cases.shaped_points(table, key, name, cases.ring(table, recipe.ring, recipe.ring_steps), stop)
    data = DIGITS.load(None)
    judge = trained_judge(table.cells, DIGITS.classifier, data, seed=JUDGE, steps=recipe.classifier_steps)
    digits = cases.images(DIGITS, data.train, judge)
    shaped = table.trained(
        key, build(DIGITS.discriminator, 0), digits.refiner("backtracking", DIGITS.step_size, DIGITS.max_steps, stop),
        data.train, iterations=recipe.digits_iterations, batch=DIGITS.shaping_batch, rate=DIGITS.shaping_rate, stop=stop,
        betas=(0.5, 0.9),
    )  # fmt: skip
    return replace(digits, name=name, discriminator=shaped)


def sweep(table: Table, case: Case, sizes: Mapping[str, float], samples: int) -> Iterator[Row]:
    """Rows of a case: every control and stop rule; all see the same proposals."""
    recipe, seed = table.recipe, table.seed
    rules: list[tuple[str, float | None, StopRule | None]] = [
        (FIXED, None, None), (MEDIAN, None, fr.stopping.MedianOfReal()), (REFERENCE, None, fr.stopping.ReferenceSample()),
        *((HAZARD, p, fr.stopping.Hazard(p)) for p in recipe.hazards),
    ]  # fmt: skip
    for control, size in sizes.items():
        for rule, p, stop in rules:
            facts = {"set": case.name, "rule": rule, "control": control, "parameter": p, "seed": seed, "step_size": size}

            def make(c: str = control, z: float = size, s: StopRule | None = stop, facts: Row = facts) -> list[Row]:
                refiner, ks = case.refiner(c, z, max(recipe.ks), s), recipe.ks if s is None else ()
                out, facts = refiner.sample(samples, seed=seed, snapshots=ks), {**facts, "samples": samples}
                if s is not None:
                    return [{**facts, **_figures(case, out.images, out.steps, max(recipe.ks))}]
                return [
                    {**facts, "parameter": k, **_figures(case, out.snapshots[k].images, out.steps.clamp(max=k), k)} for k in ks
                ]

            yield from table.cells.row(f"{seed}-{case.name}-{control}-{rule}-{p}", make)


def _figures(case: Case, images: Tensor, steps: Tensor, last: int) -> Row:
    """unmoved, exhausted: shares of samples with no step, and with all of them."""
    return {
        "mean_steps": float(steps.double().mean()), "unmoved": float((steps == 0).double().mean()),
        "exhausted": float((steps >= last).double().mean()), **case.measure(images),
    }  # fmt: skip


def qualities(name: str) -> tuple[Quality, ...]:
    """Figures of merit of a set."""
    return QUALITIES[name.split(",")[0]]


def interpolated(steps: float, fixed: Mapping[float, float]) -> float:
    """Quality of K steps for all at a mean number of steps between two K, on the line between them; fixed: K -> quality."""
    ks = sorted(fixed)
    low, high = max(k for k in ks if k <= steps), min(k for k in ks if k >= steps)
    share = (steps - low) / (high - low) if high > low else 0.0
    return (1 - share) * fixed[low] + share * fixed[high]


def claims(rows: Sequence[Row]) -> list[Row]:
    """Of means over seeds; two values count as alike within ``Quality.alike``."""
    found: list[Row] = []
    names = list(dict.fromkeys(row["set"] for row in rows))
    for name in names:
        q = qualities(name)[0]
        for control in CONTROLS:
            found += _of_rules([r for r in rows if (r["set"], r["control"]) == (name, control)], name, q, control)
        fixed, ours = ({key: _median(rows, key, name, c) for key in (q.key, "mean_steps")} for c in CONTROLS)
        holds = q.loss(ours[q.key]) <= q.loss(fixed[q.key]) + q.bound and ours["mean_steps"] < fixed["mean_steps"]
        text = f"{name}, {q.label}, median stop: backtracking is within {q.margin} of fixed steps or better, in fewer steps"
        found.append(claim(text, holds, backtracking=ours, fixed=fixed))
    for base, qs in QUALITIES.items():
        uniform, median = (f"{base}, D shaped at {at}" for at in SHAPED_AT)
        for control in CONTROLS if {uniform, median} <= set(names) else ():
            other, own = (_median(rows, qs[0].key, name, control) for name in (uniform, median))
            text = f"{base}, {qs[0].label}, {control}: the median stop is served better by a D shaped at it, by more than"
            holds = qs[0].loss(own) < qs[0].loss(other) - qs[0].bound
            found.append(claim(f"{text} {qs[0].margin}", holds, shaped_at_it=own, shaped_at_a_uniform_step=other))
    return found


def _median(rows: Sequence[Row], key: str, name: str, control: str) -> float:
    return mean(rows, key, set=name, control=control, rule=MEDIAN)


def _of_rules(rows: Sequence[Row], name: str, q: Quality, control: str) -> list[Row]:
    """Of one set and control."""
    fixed: Any = curve(rows, "parameter", q.key, rule=FIXED)
    best, of = min(fixed.values(), key=q.loss), f"{name}, {q.label}, {control}"
    found = []
    for rule in (MEDIAN, REFERENCE):
        value, steps = mean(rows, q.key, rule=rule), mean(rows, "mean_steps", rule=rule)
        as_good = [k for k in fixed if q.loss(fixed[k]) <= q.loss(value) + q.bound]
        fewest, there = min(as_good, default=None), interpolated(steps, fixed)
        reached = q.loss(value) <= q.loss(best) + q.bound
        found += [
            claim(f"{of}: the {rule} is within {q.margin} of the best K or better, in fewer mean steps than any K as good",
                  reached and (fewest is None or steps < fewest), value=value, best_k=best, steps=steps, fewest_k=fewest),
            claim(f"{of}: the {rule} is better than K steps for all of the same mean number, by more than {q.margin}",
                  q.loss(value) < q.loss(there) - q.bound, value=value, k_steps=there, steps=steps),
        ]  # fmt: skip
    last, stopped = fixed[max(fixed)], mean(rows, q.key, rule=MEDIAN)
    found.append(claim(f"{of}: the largest K for all is worse than the median stop, by more than {q.margin}",
                       q.loss(last) > q.loss(stopped) + q.bound, largest_k=last, median_stop=stopped))  # fmt: skip
    values, steps_of = (curve(rows, "parameter", key, rule=HAZARD) for key in (q.key, "mean_steps"))
    gains = [p for p in values if q.loss(values[p]) < q.loss(interpolated(steps_of[p], fixed)) - q.bound]
    text = f"{of}: at no p is the hazard better than K steps for all of the same mean number, by more than {q.margin}"
    return [*found, claim(text, not gains, exceptions=gains)]


def comparison(rows: Sequence[Row]) -> list[Row]:
    """No paper has the figures: the median stop beside the best K for all and its K, by seed."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        q = qualities(name)[0]
        for control in CONTROLS:
            mine = [row for row in rows if (row["set"], row["control"]) == (name, control)]
            of = f"{name}, {control}"
            headline = control == "backtracking" and name.endswith(SHAPED_AT[1])
            for key, label, better in ((q.key, q.label, q.better), ("mean_steps", "mean steps", "lower")):
                values = pick(mine, key, rule=MEDIAN)
                found.append(against(f"{of}, median stop", label, None, values, better, headline=headline))
            best = [
                min((r for r in mine if r["rule"] == FIXED and r["seed"] == seed), key=lambda r: q.loss(r[q.key]))
                for seed in dict.fromkeys(row["seed"] for row in mine)
            ]
            found.append(against(f"{of}, best K for all", q.label, None, [r[q.key] for r in best], q.better))
            found.append(against(f"{of}, best K for all", "mean steps", None, [r["mean_steps"] for r in best], "lower"))
    return found


COLOURS = {"fixed": "C1", "backtracking": "C0"}
STYLES = {  # by rule: marker, line
    FIXED: ("o", "-"), HAZARD: ("x", ":"), MEDIAN: ("*", ""), REFERENCE: ("D", ""),
}  # fmt: skip


def draw(run: Run, rows: Sequence[Row]) -> None:
    """The trade-off, quality against mean steps: a column of panels for each set, one for each of its figures of merit."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = plots.subplots(max(len(qualities(name)) for name in names), len(names), 2.9, 2.6)
    for column, name in enumerate(names):
        for axis, q in zip(axes[:, column], qualities(name), strict=True):
            _panel(axis, [row for row in rows if row["set"] == name and row.get(q.key) is not None], q)
        axes[0, column].set_title(name.replace(", ", "\n"), fontsize=9, fontweight="bold")
        axes[-1, column].set_xlabel("mean steps", fontsize=8)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    lines = 2 * len(STYLES) / len(names)  # of the legend
    figure.tight_layout(pad=0.5, rect=(0, 0.05 * lines, 1, 1))
    plots.save(figure, run.outdir / "trade-off.png")


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], q: Quality) -> None:
    for control in CONTROLS:
        for rule, (marker, line) in STYLES.items():
            where = {"control": control, "rule": rule}
            x, y = (list(curve(rows, "parameter", key, **where).values()) for key in ("mean_steps", q.key))
            size = 11 if marker == "*" else 4.5
            axis.plot(
                x, y, label=f"{rule}, {control}", color=COLOURS[control], marker=marker, linestyle=line, markersize=size,
                linewidth=1.3, markeredgecolor="0.2" if not line else None, markeredgewidth=0.6 if not line else 1.2,
            )  # fmt: skip
    plots.plain(axis, ylabel=f"{q.label}, {q.better} is better")
    if q.relative:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.3g}")
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_formatter("{x:.3g}" if high < 10 * low else "")
