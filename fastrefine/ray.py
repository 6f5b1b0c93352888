"""A run as tasks on a Ray cluster: Ray starts again what a lost process or machine leaves. Needs the extra ``ray``."""

from __future__ import annotations

import functools
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrefine import checks
from fastrefine.errors import FastrefineError, InputError
from fastrefine.production.before_after import manifest_of
from fastrefine.production.configuration import Configuration
from fastrefine.production.run_folder import Folder
from fastrefine.production.worker import Outcome, Worker
from fastrefine.progress import ProgressBar

if TYPE_CHECKING:
    from ray import ObjectRef

TASKS = 4  # for each place of the cluster, so that faster machines take more of them


def refine(
    configuration: Configuration | Mapping[str, Any], outdir: str | os.PathLike[str], *, tasks: int | None = None,
    num_cpus: int = 1, num_gpus: float | None = None, retries: int = 3, allow_pickle: bool = False, trust_code: bool = False,
    progress: bool | None = None,
) -> Outcome:  # fmt: skip
    """Make a run of ``fastrefine refine`` by tasks on a Ray cluster, and wait for it.

    Each task makes a share of consecutive shards, as a worker of the command line does. A shard that is finished is never made
    again, whether by the next attempt of a task, by the next call or by the command: all three go on in the same folder.

    configuration: a ``Configuration``, or its JSON object as in a manifest. outdir: the run's folder. Every machine must see it
    at this path. Other relative paths are looked up in the working directory of the caller where a machine has it.
    tasks: how many; None: four for each place that the cluster has for one now, at most one for each shard. num_cpus: cores of
    a task, and its threads. num_gpus: GPUs of a task, 0 to compute on CPUs, .5 for two tasks on one; None: 1 where the cluster
    has any, else 0. retries: how often Ray starts a task again after its process or machine was lost, -1 for always.
    allow_pickle, trust_code: as for ``load_pair``. progress: True: a bar | None: a bar on a terminal, elsewhere lines | False.

    Where no cluster is connected ``ray.init()`` connects as Ray's settings say, or starts a local one. Returns an ``Outcome``:
    images, those shards that were made and found, seconds, and the summary that stands in the manifest. Shards of an attempt
    that was lost count as found.

    Raises InputError where ray is not installed, for what the command line refuses, where the cluster has no room for a task,
    and where shards are not in ``outdir`` in the end. Raises FastrefineError where a task was lost more often than ``retries``;
    the others are finished before, and the same call goes on.

    Example: ``fr.ray.refine({"pair": "digits", "ids": "0-1999", "max_steps": 5}, "run").images  # 2000``
    """
    ray = _ray()
    if not isinstance(configuration, Configuration):
        configuration = Configuration.from_json(configuration)
    checks.count("num_cpus", num_cpus, 1)
    checks.count("retries", retries, -1)
    if tasks is not None:
        checks.count("tasks", tasks, 1)
    if num_gpus is not None:
        checks.number("num_gpus", num_gpus, 0)
        if num_gpus > 1 and num_gpus % 1:
            raise InputError(f"num_gpus is {num_gpus}; wanted a whole number, or one below 1 for tasks that share a GPU")
    outdir, began = Path(outdir).absolute(), time.perf_counter()
    folder = Folder(outdir, configuration, "")
    shards = folder.shards()
    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = min(resources.get("GPU", 0), 1)
    if tasks is None:
        needs = {"CPU": num_cpus, "GPU": num_gpus}
        places = min(int(resources.get(name, 0) / need) for name, need in needs.items() if need)
        if not places:
            has = ", ".join(f"{resources.get(name, 0):g} {name}s" for name in needs)
            raise InputError(
                f"a task needs {num_cpus} CPUs and {num_gpus:g} GPUs, and the cluster ({has}) has no room for one; wanted "
                " other num_cpus= and num_gpus=, or tasks= for a cluster that grows"
            )
        tasks = TASKS * places
    count = min(tasks, len(shards))
    call = uuid.uuid4().hex, json.dumps(configuration.to_json()), os.getcwd(), bool(num_gpus), allow_pickle, trust_code
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=retries)(_share)
    names = {
        task.options(name=f"fastrefine {i + 1} of {count}").remote(call, str(outdir), i, count): f"{i + 1} of {count}"
        for i in range(count)
    }
    outcome, lost = Outcome(), ""
    with ProgressBar(sum(shard.count for shard in shards), "refining", "images", progress) as bar:
        for name, part in _finished(ray, names):
            if isinstance(part, Exception):
                lost = lost or f"task {name} was lost ({type(part).__name__}: {str(part).strip().partition(chr(10))[0]})"
                continue
            counts = ("made", "found", "images", "refined", "seconds_writing", "unselected", "nonfinite")
            outcome = replace(outcome, **{key: getattr(outcome, key) + getattr(part, key) for key in counts})
            bar.to(outcome.images)
    if lost:
        raise FastrefineError(
            f"{lost} more often than its {retries} retries; the finished shards are kept in {outdir}, and the same call makes "
            "the rest"
        )
    absent = [folder.file(shard).name for shard in shards if not folder.marker(shard).exists()]
    if absent:
        raise InputError(
            f"the tasks are done, but {len(absent)} of {len(shards)} shards are not in {outdir} here, first {absent[0]}; "
            "wanted a folder that every machine of the cluster sees at this path"
        )
    return replace(outcome, seconds=time.perf_counter() - began, summary=manifest_of(folder)["summary"])


def _finished(ray: Any, names: dict[ObjectRef, str]) -> Iterator[tuple[str, Outcome | Exception]]:
    """(name, outcome) of the tasks as they end; an exception for one that was lost. Raises that of our own code in a task.

    Who stops here, by an error or Ctrl-C, takes the other tasks back.
    """
    waiting = list(names)
    try:
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                yield names[done], ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, FastrefineError | OSError) else error
                raise cause from None  # without Ray's traceback of the other process
            except ray.exceptions.RayError as error:
                yield names[done], error
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _share(call: tuple[Any, ...], outdir: str, share: int, shares: int) -> Outcome:
    """One task: the shards of one share that are not there."""
    return _worker(*call).run(Path(outdir), worker=share, workers=shares)


@functools.lru_cache(maxsize=1)  # a process makes several tasks of one call
def _worker(call: str, settings: str, directory: str, gpu: bool, allow_pickle: bool, trust_code: bool) -> Worker:
    """The networks, prepared once in a process. call: another one for each call, for files may have changed since."""
    configuration, own = Configuration.from_json(json.loads(settings)), os.getcwd()
    try:
        if os.path.isdir(directory):
            os.chdir(directory)
        device = "cuda" if gpu else "cpu"
        return Worker(configuration, device=device, allow_pickle=allow_pickle, trust_code=trust_code)
    finally:
        os.chdir(own)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError("a run on a Ray cluster needs ray: pip install 'fastrefine[ray]'") from error
    return ray
