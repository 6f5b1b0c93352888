"""``python -m benchmarks.papers list | run NAME --outdir DIR | report DIR``: the papers' experiments, one command each."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.papers.catalogue import EXPERIMENTS
from fastrefine.cli import guarded


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """The published experiments of this family of samplers, and ours, each as one command."""


@cli.command("list")
def list_() -> None:
    """The experiments: name, what it reproduces, seeds and minutes of a full run on one core."""
    for e in EXPERIMENTS.values():
        data = f"  --data {e.data}" if e.data else ""
        click.echo(f"{e.name:<15}{e.title} ({e.source}); {len(e.seeds)} seed{'s' * (len(e.seeds) > 1)}, {e.minutes} min{data}")


@cli.command()
@click.argument("name", type=click.Choice(list(EXPERIMENTS)), metavar="NAME")
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="DIR/NAME gets result.json and pictures; a cut run is taken up again there.")  # fmt: skip
@click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True,
              help="Of training and sampling; may be given several times (default: the experiment's own).")  # fmt: skip
@click.option("--quick", is_flag=True, help="Seconds instead of hours: tiny, checks only the direction of the claims.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Real images, where the experiment takes them.")
def run(name: str, outdir: Path, seeds: tuple[int, ...], quick: bool, data: Path | None) -> None:
    """Run experiment NAME into DIR/NAME; prints what it claims and whether it holds."""
    for claim in EXPERIMENTS[name].run(outdir, seeds=seeds, quick=quick, data=data)["claims"]:
        click.echo(f"{'holds' if claim['holds'] else 'FAILS'}: {claim['claim']}")
    click.echo(f"wrote {outdir / name / 'result.json'}", err=True)


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--summary", is_flag=True, help="Print two tables instead: a few figures of each experiment, and its claims.")
def report(directory: Path, summary: bool) -> None:
    """One page of all results under DIR: report.md, published figures beside ours."""
    from benchmarks.papers import report as reporting

    click.echo(reporting.summary(directory) if summary else f"wrote {reporting.write(directory)}")


if __name__ == "__main__":
    guarded(cli)
