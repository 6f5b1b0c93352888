"""What is trained once and kept in cells: GANs after several numbers of steps, and the classifiers that judge images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from benchmarks.papers.cells import Cells
from fastrefine.datasets import Images
from fastrefine.demo.gan import Pair, Trainer, build
from fastrefine.demo.judge import Judge, trained_classifier
from fastrefine.models.digits import Classifier

SAVE_EVERY = 60.0  # seconds between states that a cut training is taken up from


def trained_judge(cells: Cells, make: Callable[[], Classifier], data: Images, *, seed: int, **training: Any) -> Judge:
    """A judge whose classifier is from ``cells``, or trained now; training: arguments of ``train_classifier``."""
    return Judge(
        cells.network(f"classifier-{seed}", build(make, seed), lambda: trained_classifier(make, data, seed=seed, **training)),
        data,
    )


def checkpoints(cells: Cells, name: str, make: Callable[[], Trainer], steps: Sequence[int]) -> dict[int, Pair]:
    """The pair after each of ``steps``, in eval mode: from ``cells``, or trained now, from where a cut training stood.

    make: the trainer at step 0; called once more for each pair, whose weights are loaded into its networks.
    """
    missing = [k for k in sorted(steps) if not cells.has(f"{name}-{k}")]
    state = f"{name}-state"
    if missing:
        trainer = make()
        if cells.has(state):
            trainer.load(cells.tensors(state, dict))
        if trainer.step > missing[0]:  # a checkpoint was added: begin again
            trainer = make()
        saved = time.monotonic()
        with tqdm(total=missing[-1], initial=trainer.step, desc=name, disable=None) as bar:
            for target in missing:
                for _ in trainer.advance(target):
                    bar.update()
                    if time.monotonic() - saved > SAVE_EVERY:
                        cells.put(state, trainer.state())
                        saved = time.monotonic()
                pair = nn.ModuleList([trainer.generator, trainer.discriminator])
                cells.put(f"{name}-{target}", pair.state_dict())
                cells.put(state, trainer.state())
    return {k: _loaded(cells, f"{name}-{k}", make()) for k in steps}


def _loaded(cells: Cells, key: str, trainer: Trainer) -> Pair:
    pair = nn.ModuleList([trainer.generator, trainer.discriminator])
    pair.load_state_dict(cells.tensors(key, dict))
    return trainer.generator.eval(), trainer.discriminator.eval()
