"""The commands that make a saved pair of somebody's checkpoint, and share one. Torch is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastrefine.cli.production import FOLDER, JUDGEMENT, ORIGIN, options
from fastrefine.errors import InputError

ANY = click.Path(exists=True, path_type=Path)


@click.command("import")
@click.argument("source", metavar="FILE_OR_FOLDER", type=ANY)
@click.option("--outdir", type=FOLDER, required=True, help="New or empty: the pair goes there.")
@click.option("--code", type=click.Path(exists=True, file_okay=False), help="The checkout that the classes come from; it is "
              "imported. The pair keeps its path.")  # fmt: skip
@click.option("--allow-pickle", is_flag=True, help="Unpickle FILE in a process of its own; this runs any code in it.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="Of StudioGAN: the .yaml of the run.")
@options(ORIGIN, JUDGEMENT)
@click.option("--image-range", type=(float, float), help="Lowest and highest value of the generator's images (default: "
              "-1 1).")  # fmt: skip
@click.option("--num-classes", type=click.IntRange(min=1), help="How many classes the labels have.")
@click.option("--no-check", is_flag=True, help="Write the pair without trying it.")
def import_(source: Path, outdir: Path, no_check: bool, **flags: Any) -> None:
    """Make a pair of a checkpoint, for --pair: a file with both networks, or a run's folder.

    Knows pickles of stylegan2-ada and stylegan3 (--code, --allow-pickle), runs of BigGAN-PyTorch (--code) and StudioGAN
    (--code, --config), and state dicts of your own classes. What was found is printed; flags win over it.

    \b
    fastrefine import network-snapshot.pkl --code stylegan3/ --allow-pickle --outdir pair
    fastrefine import weights/my_run --code BigGAN-PyTorch/ --outdir pair
    PYTHONPATH=. fastrefine import checkpoint.pt --generator mygan:Generator --discriminator mygan:Discriminator \\
        --generator-args '{"width": 64}' --prior '{"name": "normal", "shape": [128]}' --outdir pair
    """
    from fastrefine.production.checkpoints import import_pair

    both: dict[str, Any] = {}
    for name, end, empty in (("arguments", "_args", None), ("weights", "_weights", ""), ("keys", "_key", "")):
        both[name] = tuple(flags.pop(f"{role}{end}") or empty for role in ("generator", "discriminator"))
    if (flags.get("output_key") or "").isdecimal():
        flags["output_key"] = int(flags["output_key"])
    given = {name: value for name, value in flags.items() if value is not None}
    import_pair(source, outdir, check=not no_check, tell=lambda line: click.echo(line, err=True), **both, **given)
    use = f"--pair {outdir}{' --trust-code' * ('code' in given or _needs_trust(outdir))}"
    click.echo(
        f"wrote {outdir}. To go on: fastrefine check {use} --real IMAGES; other places for --at: fastrefine layers {use}"
    )


@click.command()
@click.argument("pair", metavar="PAIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("name", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(pair: Path, name: str, private: bool) -> None:
    """Put the saved pair PAIR into the repository USER/NAME of the Hugging Face Hub, with a model card.

    The repository is made if it is not there. Only config.json, the weights and README.md are written; a README.md in PAIR is
    the model card. Log in first: `hf auth login`, or the variable HF_TOKEN.

    \b
    fastrefine push shaped me/my-gan
    fastrefine refine --pair me/my-gan --max-steps 0 --ids 0-99 --outdir raw
    """
    from fastrefine.production.hub import push_pair

    address = push_pair(pair, name, private=private)
    click.echo(f"wrote {address}. To use it anywhere: fastrefine refine --pair {name} ...")


def _needs_trust(folder: Path) -> bool:
    """Whether a pair names code that a file may not name, such as a function that makes networks."""
    from fastrefine.production.saved_pair import load_pair

    try:
        load_pair(folder)
    except InputError:
        return True
    return False
