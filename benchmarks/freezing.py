"""What coupling="freeze" does to the logits: discriminators trained with a minibatch standard deviation, on digits.

python -m benchmarks.freezing            # about four minutes on one core; the table of docs/networks.md
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastrefine as fr
from fastrefine.datasets import load_digits
from fastrefine.demo.gan import Trainer, Training, build, images_of, normal
from fastrefine.metrics import frechet_distance
from fastrefine.models.digits import DIGITS_LATENT_DIM, digits_generator

SEEDS, ITERATIONS, SAMPLES = (0, 1, 2), 4000, 2000


class MinibatchDeviation(nn.Module):
    """(N, F) -> (N, F + 1): the standard deviation in groups of ``group``, its mean over the features [Karras et al. 2018]."""

    def __init__(self, group: int):
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        size = min(self.group, len(x))
        groups = x.view(size, -1, x.shape[1])
        deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean(1, keepdim=True)
        return torch.cat([x, deviation.repeat(size, 1)], 1)


def discriminator(group: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2),
        MinibatchDeviation(group), nn.Linear(257, 1),
    )  # fmt: skip


def measure(group: int, seed: int) -> dict[str, float]:
    """One trained pair: the change of its logits by holding, and Frechet distances on pixels of what refinement gives."""
    real = load_digits().train
    g, d = build(digits_generator, seed), build(lambda: discriminator(group), seed)
    training = Training(64, "adam", (2e-4, 2e-4))
    for _ in Trainer(g, d, images_of(real), normal(DIGITS_LATENT_DIM), training, seed).advance(ITERATIONS):
        pass
    options = {"prior": fr.Normal(DIGITS_LATENT_DIM), "at": "output", "max_steps": 20, "group_size": group, "real": real}
    sampler = fr.Collaborative(step_size=0.1, control="fixed")
    lockstep, frozen = (fr.Refiner(g, d, sampler, coupling=c, **options) for c in ("lockstep", "freeze"))
    raw = lockstep.replaced(max_steps=0).sample(SAMPLES)
    together, alone = lockstep.sample(SAMPLES), frozen.sample(SAMPLES)
    # where the statistic of generated images differs from that of real ones, holding it shifts the logits
    images = torch.as_tensor(raw.images)
    before, after = lockstep.score(images).double(), frozen.score(images).double()
    told = alone.report["coupling"]
    flat = [torch.as_tensor(x).flatten(1).double() for x in (raw.images, together.images, alone.images)]
    distances = [frechet_distance(x, real.flatten(1).double()) for x in flat]
    return {
        "real: change / spread": told["logit_change"] / told["logit_spread"],
        "generated: change / spread": float((after - before).square().mean().sqrt() / before.std()),
        "generated: shift / spread": float((after - before).mean() / before.std()),
        "generated: correlation": float(torch.corrcoef(torch.stack([before, after]))[0, 1]),
        "FD raw": distances[0], "FD lockstep": distances[1], "FD freeze": distances[2],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = {(group, seed): measure(group, seed) for group in (4, 16) for seed in SEEDS}
    names = list(next(iter(rows.values())))
    print("| group, seed | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for (group, seed), row in rows.items():
        print(f"| {group}, {seed} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")


if __name__ == "__main__":
    main()
