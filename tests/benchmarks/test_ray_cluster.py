"""``fastrefine.ray.refine`` on a real cluster of this machine, of which processes are killed (``make test-ray``)."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import fastrefine as fr
from fastrefine.production import run_folder

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="needs ray: pip install 'fastrefine[ray]'")
cluster = pytest.importorskip("benchmarks.ray_cluster")
SMALL = replace(cluster.RUN, ids="0-39", shard_size=20, max_steps=2)


@pytest.fixture(scope="module", autouse=True)
def connected(tmp_path_factory):
    if shutil.which("ps") is None:
        pytest.skip("needs ps, to find the processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("processes"))  # is then theirs
        cluster.start()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return cluster.record(tmp_path_factory.mktemp("record"))


def test_a_killed_process_changes_no_byte_and_no_finished_shard_is_made_again(recorded):
    print(json.dumps(recorded, indent=1))
    killed = recorded["killed"]
    assert killed["its_finished_shards"] >= 1 and killed["its_unfinished_shards"] >= 1
    assert killed["finished_shards_made_again"] == 0
    assert recorded["shards"] == 12 and recorded["images"] == 2400 and recorded["complete"] and recorded["hashes_equal"]


def test_the_committed_record_is_of_this_run(recorded):
    """Its bits are those of the machine that wrote it; what was run is the same."""
    kept = json.loads((cluster.RECORD).read_text())
    for name in ("configuration", "shards", "images", "workers", "tasks", "hashes_equal", "rows"):
        assert kept[name] == recorded[name], name


def test_without_retries_the_loss_is_told_and_the_same_call_makes_the_rest(recorded, tmp_path):
    kill, error = cluster.killed(tmp_path / "run", retries=0)
    assert kill.left, "the process was to be killed before its last shard"
    assert type(error) is fr.FastrefineError
    assert re.search(
        r"task 2 of 3 was lost \(\w+: .*\) more often than its 0 retries; the finished shards are kept", str(error)
    )
    verdict = run_folder.verify(tmp_path / "run")
    assert not verdict.complete and not verdict.damaged and len(verdict.missing) == kill.left  # the other tasks went on
    outcome = cluster.refine(tmp_path / "run")
    assert (outcome.made, outcome.found, outcome.images) == (kill.left, 12 - kill.left, 2400)
    assert all(path.stat().st_mtime_ns == then for path, then in kill.done.items())
    assert cluster.sha256(tmp_path / "run") == recorded["sha256"]["one"]
    assert outcome.summary["complete"] and outcome.summary["images"] == 2400


def test_errors_are_those_of_the_command_line(tmp_path):
    for given, wanted in (
        (replace(SMALL, pair="absent"), "absent is not there; wanted a folder of fastrefine.save_pair"),
        (replace(SMALL, stop="median"), "reads real logits: pass real=images"),
        ({"pair": "digits", "idz": "0-9"}, "unknown in a configuration: idz"),
    ):
        with pytest.raises(fr.InputError, match=wanted) as found:
            fr.ray.refine(given, tmp_path / "run")
        assert type(found.value) is fr.InputError  # not Ray's own kind of it
    assert not list((tmp_path / "run").glob("*"))
    fr.ray.refine(SMALL, tmp_path / "run", tasks=1)
    with pytest.raises(fr.InputError, match="belongs to a run of another configuration"):
        fr.ray.refine(replace(SMALL, max_steps=3), tmp_path / "run")
    with pytest.raises(fr.InputError, match=r"needs 1 CPUs and 1 GPUs, and the cluster \(3 CPUs, 0 GPUs\) has no room"):
        fr.ray.refine(SMALL, tmp_path / "run", num_gpus=1)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search("Example: ``(.*?)``", fr.ray.refine.__doc__)[1]
    assert eval(code.partition("#")[0], {"fr": fr}) == int(code.partition("#")[2])
    assert run_folder.verify(tmp_path / "run").complete


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")
def test_a_folder_that_the_caller_does_not_see_is_told(tmp_path, monkeypatch):
    """One path that leads elsewhere in each process stands for machines without a common file system."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fr.InputError, match="2 of 2 shards are not in /proc/self/cwd/run here, first shard-000000.npz; wanted"):
        fr.ray.refine(SMALL, "/proc/self/cwd/run", tasks=1)


def test_weights_that_changed_since_the_last_call_are_read_again(tmp_path, monkeypatch):
    """The processes of a cluster outlive a call; a pair is found from the working directory of the caller."""
    monkeypatch.chdir(tmp_path)
    pair = fr.load_pair("digits")
    given = replace(SMALL, pair="pair")
    pair.saved(tmp_path / "pair")
    fr.ray.refine(given, "first", tasks=2)
    for value in pair.generator.parameters():
        value.data.mul_(0.5)
    pair.saved(tmp_path / "pair")
    fr.ray.refine(given, "second", tasks=2)
    assert cluster.sha256(tmp_path / "first") != cluster.sha256(tmp_path / "second")
