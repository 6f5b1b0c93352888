"""``python -m benchmarks.results_page`` writes docs/results.md: every measured table, from the records in results/ alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from benchmarks import report as speed
from benchmarks.papers import report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
Record = dict[str, Any]


def page(results: Path = RESULTS) -> str:
    """The page as Markdown."""
    parts = (
        _head, _demo, _seeds, _budget, _colours, _papers, _correctors, _laws, _speed, _zoo, _chains, _threads, _precision,
        _production,
    )  # fmt: skip
    return "\n\n".join(block for part in parts for block in part(results)) + "\n"


def _head(results: Path) -> Iterator[str]:
    yield "# Results"
    yield (
        "`python -m benchmarks.results_page` writes this page from the records in [benchmarks/results](../benchmarks/results). "
        "Do not edit it by hand. Each section names the command that measured it and the commit it was measured at. "
        "Nothing here was measured on a GPU."
    )
    yield (
        "FD is the Fréchet distance (lower is better), CS the classifier score (higher is better). Both use the features of a "
        "small classifier that was trained here on the real images, so they compare only with figures of the same classifier "
        "and the same number of images. B0 is the loop of the public codes, B1 a careful expert's loop, B2 is B1 under "
        "`torch.compile` ([benchmarks](../benchmarks/README.md))."
    )


def _demo(results: Path) -> Iterator[str]:
    record = _read(results / "demo-digits.json")
    yield "## The demo"
    yield (
        f"The embedded digits generator, stopped early after 1000 training steps, sampled in six ways: "
        f'{record["samples"]:,} samples a row, seed {record["seed"]}. "refined" uses the discriminator as the GAN left it, '
        f'"shaped" one that was shaped for refinement first, "shaped+mh" selects from refined proposals by '
        f'Metropolis-Hastings. "distilled" is a map that learned refinement, "distilled+steps" takes at most 4 steps after it. '
        f"Ours stops a sample at the median real logit, after {record['max_steps']} steps at most; B0 takes the most steps of "
        "the row for every sample. The generator's row is the engine with no step, which also scores each image."
    )
    yield _told(record)
    yield _table(
        ("", "FD", "CS", "mean steps", "evaluations", "images/s", "B0 images/s", "ratio", "to B0 at its best"),
        [(r["name"], f"{r['frechet_distance']:.2f}", f"{r['classifier_score']:.2f}", f"{r['mean_steps']:.1f}",
          f"{r['evaluations']:.1f}", f"{r['images_per_second']:,}", f"{r['images_per_second_b0']:,}", f"{r['ratio_b0']:.1f}x",
          f"{r['ratio_b0_best']:.1f}x")
         for r in record["rows"]],
    )  # fmt: skip
    repeats = "; ".join(
        f"{', '.join(f'{name} {ratio:.1f}x' for name, ratio in repeat['ratio_b0'].items())} at commit "
        f"{repeat['commit'][:7]} on {repeat['when']}"
        for repeat in record["repeats"]
    )
    best = record["b0_best"]
    yield (
        f"B0 at its best takes {best['steps']} steps of {best['step_size']:g} by the shaped discriminator: FD "
        f"{best['frechet_distance']:.2f}, CS {best['classifier_score']:.2f}, {best['images_per_second']:,} images/s. FD, CS "
        f"and steps repeat to the last digit on one machine; another one differs in the fourth. The same ratios were {repeats}."
    )


def _seeds(results: Path) -> Iterator[str]:
    record = _read(results / "demo-seeds.json")
    yield "## Three training seeds"
    yield (
        "The demo with GANs that were trained anew, FD / CS. The classifier has 98 % accuracy on digits and 99 % on MNIST. "
        "The converged MNIST generator was trained for one seed."
    )
    yield f"    {record['command']}"
    for table in record["tables"]:
        rows = [
            (row["name"], *map(_figures, row["frechet_distance"], row["classifier_score"])) for row in table["rows"]
        ]  # fmt: skip
        change = ("shaped, change of FD", *(f"{percent} %" for percent in table["shaped_change_percent"]))
        seeds = record["seeds"][: len(change) - 1]
        title = f"{table['title']}, {table['samples']:,} samples a row, commit {table['commit'][:7]}"
        yield f"**{title[0].upper()}{title[1:]}**"
        yield _table(("", *(f"seed {seed}" for seed in seeds)), [*rows, change])
    yield (
        "Refinement by the discriminator as it is raised the FD of most digits generators: shape it first. "
        "Metropolis-Hastings adds little after shaping, because refined samples stop at nearly one logit. An early-stopped "
        "GAN is the paper's setting and no advice: the converged generators start about where the refined early ones end "
        "(digits) or well below (MNIST), and refinement improves them too."
    )


def _budget(results: Path) -> Iterator[str]:
    record = _read(results / "papers" / "budget" / "result.json")
    rows: list[Record] = record["rows"]
    yield "## Quality for a budget"
    yield (
        "Evaluations of D for each image, at most, against the distance to the real data (FD; of the ring, whose samples are "
        "points, the Jensen-Shannon divergence of the shares of its components), means over training seeds. Samples stop at "
        'the median real logit. D is as the GAN left it, or shaped; "distilled" is the generator with a map that '
        "[learned refinement](distil.md), and Barzilai-Borwein steps after it. [Which one to use](which.md)."
    )
    yield _told(record, "python -m benchmarks.papers run budget --outdir DIR --data MNIST_FOLDER")
    yield (
        "The rows that are not of samplers of the latent were made at commit 4f5f4bb, those of samplers as given at d20fcd0. "
        "They were kept; other work ran on the machine."
    )
    for pair in dict.fromkeys(row["pair"] for row in rows):
        mine = [row for row in rows if row["pair"] == pair]
        budgets, seeds = (sorted({row[key] for row in mine}) for key in ("budget", "seed"))
        digits = 2 if mine[0]["value"] > 1 else 4

        yield f"**{pair}**, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        yield _by_budget(mine, digits)
        shown = [("generator", "none", 0), ("backtracking", "shaped", budgets[-1]), ("Barzilai-Borwein", "shaped", 5),
                 ("Barzilai-Borwein", "shaped", 10), *(("distilled", "shaped", budget) for budget in (0, 3, 5))]  # fmt: skip
        lines = []
        for kind in shown:
            found = [row for row in mine if (row["method"], row["discriminator"], row["budget"]) == kind]
            values = (f"{r['value']:.{digits}f} ({r['low']:.{digits}f} to {r['high']:.{digits}f})" for r in found)
            lines.append((f"{kind[0]}, at most {kind[2]}", f"{fmean(row['evaluations'] for row in found):.1f}", *values))
        yield "Each seed, with the interval that holds 90 % of resampled sets, by shaped discriminators:"
        yield _table(("", "evaluations", *(f"seed {seed}" for seed in seeds)), lines)
    yield "What was made once for each pair and seed 0; other work ran on the machine:"
    yield _table(("pair", "", "evaluations of D, at most", "seconds"), [
        (t["pair"], t["what"], f"{t['evaluations_at_most']:,}", f"{t['seconds']:.0f}")
        for t in record["training"] if t["seed"] == 0
    ])  # fmt: skip
    yield (
        f"The samplers of the latent are as given, or as `tune_sampler` set them for at most {record['recipe']['tuning']} "
        "evaluations, by a second classifier on other seeds. What it found, and FDs of that classifier on the last seed of the "
        "search: raw, as given, found. The search of a law has more settings, and so more samples at its end:"
    )
    yield _tuning(record["tuning"])


def _tuning(found: Sequence[Record]) -> str:
    """A line for each search."""
    several = len({(t.get("pair"), t["seed"]) for t in found}) > 1
    return _table((*(("pair", "seed") if several else ()), "", "found", "steps", "raw", "given", "found", "evaluations", "s"), [
        (*((t["pair"], str(t["seed"])) if several else ()), _kind(t["method"], t["discriminator"]),
         ", ".join(f"{k} {v:g}" for k, v in t["setting"].items()) or "nothing better", str(t["steps"]),
         *(f"{t['quality'][k]:.2f}" for k in ("raw", "before", "after")), f"{t['evaluations']:,}", f"{t['seconds']:.0f}")
        for t in found
    ])  # fmt: skip


def _by_budget(rows: Sequence[Record], digits: int) -> str:
    """A line for each method and discriminator, a column for each budget."""

    def cell(found: list[Record]) -> str:
        return f"{fmean(row['value'] for row in found):.{digits}f}" if found else "–"

    budgets = sorted({row["budget"] for row in rows})
    kinds = dict.fromkeys((row["method"], row["discriminator"]) for row in rows)
    return _table(("at most", *map(str, budgets)), [
        (_kind(method, judge), *(
            cell([r for r in rows if (r["method"], r["discriminator"], r["budget"]) == (method, judge, budget)])
            for budget in budgets
        ))
        for method, judge in kinds
    ])  # fmt: skip


def _kind(method: str, judge: str) -> str:
    return method if judge == "none" else f"{method}, D {judge}"


def _colours(results: Path) -> Iterator[str]:
    yield from _of_cifar10(
        results, "budget_cifar10", "CIFAR-10",
        "One DCGAN ({features} features, normal latents, {iterations:,} iterations in float32)",
        "The first four methods refine at one layer until the median real logit. The samplers DDLS, MALA, DGflow, DOT and PCN "
        "move the latent, without a stop rule.",
    )  # fmt: skip
    if not (results / "papers" / "budget_sngan" / "result.json").exists():
        return
    yield from _of_cifar10(
        results, "budget_sngan", "an SNGAN of CIFAR-10",
        "One residual SNGAN on the hinge loss ({features} features, {iterations:,} iterations, then {catch_up} of D alone)",
        "Backtracking and Barzilai-Borwein refine at one block until the median real logit, the others move the latent. "
        '"ex2mcmc" is the package, with the step size that MALA has.',
    )  # fmt: skip


def _of_cifar10(results: Path, name: str, title: str, what: str, methods: str) -> Iterator[str]:
    record = _read(results / "papers" / name / "result.json")
    rows, recipe, real, second = record["rows"], record["recipe"], record["real"], "frechet_distance_efficientnet"
    raw = rows[0]
    what = what.format(features=recipe["features"][0], iterations=recipe["checkpoints"][0], catch_up=recipe.get("catch_up"))
    yield f"## Quality for a budget: {title}"
    yield (
        f"{what}, seed {record['seeds'][0]}, {recipe['part']['samples']:,} samples a row. Its judges: a classifier that was "
        f"trained here ({record['classifier_accuracy']['judges']:.0%} accuracy), and EfficientNet-Lite0, which was trained on "
        f"ImageNet; D is built on neither. As many real images have FDs of {real['value']:.1f} and {real[second]:.1f}, "
        "about the least that so few samples can have. A second classifier chose how D is shaped, step sizes and numbers of "
        f"steps, on other seeds and training images. {methods}"
    )
    yield _told(record, f"python -m benchmarks.papers run {name} --outdir DIR --data CIFAR10_FOLDER")
    yield "FD of the own classifier by evaluations of D for each image, at most:"
    yield _by_budget(rows, 2)
    yield "Both judges, the percentage is the change from the generator; in brackets what holds 90 % of resampled sets:"
    yield _table(("", "evaluations", "FD, own classifier", "change", "FD, EfficientNet", "change"), [
        (f"{_kind(r['method'], r['discriminator'])}, at most {r['budget']}", f"{r['evaluations']:.1f}",
         f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f})", _change(r["value"], raw["value"]),
         f"{r[second]:.1f}", _change(r[second], raw[second]))
        for r in rows if second in r
    ])  # fmt: skip
    yield "How D was shaped, each round from the last one's D, and the least FD of the classifier that chooses:"
    yield _table(("", "round", "FD", "seconds"), [
        (t["what"], str(t["round"]), f"{t['distance']:.2f}", f"{t['seconds']:.0f}") for t in record["shaping"]
    ])  # fmt: skip
    yield (
        f"What `tune_sampler` found for at most {recipe['tuning']} evaluations, and the FD of the classifier that chooses "
        "on the last of its seeds: raw, with the setting that was given, with the one that was found. The search of a law has "
        "more settings, and so more samples at its end:"
    )
    yield _tuning(record["tuning"])


def _change(value: float, raw: float) -> str:
    return f"{value / raw - 1:+.0%}"


def _papers(results: Path) -> Iterator[str]:
    yield "## The papers' experiments"
    yield (
        'Published figures beside ours, a few of each experiment; ± is the standard deviation over seeds. "Reduced" is yes '
        "where a run is smaller than the published one. [What the experiments are and what came out](papers.md); "
        "[every row and every claim](../benchmarks/results/papers/report.md)."
    )
    yield "    python -m benchmarks.papers run NAME --outdir DIR\n    python -m benchmarks.papers report DIR --summary"
    yield report.summary(results / "papers").strip()


def _correctors(results: Path) -> Iterator[str]:
    record = _read(results / "papers" / "corrector" / "result.json")
    found = {(row["model"], row["stage"], row["seed"]): row for row in record["rows"]}
    stages = {"raw": "", "uncorrected": ", the GAN's D alone", "refined": ", with the corrector"}
    yield "## Generators without a discriminator of their own"
    yield (
        "A VAE and a normalizing flow of the digits, FD / CS of 4,000 samples. They are refined by `DGflow` (KL, in the "
        "latent, 25 steps of .03, chosen on seed 0) with a GAN's discriminator alone, and with the corrector of "
        "`fit_corrector` added."
    )
    yield _told(record, "python -m benchmarks.papers run corrector --outdir DIR")
    yield _table(
        ("", *(f"seed {seed}" for seed in record["seeds"])),
        [(f"{name}{text}", *(_judged(found[model, stage, seed]) for seed in record["seeds"]))
         for model, name in (("vae", "VAE"), ("flow", "flow")) for stage, text in stages.items()],
    )  # fmt: skip
    record = _read(results / "papers" / "fitted" / "result.json")
    yield (
        "The early-stopped MNIST generator with its discriminator thrown away, and one trained for it by `fit_discriminator`, "
        "FD / CS of 3,000 samples:"
    )
    yield _told(record, "python -m benchmarks.papers run fitted --outdir DIR --data MNIST_FOLDER")
    yield _table(("", "FD / CS", "mean steps"), [
        (row["stage"], _judged(row), f"{row['mean_steps']:.1f}") for row in record["rows"]
    ])  # fmt: skip


LAWS = {
    "generator": "generator", "the law, sampled": "the law itself", "MALA": "MALA", "HMC": "HMC",
    "DDLS (ULA), eps .0002": "DDLS, eps .0002", "DDLS (ULA), eps .001": "DDLS, eps .001: biased", "MH": "Metropolis-Hastings",
    "DRS": "DRS", "DGflow KL, latent": "DGflow, latent", "DOT, latent": "DOT, latent",
    "refine, shaped D": "refinement of the image, shaped D", "collaborative": "the same, then Metropolis-Hastings",
}  # fmt: skip


def _laws(results: Path) -> Iterator[str]:
    record = _read(results / "papers" / "gaussians25" / "result.json")
    found = {row["name"]: row for row in record["rows"] if row["version"] == "[DDLS]"}
    yield "## Samplers against the exact law"
    yield (
        "A WGAN-GP on the 25 Gaussians of [DOT], a logit from `fit_discriminator` that was calibrated on held-out data, and "
        "the exact law p0(z) exp(d(G(z))) by quadrature on a grid. HQ is the share of samples within 4 sigma of a mode, of "
        f"{sum(found['generator']['samples']):,} samples a row. The next two columns are distances to the exact law: in HQ, "
        "and in the worst of the 25 mode shares. EMD is the earth mover's distance of 2,000 samples to real data (real against "
        f"real: {found['real data']['emd']:.3f})."
    )
    yield _told(record, "python -m benchmarks.papers run gaussians25 --outdir DIR")
    yield _table(
        ("", "K", "HQ", "HQ off the law", "worst share off", "EMD"),
        [(text, _steps(found[name], record["recipe"]["[DDLS]"]["warm_up"]),
          *(f"{found[name][key]:.3f}" for key in ("high_quality", "high_quality_distance", "share_distance", "emd")))
         for name, text in LAWS.items()],
    )  # fmt: skip
    yield (
        "MALA and HMC start from a warm-up of 50 steps of MALA that adapts its step sizes. Step sizes, K and the fit were "
        "tuned on this one training seed, with the distance to the law in view; there are three sampling seeds. The raw "
        f"critic's own law has HQ {record['laws']['critic']['high_quality']:.3f}: sampling it exactly makes nothing better."
    )


def _steps(row: Record, warm_up: int) -> str:
    """K, after the steps of a warm-up."""
    return f"{warm_up} + {row['steps']}" if row.get("start") == "warm" else str(row["steps"] or "–")


def _speed(results: Path) -> Iterator[str]:
    records = [speed.load(path) for path in sorted(results.glob("cpu-*.json"))]
    yield "## Speed on a CPU"
    yield (
        "One thread, fixed steps, equal results. B0, B1, B2: how many times as fast as each baseline, by CPU times of the same "
        "rounds. Of peak: how much of the time the multiplications would take at the speed of the machine's own matrix product "
        "(goal: .7). Gain: of stopping over K steps for all, and what is ideal, (K + 1) / (mean steps + 1). Slot "
        "efficiency: useful evaluations / (slots x steps), and the best that a greedy schedule can reach."
    )
    yield "    make bench"
    header = (
        "workload, cut, precision", "stop", "K", "slots", "images/s", "B0", "B1", "B2", "of peak", "gain (ideal)",
        "efficiency (bound)", "commit",
    )  # fmt: skip
    yield _table(header, [_speed_row(row, record) for record in records for row in record["rows"]])
    machine, *others = (record["machine"] for record in records)
    yield (
        f"{machine['device']} ({', '.join(machine['matrix_units'])}; since commit 07f3411: "
        f"{', '.join(others[-1]['matrix_units'])}; no AMX), torch {machine['torch']}, batches of 64 and 256, of sngan32 of 16. "
        "Other work ran on this machine, so whole processes differ by a tenth and more: repeated runs gave "
        "1.42-1.81x (first, float32) and 1.63-1.73x (output, float32) over B0, 2.8-3.3x and 2.9-3.3x (bfloat16), and gains of "
        "1.64-1.80x. The goals were 1.8x B0, 1x B2 with all steps, and 2x B2 with the median stop. The last cannot be had "
        "here: half of the steps saved are 1.89x, and B2 too stops a batch when all of it has stopped. With 256 samples in 64 "
        "slots a fifth of the slot-steps are empty ones at the end."
    )


def _speed_row(row: Record, record: Record) -> tuple[str, ...]:
    ratios = (f"{row[name]:.2f}x" if row.get(name) else "–" for name in ("ratio_b0", "ratio_b1", "ratio_b2"))
    gain = f"{row['gain']:.2f}x ({row['ideal_gain']:.2f}x)" if row.get("gain") else "–"
    peak = f"{row['floor_fraction']:.2f}" if row.get("floor_fraction") else "–"
    return (
        f"{row['workload']}, {row['cut']}, {row['precision']}", row["stop"], str(row["K"]), str(row["num_slots"]),
        f"{rate:,.0f}" if (rate := row["images_per_second"]) > 100 else f"{rate:.1f}", *ratios, peak, gain,
        f"{row['slot_efficiency']:.3f} ({row['greedy_bound']:.3f})", _short(record["machine"]["commit"]),
    )  # fmt: skip


def _zoo(results: Path) -> Iterator[str]:
    record = _read(results / "zoo-cpu.json")
    rows, machine = record["rows"], record["machine"]
    yield "## Networks of other people"
    yield (
        "Public checkouts as they are, and the networks of `fastrefine.models`, with random weights at small sizes "
        f"([how each is called and cut](../benchmarks/zoo_pairs.py)). K steps for every sample, {rows[0]['precision']}, one "
        "thread, CPU time, median of rounds in turn. B0, B1: how many times as fast ours is. Wanted were 50 steps and 8, 64 "
        "and 1,024 samples; where these take long, fewer steps (10 at least) and fewer samples were measured. Prepared: "
        "seconds that the first call took longer than a later one. Memory: what our side took at most. Off: the largest "
        "difference of an image from B1's, in parts of the largest value. Without: rungs of the ladder that were dropped."
    )
    yield f"    make bench-zoo ZOO=FOLDER    # {record['command']}"
    yield (
        f"{machine['device']} ({', '.join(machine['matrix_units'])}), torch {machine['torch']}, commit "
        f"{', '.join(dict.fromkeys(_short(row['commit']) for row in rows))}. Other work ran on this machine, so single "
        "ratios differ by a tenth and more between runs."
    )
    yield _table(
        ("pair", "at", "n", "K", "slots", "B0", "B1", "images/s", "prepared", "memory", "off", "without"),
        [_zoo_row(row) for row in rows],
    )  # fmt: skip
    means = []
    for base in ("b0", "b1"):
        ratios = [row[f"ratio_{base}"] for row in rows]
        means.append(f"{geometric_mean(ratios):.2f}x {base.upper()} ({min(ratios):.2f}x to {max(ratios):.2f}x)")
    slow = [row for row in rows if row["ratio_b1"] < 0.95]
    yield f"Geometric means: {', '.join(means)}. {len(slow)} of {len(rows)} rows are below 0.95 of B1, the goal."
    for failed in record["failed"]:
        yield f"Not measured: {failed['pair']} at {failed['at']}: {failed['error']}"
    yield ZOO_REASONS
    yield (
        "With a threshold samples leave their slots early. At the inner place, with a threshold that half of the samples reach "
        "in half of the steps: how many times as fast the run is as with fixed steps, and what the steps saved would give, "
        "(K + 1) / (mean steps + 1). At the end of a run slots stand empty, more of them where there are fewer samples. "
        "B1: how many times as fast ours is as B1 with the same threshold, each at its best batch. B1 ends a batch when all "
        "its samples have stopped; with random weights they stop at nearly the same step, which suits it."
    )
    stopped = [(row["pair"], row["stopped"]) for row in (*rows, *record["held"]) if "stopped" in row]
    yield _table(
        ("pair", "n", "slots", "K", "mean steps", "times as fast", "steps saved", "share", "B1"),
        [
            (pair, str(one["n"]), str(one["num_slots"]), str(one["K"]), f"{one['mean_steps']:.1f}", f"{one['factor']:.2f}x",
             f"{one['bound']:.2f}x", f"{one['factor'] / one['bound']:.2f}", _times(one, "ratio_b1"))
            for pair, one in stopped
        ],
    )  # fmt: skip
    raced = [one["ratio_b1"] for _, one in stopped if "ratio_b1" in one]
    if raced:
        commits = dict.fromkeys(_short(one["commit"]) for _, one in stopped if "ratio_b1" in one)
        yield (
            f"Geometric mean of {len(raced)} pairs: {geometric_mean(raced):.2f}x B1 with the same threshold; commit "
            f'{", ".join(commits)}, while two or three other runs shared the two cores. "–": not measured.'
        )
    yield from _zoo_compiled(results)


def _times(row: Record, key: str) -> str:
    return f"{row[key]:.2f}x" if key in row else "–"


def _zoo_compiled(results: Path) -> Iterator[str]:
    record = _read(results / "zoo-compiled-cpu.json")
    found = [row for row in record["rows"] if "ratio_b2" in row]
    rows = [row for row in found if row["ratio_b2"] <= 1.2 * row["ratio_b1"]]
    yield (
        "Against B2, which is B1 with the step, or where that fails the forward pass, under `torch.compile`: how many times as "
        "fast ours is, and ours with `compile=True`. Compiling takes from half a minute to minutes for each number of slots, "
        "so it is a choice."
    )
    yield f"    {record['command']}    # pair by pair; commit {', '.join(dict.fromkeys(_short(row['commit']) for row in rows))}"
    yield _table(
        ("pair", "at", "n", "K", "B1", "B2", "compiled, B2", "what B2 compiles"),
        [(row["pair"], row["at"], str(row["n"]), str(row["K"]), f"{row['ratio_b1']:.2f}x", f"{row['ratio_b2']:.2f}x",
          f"{row['ratio_compiled_b2']:.2f}x", "forward" if "CompiledLoop" in row["missing"] else "step") for row in rows],
    )  # fmt: skip
    means = [geometric_mean([row[key] for row in rows]) for key in ("ratio_b2", "ratio_compiled_b2")]
    yield f"Geometric means: {means[0]:.2f}x B2, compiled {means[1]:.2f}x B2."
    slow = [f"{row['pair']} at {row['at']}" for row in found if row not in rows]
    if slow:
        yield f"Left out, for B2 is more than a fifth slower than B1 there: {', '.join(slow)}."
    for row in record["rows"]:
        if "CompiledForward" in row["missing"]:
            yield f"B2 does not compile: {row['pair']} at {row['at']}: {row['missing']['CompiledForward']}"


def _chains(results: Path) -> Iterator[str]:
    record = _read(results / "chains-cpu.json")
    rows, machine = record["rows"], record["machine"]
    yield "## Langevin dynamics against torchebm"
    yield (
        f"DDLS against `LangevinDynamics` of torchebm {record['torchebm']} on the same frozen networks (random weights), "
        "K steps on the latents and then the images, one thread, CPU time, median of rounds in turn. Both compute the same: "
        "with next to no noise the latents agree after 10 steps."
    )
    yield f"    {record['command']}"
    yield f"{machine['device']}, torch {machine['torch']}, commit {_short(machine['commit'])}."
    yield _table(
        ("pair", "chains", "slots", "K", "times as fast", "chain steps/s"),
        [(row["pair"], f"{row['chains']:,}", f"{row['num_slots']:,}", str(row["K"]), f"{row['ratio']:.2f}x",
          f"{row['chain_steps_per_second']:,.0f}") for row in rows],
    )  # fmt: skip


def _threads(results: Path) -> Iterator[str]:
    record = _read(results / "threads-cpu.json")
    machine = record["machine"]
    yield "## Two threads against one"
    yield (
        "The same samples at the first layer, with one thread of torch and with two, wall time, median of rounds in turn, on "
        "idle cores. Where an evaluation is small, one of the two threads is used."
    )
    yield f"    {record['command']}"
    yield f"{machine['device']}, torch {machine['torch']}, commit {_short(machine['commit'])}."
    yield _table(
        ("networks", "samples", "K", "times as fast", "threads used"),
        [(row["workload"], str(row["n"]), str(row["K"]), f"{row['ratio']:.2f}x", str(row["used"])) for row in record["rows"]],
    )


ZOO_REASONS = """Why rows are below B1, as profiles of single steps show it:

- Proposals, and images after the last evaluation, are made by the networks as they were given, not folded and not in the
  layout of the steps. Of a run of 10 steps that is up to a twentieth, and it is lost among 50.
- mlp2d at 3, 1,024 samples: .96 and .97 in further runs (73 ms by B1, 76 by ours, each in batches of 1,024).
- stylegan2 16x16 at the output, 8 samples: .98 to 1.19 in further runs, a step takes 2.1 to 2.3 ms.
- Beside its steps a call of `refine` costs 3 ms for a small MLP (modes of torch, sums over the weights by which updates are
  noticed, results), a loop nothing. It shows in rows of few steps.

What helped since the table before (min .75x, mean 1.06x of B1): what depends on weights alone is computed once, such as
StyleGAN2's weights times their gains (rosinality's, with 512 channels, 2.7x at the input) and BigGAN's division by spectral
norms; steps of recurrent networks that read lengths on the host are recorded; gradients of the slices of a sequence are joined
and not added; folding and channels_last are no longer refused where a ReLU's kink turns one gradient (sngan32, a quarter as
wide, at blocks.0: 1.00x before, 1.10x now). What was against us: the loops had run the module whose output is refined, and
they no longer do.

The rule on kinks is newer than most rows. The ladder decides the same with it for all pairs but sngan32 (rosinality's at the
inner place and the output was not looked at), so their rows were kept. Another run of all rows but these, while two or three
other processes shared the two cores, gave 1.08x B1 and 1.68x B0 in the mean, and 17 of 98 rows below .96; 12 of these are
above it in the table.

Why there is no 1.2x in the mean: most of these steps are convolutions and products, which both sides leave to the same
library. Those of dcgan64 and sngan32 run at nine tenths of the machine's peak on our side already (the table of speed), so at
most a tenth is left. What the engine saves is around them. A step of the embedded digits pair at act2 with 16, 64, 256 and
1,024 slots: 0.28, 0.51, 1.45, 5.28 ms; B1 0.43, 0.66, 1.62, 5.60 ms; B0 0.67, 1.01, 2.43, 8.23 ms (CPU time, least of 80). B0
also computes the gradients of the weights: half as many products again, which bounds the ratio of an MLP at 1.5, and what is
above comes from operations that are left out."""


def _zoo_row(row: Record) -> tuple[str, ...]:
    dropped = ", ".join(entry["rung"] for entry in row["ladder"] if not entry["kept"])
    memory = f"{row['peak_memory_mb']:.0f} MB" if row["peak_memory_mb"] is not None else "–"
    return (
        row["pair"], row["at"], str(row["n"]), str(row["K"]), str(row["num_slots"]),
        f"{row['ratio_b0']:.2f}x", f"{row['ratio_b1']:.2f}x",
        f"{row['images_per_second']:.0f}", f"{row['preparation_seconds']:.1f} s", memory, f"{row['off']:.0e}", dropped or "–",
    )  # fmt: skip


def _precision(results: Path) -> Iterator[str]:
    yield "## What a precision costs"
    yield (
        "The same proposals of the embedded GANs, refined in each precision of the networks. Means of three sampling seeds, "
        "the range over seeds in brackets. Other steps: the share of samples that took another number of steps than in "
        "float32."
    )
    yield "    python -m benchmarks.precision [--data MNIST_FOLDER]"
    for path in sorted(results.glob("precision-*.json")):
        record = _read(path)
        machine, rows = record["machine"], record["rows"]
        yield (
            f"**{record['data']}**, {rows[0]['samples']:,} samples a seed, {machine['cpu']}, torch {machine['torch']}, "
            f"commit {_short(machine['commit'])}"
        )
        yield _table(("discriminator", "precision", "FD", "CS", "mean steps", "other steps"), [
            (row["discriminator"], row["precision"], _with_range(row, "frechet_distance"), _with_range(row, "classifier_score"),
             f"{row['mean_steps']:.1f}", f"{100 * row['moved']:.0f} %" if row["precision"] != "float32" else "–")
            for row in rows
        ])  # fmt: skip
    yield (
        "On both GANs 16 bits cost nothing that exceeds the difference between two sampling seeds, though single samples "
        "differ. tf32 exists on GPUs only and is not measured."
    )


def _production(results: Path) -> Iterator[str]:
    record = _read(results / "production-cpu.json")
    ways, memory, writing = (dict(record[part]) for part in ("ways", "memory", "writing"))
    facts = {name: ways[name] for name in ("commit", "torch", "machine", "threads")}
    for part in (ways, memory, writing):
        for name in facts:
            part.pop(name)
    yield "## Production"
    yield (
        f"{facts['machine']} that other work shared, threads a process: {facts['threads']}, torch {facts['torch']}, commit "
        f"{_short(facts['commit'])}."
    )
    yield "    python -m benchmarks.production --output FILE.json"
    yield "50,000 digits by five ways of running; the sha256 is that of the merged npz:"
    yield _table(("way", "seconds", "sha256"), [
        (name, f"{way['seconds']:.0f}", f"{way['sha256'][:12]}…") for name, way in ways.items()
    ])  # fmt: skip
    yield "Peak memory in MB (images of 8x8):"
    commands = tuple(next(iter(memory.values())))
    yield _table(("images", *commands), [
        (f"{int(n):,}", *(f"{use[command]['peak_mb']:.0f}" for command in commands)) for n, use in memory.items()
    ])  # fmt: skip
    yield "A run with its files against the engine alone, median ratio of images/s, and images/s of the three rounds:"
    yield _table(("images and format", "ratio", "images/s"), [
        (name, f"{way['ratio']:.2f}", ", ".join(f"{rate:,.0f}" for rate in way["images_per_second"]))
        for name, way in writing.items()
    ])  # fmt: skip


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def _told(record: Record, command: str = "") -> str:
    """Command, commit and hardware of a record."""
    hardware = record["hardware"]
    machine = hardware if isinstance(hardware, str) else hardware.get("cpu", "")
    return f"Measured by `{command or record['command']}` at commit {_short(record['commit'])}, {machine}."


def _short(commit: str) -> str:
    """Seven digits, and "+" where the tree differed from the commit."""
    return commit[:7] + "+" * commit.endswith("+")


def _figures(distance: float, score: float) -> str:
    return f"{distance:.1f} / {score:.2f}"


def _judged(row: Record) -> str:
    return _figures(row["frechet_distance"], row["classifier_score"])


def _with_range(row: Record, key: str) -> str:
    return f"{row[key]:.2f} ({row[f'{key}_spread']:.2f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
