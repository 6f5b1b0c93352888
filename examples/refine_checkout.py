"""Refine with the networks of a checkout of your own, called as its family calls them.

    python examples/refine_checkout.py --family plain --checkout ~/my-gan \
        --generator models:Generator --discriminator models:Discriminator --latent 100 --weights g.pt d.pt

The checkout is put on the path, and "module:callable" in it, called with --arguments, makes each network. Nothing is copied.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

import fastrefine as fr

# family -> (generate, discriminate); None: G(z) or G(z, labels), D(x) or D(x, labels)
FAMILIES = {
    "plain": (None, None),
    "stylegan": (lambda G, z: G(z, None, noise_mode="const"), lambda D, x: D(x, None)),
    "stylegan-list": (lambda G, z: G([z], randomize_noise=False)[0], None),
    "shared-embedding": (lambda G, z, labels: G(z, G.shared(labels)), None),
    "dict-of-heads": (None, lambda D, x, labels: D(x, labels)["adv_output"]),
    "multi-period": (None, lambda D, x: [d(x)[0][:, None] for d in D.discriminators]),
    "recurrent": (lambda G, z: G(z, lengths(z)), lambda D, x: D(x, lengths(x)).mean(1)),
}


def lengths(x):
    """Every sequence at its full length."""
    return torch.full((len(x),), x.shape[1])


def network(code, arguments, weights):
    """The network that "module:callable" makes, with the weights of a file where one is given."""
    module, _, name = code.partition(":")
    made = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    if weights:
        made.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="plain", help="how the networks are called")
    parser.add_argument("--checkout", required=True, help="folder of the checkout")
    parser.add_argument("--generator", required=True, help='"module:callable"')
    parser.add_argument("--discriminator", required=True, help='"module:callable"')
    parser.add_argument("--arguments", nargs=2, default=["{}", "{}"], metavar="JSON", help="of generator and discriminator")
    parser.add_argument("--weights", nargs=2, default=[None, None], metavar="FILE", help="state dicts of the two")
    parser.add_argument("--latent", type=int, nargs="+", required=True, help="shape of one latent")
    parser.add_argument("--classes", type=int, default=0, help="of labels, taken in turn")
    parser.add_argument("--at", default="input", help='"input", "output" or the name of a module')
    parser.add_argument("--scale", default="logit", choices=["logit", "probability", "critic"], help="what D returns")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-size", type=float, default=0.1)
    parser.add_argument("--out", default="refined.pt", help="file of images and logits")
    given = parser.parse_args()

    if not Path(given.checkout).expanduser().is_dir():
        sys.exit(f"{given.checkout} is no folder; clone the repository there first, and give its path")
    sys.path.insert(0, str(Path(given.checkout).expanduser()))
    roles = zip((given.generator, given.discriminator), given.arguments, given.weights, strict=True)
    generator, discriminator = (network(*role) for role in roles)
    generate, discriminate = FAMILIES[given.family]
    refiner = fr.Refiner(
        generator, discriminator, fr.Collaborative(given.step_size), at=given.at, max_steps=given.steps,
        prior=fr.Normal(*given.latent), generate=generate, discriminate=discriminate, discriminator_output=given.scale,
    )  # fmt: skip
    labels = torch.arange(given.samples) % given.classes if given.classes else None
    before = refiner.replaced(max_steps=0).sample(given.samples, labels=labels)
    after = refiner.sample(given.samples, labels=labels)
    torch.save({"before": before.images, "after": after.images, "logits": after.logits}, given.out)
    print(f"mean logit {float(before.logits.mean()):.3g} -> {float(after.logits.mean()):.3g}, in {given.out}")
    print("route", after.report["route"], "rows", after.report["repeatable"])


if __name__ == "__main__":
    main()
