"""Commands that show a run: grid, report. Torch is imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fastrefine.cli.production import RUN, options

COMPARED = 5000  # images of a run that a report compares, unless --limit says otherwise
OF_A_RUN = [
    click.argument("run", metavar="RUN", type=RUN),
    click.option("--baseline", metavar="RAW", type=RUN, help="The same ids with --max-steps 0: the images before. Default: "
                 "they are rendered again with the networks of RUN."),
    click.option("--device", help="cpu, cuda, cuda:1 (default: cpu)."),
    click.option("--allow-pickle", is_flag=True, help="Unpickle checkpoints of RUN; this runs any code in them."),
    click.option("--trust-code", is_flag=True, help="Run whatever code RUN's manifest names, not only classes of networks."),
]  # fmt: skip


@click.command()
@options(OF_A_RUN)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("grid.png"), show_default=True)
@click.option("--count", type=click.IntRange(min=1), default=16, show_default=True, help="The first images of RUN.")
@click.option("--rows", default="initial,refined,difference", show_default=True, help="Comma-separated.")
def grid(
    run: Path, baseline: Path | None, device: str | None, allow_pickle: bool, trust_code: bool, output: Path, count: int,
    rows: str,
) -> None:  # fmt: skip
    """Draw the first images of RUN before and after refinement, and what changed.

    \b
    fastrefine grid run --output grid.png
    fastrefine grid run --baseline raw --count 32 --output grid.png
    """
    from fastrefine.production import report
    from fastrefine.production.before_after import BeforeAfter

    pairs = BeforeAfter(run, baseline, count, device=device, allow_pickle=allow_pickle, trust_code=trust_code)
    report.draw(pairs, output, rows.split(","))
    click.echo(f"wrote {output}: the first {len(pairs.ids)} images of {run}")


@click.command()
@options(OF_A_RUN)
@click.option("--real", help="Real images, held out: a folder, .npz, .safetensors, or digits. For quality, neighbours, "
              "reliability.")  # fmt: skip
@click.option("--features", metavar="CODE", help="Network of the features, as for `evaluate`.")
@click.option("--train", help="Labelled real images for the default features (default: the training images of --real).")
@click.option("--limit", type=click.IntRange(min=2), default=COMPARED, show_default=True, help="How many images of RUN are "
              "compared, the first ones.")  # fmt: skip
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"), show_default=True)
def report(
    run: Path, baseline: Path | None, device: str | None, allow_pickle: bool, trust_code: bool, real: str | None,
    features: str | None, train: str | None, limit: int, output: Path,
) -> None:  # fmt: skip
    """Write a page about RUN: pictures, scores, quality, settings. One HTML file, which needs no network.

    \b
    fastrefine report run --real held-out/ --output report.html
    fastrefine report run --baseline raw --real digits --output report.html
    """
    from fastrefine.production.before_after import BeforeAfter
    from fastrefine.production.report import Report
    from fastrefine.production.report_page import write

    pairs = BeforeAfter(run, baseline, limit, device=device, allow_pickle=allow_pickle, trust_code=trust_code)
    missing = write(Report(pairs, real, features=features, train=train), output, ["fastrefine", *sys.argv[1:]])
    click.echo(f"wrote {output}: {len(pairs.every['ids'])} images")
    for line in missing:
        click.echo(f"warning: the page is without {line}", err=True)
