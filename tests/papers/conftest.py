"""Quick runs of the experiments, each made once for all tests."""

import fcntl
import pickle
import shutil

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if "quick_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.whole)


@pytest.fixture
def reference_torch():
    """Skips what a training of seconds must show elsewhere than with the torch that its recipe was chosen on."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip("with another torch than 2.13 a training of seconds ends elsewhere, and its claims were chosen on that one")


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory, shared_folder):
    """name -> (folder, record) of an experiment's quick run with one seed: made once a session, a copy for each caller."""
    shared = shared_folder / "quick-runs"
    shared.mkdir(exist_ok=True)

    def get(name):
        from benchmarks.papers.catalogue import EXPERIMENTS

        made, kept = shared / name, shared / f"{name}.pickle"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be making it
            if not kept.exists():
                record = EXPERIMENTS[name].run(shared, seeds=EXPERIMENTS[name].seeds[:1], quick=True)
                kept.write_bytes(pickle.dumps(record))
        folder = tmp_path_factory.mktemp("quick") / name
        shutil.copytree(made, folder)
        return folder, pickle.loads(kept.read_bytes())

    return get
