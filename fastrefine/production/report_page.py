"""The page of a report: its sections, pictures and charts."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastrefine import __version__, pictures
from fastrefine.diagnosis.calibration import FIGURES
from fastrefine.diagnosis.reliability import reliability_plot
from fastrefine.errors import InputError
from fastrefine.production import evaluation
from fastrefine.production.configuration import Configuration
from fastrefine.production.report import Report
from fastrefine.production.run_folder import MANIFEST
from fastrefine.production.saved_pair import USUAL

SHOWN = 12  # images of a section
LARGEST = 192  # side of a picture in the page
GREY, BLUE, ORANGE = "#8a8f98", "#1f6fb4", "#d95f02"
STATUS = {
    "REACHED": "reached the score at which a sample is done",
    "EXHAUSTED": "used all allowed steps",
    "STALLED": "could not move: every gradient was exactly zero",
    "NONFINITE": "met a value that is not finite, and kept its last good state",
}
METRICS = {  # the beginning of a name: what it means
    "frechet": "distance between the feature statistics of generated and real images; lower is better",
    "kernel": "another distance between the two sets (the formula of KID); lower is better",
    "classifier_score": "how sure and how varied the classes are (the formula of the Inception score); higher is better",
    "inception_score": "how sure and how varied the classes are (the formula of the Inception score); higher is better",
    "precision": "share of generated images that look like some real one; higher is better",
    "recall": "share of real images that look like some generated one; higher is better",
    "f_score": "precision and recall in one number; higher is better",
}
MAIN = ("pair", "prior", "at", "sampler", "max_steps", "stop", "ids", "seed")
SETTINGS = {
    "pair": "the two networks", "generator": "the generator", "discriminator": "the discriminator",
    "at": "the layer whose output was refined",
    "sampler": "the rule by which a sample moves", "max_steps": "steps that a sample may take",
    "stop": "when a sample is done", "real": "real images that the stopping rule looked at",
    "prior": "where latents are drawn",
    "keep": "which state of a sample is kept", "best_of": "raw proposals of each sample, which starts from the best",
    "ids": "the samples", "seed": "of all random numbers",
    "classes": "labels of the images", "select": "how one of several proposals is chosen", "precision": "of the arithmetic",
    "coupling": "what is done where samples of a batch depend on each other", "group_size": "samples that go together",
    "on_noise": "what is done where a network draws random numbers",
    "num_slots": "samples advanced together", "format": "of the files", "shard_size": "images in a file",
    "sample_rate": "of wav files, in Hz",
    "image_range": "of the generator's images", "discriminator_output": "what the discriminator returns",
}  # fmt: skip


def write(report: Report, output: Path, command: Sequence[str] = ()) -> list[str]:
    """Write the page to ``output``; returns the parts that are missing, each with its reason.

    command: the words that make this page again. Raises InputError without jinja2 and matplotlib (the extra "report").
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"a report needs {error.name}: pip install 'fastrefine[report]'") from None
    page = _Page(report)
    context = page.context(command)
    template = (files("fastrefine") / "production" / "report.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "share": _share}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(environment.from_string(template).render(context), encoding="utf-8")
    return [f"{part}: {why}" for part, why in page.missing.items()]


class _Page:
    """The values of the template."""

    def __init__(self, report: Report):
        self.report, self.pairs = report, report.pairs
        self.missing: dict[str, str] = {}

    def part(self, name: str, make: Any) -> Any:
        """A part of the page, or None, with its reason kept, where it cannot be made."""
        try:
            return make()
        except InputError as error:
            self.missing[name] = str(error)
            return None

    def context(self, command: Sequence[str]) -> dict[str, Any]:
        report, pairs = self.report, self.pairs
        numbers = report.numbers()
        metrics = self.part("quality", self.metrics)
        distance = next((row for row in metrics or [] if row["name"].startswith("frechet")), None)
        steps, logits = pairs.every["steps"], pairs.every["logits"]
        real = self.part("scores of real images", lambda: report.real_logits)
        before = self.part("scores before", lambda: pairs.logits_before)
        shown = {"before": (before, GREY), "after": (logits, BLUE), "real": (None if real is None else real.numpy(), ORANGE)}
        return {
            "name": pairs.folder.path.name, "version": __version__, "numbers": numbers, "shown": SHOWN,
            "findings": [_words(finding) for finding in report.findings],
            "critic": pairs.folder.configuration.discriminator_output == "critic", "baseline_steps": pairs.baseline_steps,
            "unpaired": pairs.unpaired,
            "first": self.part("images before", lambda: self.cards(range(min(SHOWN, len(pairs.ids))))) or self.cards_after(),
            "largest": self.part("largest changes", self.largest),
            "nearest": self.part("nearest real images", self.nearest), "features": metrics and report.features.name,
            "scores": _histogram(shown, "score (logit)"), "steps": _bars(steps, self.pairs.folder.configuration.max_steps or 0),
            "status": [(name, count, count / numbers["images"], STATUS[name]) for name, count in numbers["status"].items()],
            "unrefined": pairs.folder.configuration.max_steps == 0,
            "metrics": metrics, "distance": distance,
            "verdict": metrics and _verdict(metrics, report.metrics.change),
            "notes": metrics and evaluation.learned_on_them(report.features, report.real or ""),
            "num_real": metrics and len(report.truth[0]), "held_out": report.held_out, "num_training": report.num_training,
            "reliability": self.part("reliability", lambda: report.reliability), "figures": FIGURES,
            "reliability_figure": self.part(
                "reliability", lambda: _svg(reliability_plot(report.reliability[0]), "Reliability")
            ),
            "speed": {name: report.summary.get(name) for name in ("seconds", "images_per_second")},
            "settings": self.settings(), "missing": self.missing,
            "repeat": shlex.join(["fastrefine", "refine", "--config", str(pairs.folder.path / MANIFEST), "--outdir", "again"]),
            "command": shlex.join(command),
        }  # fmt: skip

    def cards(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Images before and after, and their difference where they are one sample."""
        pairs = self.pairs
        before, after = pairs.before, pairs.after
        logits = self.part("scores before", lambda: pairs.logits_before)
        found = []
        for row in rows:
            images = [before.pixels[row], after.pixels[row]]
            shown = [("before", images[0]), ("after", images[1])]
            if not pairs.unpaired:
                shown.append(("difference", pictures.difference(*(image[None] for image in images))[0]))
            card = self._card(row, shown)
            if logits is not None:
                card["logits"] = f"from {_rounded(logits[row])} to {_rounded(after.columns['logits'][row])}"
            if not pairs.unpaired:
                card["change"] = float(self.report.change[row])
            found.append(card)
        return found

    def cards_after(self) -> list[dict[str, Any]]:
        """The first images without those before."""
        after = self.pairs.after
        return [self._card(row, [("after", after.pixels[row])]) for row in range(min(SHOWN, len(after.pixels)))]

    def _card(self, row: int, images: list[tuple[str, np.ndarray]]) -> dict[str, Any]:
        columns = self.pairs.after.columns
        return {
            "id": int(self.pairs.ids[row]), "images": [(name, _uri(image)) for name, image in images],
            "steps": int(columns["steps"][row]), "logits": _rounded(columns["logits"][row]), "change": None,
        }  # fmt: skip

    def largest(self) -> list[dict[str, Any]]:
        """Cards of the samples whose images changed most."""
        return self.cards(np.argsort(-self.report.change, kind="stable")[:SHOWN].tolist())

    def nearest(self) -> list[dict[str, Any]]:
        rows, distances = self.report.neighbours
        real = pictures.levels(self.report.truth[0])
        return [
            {
                "id": int(self.pairs.ids[i]), "image": _uri(self.pairs.after.pixels[i]),
                "neighbours": [(_uri(real[row]), float(d)) for row, d in zip(rows[i], distances[i], strict=True)],
            }
            for i in range(len(rows))
        ]  # fmt: skip

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of the table of quality."""
        before, after, training, _ = self.report.metrics
        others, ideal = (list(side.values()) if side is not None else [None] * len(after) for side in (before, training))
        return [
            {"name": name, "words": next((text for start, text in METRICS.items() if name.startswith(start)), ""),
             "before": other, "after": figure, "training": best,
             "real": evaluation.real_compared(name, len(self.report.truth[0]))}
            for (name, figure), other, best in zip(after.items(), others, ideal, strict=True)
        ]  # fmt: skip

    def settings(self) -> list[tuple[str, str, str]]:
        """(name, value, meaning) of the main settings, and of others that were not left as they are."""
        usual = Configuration(pair="digits").to_json()
        given = self.pairs.manifest["configuration"].items()
        kept = [(name, x) for name, x in given if name in MAIN or x not in (usual.get(name), USUAL.get(name))]
        return [(name, _plain(x), SETTINGS.get(name, "")) for name, x in kept]


def _verdict(metrics: Sequence[Mapping[str, Any]], change: evaluation.Figure | None = None) -> str:
    """What the Frechet distance before and after says, and which of precision and recall fell.

    change: of the distance, where the images before and after are of the same samples.
    """
    rows = {row["name"].partition("[")[0]: row for row in metrics if row["before"] is not None}
    distance = next((row for name, row in rows.items() if name.startswith("frechet")), None)
    if distance is None:
        return ""
    was, now = distance["before"][0], distance["after"][0]
    words = [f"The Fréchet distance {'fell' if now < was else 'rose'} {_from_to(distance)}."]
    if now == was:
        words = [f"The Fréchet distance is {_number(now)} before and after."]
    if change is None:
        better, chance = now < was, _overlap(distance)
        why = "The intervals overlap, so this may be chance."
    else:
        better, chance = change.value < 0, change.low <= 0 <= change.high
        why = "So this may be chance."
        words.append(
            "Over the same samples, corrected for their small number, the change is "
            f"{_number(change.value)} ({_number(change.low)} to {_number(change.high)})."
        )
    if chance:
        words.append(why)
    elif better:
        words.append("As a set, the images became more like the real ones.")
    else:
        words.append("As a set, the images became less like the real ones, whatever the discriminator says of them.")
    for name, means in (("precision", "images look like a real one"), ("recall", "real images have one like them")):
        if name in rows and rows[name]["after"][0] < rows[name]["before"][0]:
            fell = f"{name.capitalize()} fell {_from_to(rows[name])}"
            words.append(f"{fell}, which may be chance." if _overlap(rows[name]) else f"{fell}: fewer {means} than before.")
    return " ".join(words)


def _overlap(row: Mapping[str, Any]) -> bool:
    (_, low, high), (_, least, most) = row["before"], row["after"]
    return None not in (low, high, least, most) and max(low, least) <= min(high, most)


def _from_to(row: Mapping[str, Any]) -> str:
    return f"from {_number(row['before'][0])} to {_number(row['after'][0])}"


def _words(finding: Any) -> str:
    """A finding of the manifest: a text, or an object with the text and what to do."""
    if not isinstance(finding, Mapping):
        return str(finding)
    text = finding.get("words") or finding.get("text") or finding.get("code", "")
    return f"{text}. What to do: {finding['advice']}" if finding.get("advice") else str(text)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(of)}" for name, of in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _rounded(value: float) -> str:
    return f"{round(float(value), 2) + 0.0:.2f}"


def _number(value: float | None) -> str:
    """A count, or about three digits."""
    if value is None or not math.isfinite(value):
        return "unknown" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _uri(pixels: np.ndarray) -> str:
    """An image (H, W, 1, 3 or 4) uint8 as a PNG in a data URI; large ones are made smaller."""
    side = max(pixels.shape[:2])
    if side > LARGEST:
        size = [max(length * LARGEST // side, 1) for length in (pixels.shape[1], pixels.shape[0])]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        pixels = np.atleast_3d(np.asarray(image.resize((size[0], size[1]), Image.Resampling.LANCZOS)))
    return "data:image/png;base64," + base64.b64encode(pictures.png(pixels)).decode()


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(5.2, 3.2), layout="tight")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _histogram(sets: Mapping[str, tuple[np.ndarray | None, str]], label: str) -> str:
    """Shares of the values of each set that is known."""
    known = {name: (values[np.isfinite(values)], colour) for name, (values, colour) in sets.items() if values is not None}
    every = np.concatenate([values for values, _ in known.values()])
    figure, axes = _figure()
    if len(every):
        edges = np.histogram_bin_edges(every, 40)
        for name, (values, colour) in known.items():
            shares = np.histogram(values, edges)[0] / max(len(values), 1)
            look: dict[str, Any] = dict(fill=True, alpha=0.45) if name == "after" else dict(linewidth=1.8)
            axes.stairs(shares, edges, color=colour, label=name, **look)
        axes.legend(frameon=False)
    axes.set(xlabel=label, ylabel="share of images", ylim=(0, None))
    return _svg(figure, f"Histogram of the {label}: {', '.join(known)}")


def _bars(steps: np.ndarray, most: int) -> str:
    """Numbers of images by their steps."""
    figure, axes = _figure()
    width = max(-(-(most + 1) // 40), 1)
    edges = np.arange(0, most + width + 1, width) - 0.5
    axes.stairs(np.histogram(steps, edges)[0], edges, color=BLUE, fill=True, alpha=0.6)
    axes.set(xlabel="steps of an image", ylabel="images", ylim=(0, None))
    return _svg(figure, "Histogram of the steps")


def _svg(figure: Any, name: str) -> str:
    """A figure as SVG for an HTML page, with its text as text and the same bytes each time."""
    from markupsafe import Markup
    from matplotlib import rc_context

    content, unnamed = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", bbox_inches="tight", metadata=unnamed)
    text = content.getvalue()
    return Markup(text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1))
