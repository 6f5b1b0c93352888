"""What judges images, and how they are drawn as pixels."""

import math

import pytest
import torch
from torch import nn

from fastrefine.datasets import Images
from fastrefine.demo.gan import build
from fastrefine.demo.judge import Judge
from fastrefine.metrics import frechet_distance
from fastrefine.models.digits import Classifier


def classifier():
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh()), 3, 2)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DATA = Images(random(0, 50, 1, 2, 2), random(1, 80, 1, 2, 2), torch.arange(50) % 2, torch.arange(80) % 2)


def test_the_judge_finds_no_distance_between_the_held_out_images_and_themselves():
    judge = Judge(build(classifier, 0), DATA)
    assert judge(DATA.test)["frechet_distance"] == pytest.approx(0, abs=1e-9) and judge(DATA.train)["frechet_distance"] > 1e-3


def test_the_judge_tells_the_figures_of_the_first_images_too():
    judge = Judge(build(classifier, 0), DATA)
    found, few = judge(DATA.train, 30), judge(DATA.train[:30])
    assert found["frechet_distance_30"] == few["frechet_distance"] != found["frechet_distance"]
    assert found["classifier_score_30"] == few["classifier_score"] != found["classifier_score"]


def test_the_judges_distance_is_of_the_penultimate_features():
    net = build(classifier, 0)
    features = [net.features(x).detach() for x in (DATA.train, DATA.test)]
    assert Judge(net, DATA)(DATA.train)["frechet_distance"] == pytest.approx(frechet_distance(*features))


def test_a_selection_that_leaves_nothing_has_the_worst_figures():
    judge = Judge(build(classifier, 0), DATA)
    for images in (DATA.train[:0], DATA.train[:1]):
        found = judge(images, 30)
        assert [found["frechet_distance"], found["frechet_distance_30"]] == [math.inf] * 2 and found["classifier_score"] == 1
