"""What ``Refiner.check`` found before a run: scores under D, what the networks are like, a verdict, and what to do next."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrefine.diagnosis.calibration import FIGURES, Diagnosis, diagnosis_of
from fastrefine.diagnosis.findings import SHAPE, SHAPE_FIRST, Finding, of_shaped
from fastrefine.diagnosis.tally import ended
from fastrefine.result import Result, Status

WHY = 90  # characters of the reason why a faster form is not used; --json has all of it
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ABOVE, BLIND = 0.45, 0.55  # of the separation: below the first D prefers generated images, up to the other it is blind
HEART = 0.6  # of the pairs of a training and a held-out real image, in which D scores the training one higher
FAR = 0.95  # of the pairs of a real and a refined image: with more, refinement does not come near the real scores
GOOD = (
    "nothing speaks against it: D scores real images above generated ones, and may be used as it is. Shaping it first usually "
    "gives more, for D has never seen refined images. Whether those are better, only an evaluation shows"
)
GOOD_SHAPED = (
    "nothing speaks against it: D was shaped, it scores real images above raw ones, and refined images come up to them. "
    "Whether refined images are better, only an evaluation shows"
)
COMPARE = (
    "refine, and compare with max_steps=0 by features that D was not trained on",
    "refine, and compare with the same samples unrefined: `fastrefine refine`, then `fastrefine refine --max-steps 0`, then "
    "`fastrefine evaluate`",
)
REFINE = tuple(f"{shape}, which usually gives more; or, with D as it is, {compare}" for shape, compare in (
    (SHAPE[0], COMPARE[0]), (f"{SHAPE_FIRST} with `fastrefine shape`", COMPARE[1]),
))  # fmt: skip
UNKNOWN = Finding(
    "no_real", "D cannot be judged without real images", "pass real= to the Refiner and check again", "give --real as well"
)


@dataclass(frozen=True)
class Scores:
    """Finite logits of one kind of images. count: how many. quantiles: at QUANTILES. reached: share at the stop threshold, or
    None without one."""

    count: int
    quantiles: tuple[float, ...]
    reached: float | None


@dataclass(frozen=True)
class Check:
    """Whether D may be used here to refine G. ``str`` shows a table, which ends in a verdict and in what to do next.

    setting: place, sampler, steps and stop rule in words. scores: by "real", "raw" and "refined". thresholds: lowest, median
    and highest stop threshold, or None. separation: share of pairs, 0 ... 1, in which a real image scores above a raw one
    (AUC), or None without real images. calibration: of D on real against raw images, None for a critic. run:
    ``tally.summary`` of the refined samples. networks: {name: words} about coupling, noise and statistics. ranges: (low,
    high) of "real" and "generated" images.
    ladder: as in ``Result.report``. findings: what speaks against a run, the weightiest first; empty where nothing does.
    notes: what was remarked while the networks were prepared. shaped: whether D was said to be shaped.

    Example: ``check = refiner.check(); print(check.verdict, check.findings)``
    """

    setting: str
    findings: tuple[Finding, ...]
    scores: dict[str, Scores] = field(default_factory=dict)
    thresholds: tuple[float, float, float] | None = None
    separation: float | None = None
    calibration: Diagnosis | None = None
    run: dict[str, Any] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    ladder: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    shaped: bool = False

    @property
    def usable(self) -> bool:
        """Whether real images were there to judge by, and nothing was found."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """The weightiest finding, or that there is none."""
        return self.findings[0].text if self.findings else GOOD_SHAPED if self.shaped else GOOD

    def next(self, commands: Mapping[str, str] | None = None) -> str:
        """What to do now; commands: for users of the command line, short commands such as "fastrefine shape" -> the whole."""
        python, text = COMPARE if self.shaped else REFINE
        if self.findings:
            python, text = self.findings[0].python, self.findings[0].command
        if commands is None:
            return python
        for short, whole in commands.items():
            text = text.replace(f"`{short}`", f"`{whole}`")
        return text

    def __str__(self) -> str:
        return self.table()

    def table(self, commands: Mapping[str, str] | None = None) -> str:
        """The table; commands: in the words of the command line, see ``next``."""
        lines = [f"check of {self.setting}"]
        if self.scores:
            heads = "".join(f"{f'{q:.0%}':>10}" for q in QUANTILES)
            lines += ["", f"{'logit under D':<16}{'images':>8}{heads}{'at threshold':>15}"]
        for name, one in self.scores.items():
            reached = "-" if one.reached is None else f"{one.reached:.0%}"
            lines.append(f"{name:<16}{one.count:>8}{''.join(f'{q:>10.3g}' for q in one.quantiles)}{reached:>15}")
        rows = self.judgements()
        rows |= self.networks
        if self.ranges:
            rows["range"] = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in self.ranges.items())
        if self.ladder:
            whys = [textwrap.shorten(e["why"], WHY, placeholder=" ...") for e in self.ladder]
            tried = [e["rung"] + f" not ({why})" * (not e["kept"]) for e, why in zip(self.ladder, whys, strict=True)]
            rows["faster forms"] = ", ".join(dict.fromkeys(tried))
        lines += ["", *(f"{name:<16}{words}" for name, words in rows.items())] if rows else []
        lines += ["", *(f"{name:<16}{words}" for name, words in self.words().items())] if self.calibration else []
        others = [*(finding.text for finding in self.findings[1:]), *self.notes]
        lines += ["", *(f"also            {text}" for text in others)] * bool(others) + [""]
        verdict = textwrap.wrap(self.verdict, 110, initial_indent=f"{'verdict':<16}", subsequent_indent=" " * 16)
        told = self.next(commands).replace(" `fastrefine ", "\n" + " " * 16 + "`fastrefine ")  # a line for each whole command
        told = told.replace("`, which usually", "`,\n" + " " * 16 + "which usually")
        return "\n".join([*lines, *verdict, f"next            {told}"])

    def judgements(self) -> dict[str, str]:
        """In words, by name: stop threshold, separation, calibration and refinement, as far as they are known."""
        rows: dict[str, str] = {}
        if self.thresholds is not None:
            low, middle, high = self.thresholds
            rows["stop threshold"] = f"{middle:.3g}" if low == high else f"{low:.3g} to {high:.3g}, median {middle:.3g}"
        if self.separation is not None:
            rows["separation"] = f"a real image scores above a raw one in {self.separation:.0%} of pairs (50%: by chance)"
        if (d := self.calibration) is not None:
            text = ", ".join(f"{name} {value:.{1 if name == 'z' else 3}f}" for name, value in d.figures.items())
            may = "D may be selected by" if d.trusted else "to select by D, calibrate it first; to refine, no need"
            rows["calibration"] = f"{text}, on raw images: {may}"
        if self.run:
            before, after = (self.run[name] for name in ("logit_before", "logit_after"))
            change = "" if before is None else f", mean logit {before:.3g} before, {after:.3g} after"
            rows["refinement"] = f"{self.run['mean_steps']:.1f} steps on average{change}; {ended(self.run)}"
        return rows

    def words(self) -> dict[str, str]:
        """What the words of the table mean: an explanation for each row that needs one."""
        found = {}
        if self.calibration is not None:
            found["logit"] = "D's score of an image. Compare it with the scores of real images, not with 0"
            found |= FIGURES
        return found

    def entry(self, commands: Mapping[str, str]) -> dict[str, Any]:
        """As JSON values, in the words of the command line."""
        d = self.calibration
        return {
            "setting": self.setting, "usable": self.usable, "verdict": self.verdict, "next": self.next(commands),
            "findings": [finding.entry(command=True) for finding in self.findings],
            "scores": {name: vars(one) for name, one in self.scores.items()}, "quantiles": QUANTILES,
            "thresholds": self.thresholds, "separation": self.separation,
            "calibration": d and {**d.figures, "trusted": d.trusted}, "run": self.run,
            "notes": self.notes, "networks": self.networks, "ranges": self.ranges, "ladder": self.ladder,
        }  # fmt: skip


def checked(
    setting: str, raw: Result, refined: Result, thresholds: Tensor | None, real: Tensor | None, networks: dict[str, str],
    doubts: Sequence[str], notes: Sequence[str], found: Sequence[Finding], run: dict[str, Any], shaped: bool,
) -> Check:  # fmt: skip
    """The check from results of no step and of a run, thresholds (n,), and real images (N, ...).

    doubts: of the networks' statistics. found, run: findings and summary of the refined samples. shaped: whether D was.
    """
    of = {"raw": raw.logits, "refined": refined.logits}
    separation = None
    if raw.real_logits is not None:
        of = {"real": raw.real_logits, **of}
        separation = separation_of(raw.real_logits, raw.logits)
    bounds = None
    if thresholds is not None:
        ordered = thresholds.double().sort().values
        bounds = float(ordered[0]), float(ordered.median()), float(ordered[-1])
    scores = {name: _scores(logits, None if bounds is None else bounds[1]) for name, logits in of.items()}
    ranges = {"real": real} if real is not None else {}
    mend = ("mend that first, then check again",) * 2
    findings = [*(Finding("statistics", text, *mend) for text in doubts), *_of_separation(separation), *found]
    if shaped:
        findings = [of_shaped(one) for one in findings if one.code != "exhausted"]
    if shaped or (not findings and bounds is not None and bool(refined.steps.any())):
        far = _of_reach(refined, bounds is not None, shaped)
        findings = [*(one for one in findings if not far or one.code != "hardly_moved"), *far]
    return Check(
        setting, tuple(findings or ([UNKNOWN] if separation is None else [])), scores, bounds, separation,
        diagnosis_of(raw) if raw.scale == "logit" else None, run, networks,
        {name: (float(x.min()), float(x.max())) for name, x in (ranges | {"generated": raw.images}).items()},
        tuple(refined.report["ladder"]), tuple(notes), shaped,
    )  # fmt: skip


def of_memory(training: Tensor, held_out: Tensor) -> list[Finding]:
    """Whether D knows the images by heart that it was shaped on; logits (N,) of them, and (M,) of other real images."""
    share = separation_of(training, held_out)
    if share is None or share < HEART:
        return []
    text = f"D knows its training images by heart: one of them scores above a held-out real image in {share:.0%} of pairs"
    return [Finding("by_heart", text, *("shape for fewer iterations, or on more real images",) * 2)]


def _of_reach(refined: Result, threshold: bool, shaped: bool) -> list[Finding]:
    """Whether the steps come up to the scores of real images; threshold: whether there is a logit at which samples stop."""
    n, reached = len(refined), int((refined.status == Status.REACHED).sum())
    if threshold:
        far, text = reached < n / 2, f"only {reached} of {n} refined images reached the stop threshold"
    elif refined.real_logits is None:
        return []
    else:
        share = separation_of(refined.real_logits, refined.logits)
        far, text = share is not None and share > FAR, f"a real image still scores above a refined one in {share:.0%} of pairs"
    if not far:
        return []
    fewer = "; or, if D was shaped for long, shape the D that it was made of for fewer iterations"
    first = ("", "") if shaped else tuple(f"{words}; or " for words in SHAPE)
    return [Finding(
        "out_of_reach", f"{text}: the steps do not come up to the scores that D gives real images",
        first[0] + "pass more max_steps, or a larger step_size" + fewer * shaped,
        first[1] + "give more --max-steps, or a larger --step-size" + fewer * shaped,
    )]  # fmt: skip


def separation_of(real: Tensor, raw: Tensor) -> float | None:
    """Share of pairs in which a real image's logit is above a raw one's, ties half; None where no raw one is finite."""
    x, y = real.double().cpu(), raw.double().cpu()
    y = y[torch.isfinite(y)].sort().values
    if not len(y):
        return None
    below = torch.searchsorted(y, x) + torch.searchsorted(y, x, right=True)
    return float(below.double().mean()) / (2 * len(y))


def _of_separation(share: float | None) -> list[Finding]:
    if share is None or share >= BLIND:
        return []
    pairs = f"a real image scores above a raw one in {share:.0%} of pairs"
    if share < ABOVE:
        return [Finding("inverted", f"D scores generated images above real ones ({pairs})", *SHAPE)]
    return [Finding("blind", f"D does not tell generated images from real ones ({pairs})", *SHAPE)]


def _scores(logits: Tensor, threshold: float | None) -> Scores:
    d = logits.double().cpu()
    d = d[torch.isfinite(d)]
    at = torch.quantile(d[:100_000], torch.tensor(QUANTILES, dtype=torch.float64)).tolist() if len(d) else [float("nan")] * 5
    return Scores(len(d), tuple(at), None if threshold is None or not len(d) else float((d >= threshold).double().mean()))
