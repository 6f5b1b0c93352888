"""What torch-fidelity makes of our files, and we of its Inception. It needs torchvision: skipped without."""

import numpy as np
import pytest
import torch

from fastrefine import InputError, metrics
from fastrefine.production import evaluation, image_features, run_folder
from fastrefine.production.configuration import Configuration
from fastrefine.production.worker import Worker

try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
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


class WithoutWeights(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with the random weights that its layers begin with."""

    def load_state_dict(self, state):
        assert not state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torch-fidelity's own of the weights, but of random ones."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    state = WithoutWeights("random", ["2048"], feature_extractor_weights_path=str(folder / "none.pth")).state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)  # else all images would have nearly the same features
    state["fc.weight"] *= 30
    torch.save(state, folder / "weights.pth")
    yield folder / "weights.pth"
    (folder / "weights.pth").unlink()  # 91 MB


@pytest.mark.slow
def test_the_published_names_stand_for_what_torch_fidelity_finds(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(evaluation, "SCORED_IN", 2)
    for name, steps in (("real", 0), ("ours", 5)):
        Worker(Configuration(pair="digits", ids="0-7", max_steps=steps)).run(tmp_path / name)
        run_folder.merge(tmp_path / name, tmp_path / f"png-{name}")
    ours, real = (evaluation.images_of(tmp_path / name) for name in ("ours", "real"))
    other = evaluation.given_features(f"inception={weights}")
    sha256 = other.network.sha256
    assert other.name == f"inception-{sha256[:8]}" and not other.published
    monkeypatch.setattr(image_features, "INCEPTION_SHA256", sha256[:8])  # as if these were the weights of 2015
    features = evaluation.given_features(f"inception={weights}")
    assert features.name == "inception" and features.published
    assert features(ours)[0].shape == (8, 2048) and features(ours)[1].shape == (8, 1008)

    monkeypatch.setattr(metrics, "frechet_draws", lambda *given, **more: np.zeros(2))  # which takes long with 2,048 features
    found = evaluation.measure(ours, real, features, resamples=2)
    assert set(found) == set(evaluation.PUBLISHED.values())
    assert evaluation._named("recall", other, 8) == f"recall[inception-{sha256[:8]}, n=8]"
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "png-ours"), input2=str(tmp_path / "png-real"), samples_find_deep=True, verbose=False, cuda=False,
        cache=False, isc=True, isc_splits=2, prc=True, feature_extractor="inception-v3-compat",  # else VGG16 for prc
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    for name in ("inception_score_mean", "precision", "recall", "f_score"):
        assert found[name].value == pytest.approx(theirs[name], rel=1e-4), name
    assert found["inception_score_mean"].value > 1.01


def test_other_files_are_no_weights_of_inception(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="holds no weights of torch-fidelity's Inception"):
        evaluation.given_features(f"inception={tmp_path}/weights.pth")
