"""What torch-fidelity makes of our files. It needs torchvision, which is no dependency of the tests: skipped without."""

import numpy as np
import pytest
import torch

from fastrefine import metrics
from fastrefine.production import run_folder
from fastrefine.production.configuration import Configuration
from fastrefine.production.worker import Worker

try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
    pytest.skip(f"torch-fidelity cannot be imported ({error})", allow_module_level=True)


class Pooled(FeatureExtractorBase):
    """Means of 2x2 pixels of the first channel, (N, 16)."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pooled"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        return (torch.nn.functional.avg_pool2d(x[:, :1].float(), 2).flatten(1),)


def test_torch_fidelity_reads_the_png_tree_and_finds_the_distance_that_we_find(tmp_path):
    torch_fidelity.register_feature_extractor("pooled", Pooled)
    features = []
    for seed in (0, 1):
        path = tmp_path / f"run{seed}"
        Worker(Configuration(pair="digits", ids="0-1199", seed=seed, max_steps=seed)).run(path)
        assert run_folder.merge(path, tmp_path / f"png{seed}") == 1200
        pixels = np.concatenate([pixels for pixels, _ in run_folder.Folder.open(path).parts()])
        features.append(pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16))
    found = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "png0"), input2=str(tmp_path / "png1"), samples_find_deep=True, fid=True, verbose=False,
        cuda=False, feature_extractor="pooled", cache=False,
    )  # fmt: skip
    assert found["frechet_inception_distance"] == pytest.approx(metrics.frechet_distance(*features), rel=1e-4)
    assert found["frechet_inception_distance"] > 0
