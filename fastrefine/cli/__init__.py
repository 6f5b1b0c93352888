"""The command line. Torch is imported when a command runs, so --help and usage errors answer at once.

Exit codes: 0 done, 1 failed, 2 usage, 3 incomplete but resumable, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from fastrefine import __version__
from fastrefine.cli import checkpoints, models, production, reports


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastrefine")
def cli() -> None:
    """Refine the samples of a trained GAN with its own discriminator."""


@click.command()
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"), show_default=True,
              help="Where comparison.png and metrics.json go.")  # fmt: skip
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A folder with MNIST's idx files (.gz): runs the demo on MNIST instead of the embedded digits.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=100), help="Samples in each row (default: 4000 digits, 10000 MNIST).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of sampling, shaping and the classifier, and of training under --retrain.")  # fmt: skip
@click.option("--retrain", is_flag=True, help="Train the GAN first instead of loading the embedded weights.")
@click.option("--all", "converged", is_flag=True, help="Also the converged generator, as it comes out.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json on stdout instead of the table.")
def demo(
    outdir: Path, data: Path | None, samples: int | None, seed: int, retrain: bool, converged: bool, as_json: bool
) -> None:
    """Refine a trained GAN and compare: a picture, a table of metrics and a measured speed-up, offline, on a CPU.

    Four rows with the same generator: its raw samples; refined with the discriminator as it is; with the discriminator
    shaped for refinement; the same, then Metropolis-Hastings selection.
    """
    from fastrefine.demo import run as demonstration

    demonstration.run(outdir, data=data, samples=samples, seed=seed, retrain=retrain, converged=converged, as_json=as_json)


@click.command()
def doctor() -> None:
    """Print versions, devices and the backends that are used here; include it in bug reports."""
    from fastrefine.cli.doctor import report

    for name, value in report().items():
        click.echo(f"{name:<18} {value}")


for command, line in (  # each with its line of --help
    (checkpoints.import_, "Make a pair of a checkpoint, or of a run's folder."),
    (models.layers, "List the places where the generator can be cut."),
    (models.check, "Is the discriminator good enough to refine with?"),
    (models.shape, "Train the discriminator for refinement."),
    (production.refine, "Refine images and write them as shards."),
    (production.verify, "Check every shard of a run."),
    (production.merge, "Join the shards of a run into one file or folder."),
    (models.evaluate, "Measure images against real ones."),
    (reports.report, "Write a page about a run."),
    (reports.grid, "Draw images of a run before and after."),
    (models.distil, "Make a generator that has refinement built in."),
    (models.bench, "Measure the speed of a pair of yours."),
    (checkpoints.push, "Put a pair on the Hugging Face Hub."),
    (demo, "Refine an embedded GAN: a picture and a table."),
    (doctor, "Print versions, devices and backends."),
):
    command.short_help = line
    cli.add_command(command)


def main() -> None:
    """Entry point of ``fastrefine``."""
    guarded(cli)


def guarded(command: click.Command) -> None:
    """Run a command and exit. Errors of fastrefine are one line on stderr and exit code 1; its warnings are one line too."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__name__ == "FastrefineWarning":
            click.echo(f"warning: {getattr(message, 'command', message)}", err=True)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show
    warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)  # of torch to itself, when an export is copied
    try:
        code = command.main(standalone_mode=False) or 0
    except click.UsageError as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except Exception as error:
        from fastrefine.errors import FastrefineError

        if not isinstance(error, FastrefineError | OSError | click.ClickException):
            raise
        click.echo(f"fastrefine: {getattr(error, 'command', error)}", err=True)
        code = 1
    sys.exit(code)
