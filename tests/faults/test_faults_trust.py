"""FAULTS 38: a pair, manifest or configuration from somebody else runs no code. A trap that springs leaves a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastrefine as fr
from fastrefine.cli import cli
from fastrefine.production import saved_pair
from fastrefine.production.configuration import Configuration, Network
from fastrefine.production.named_code import Trust
from fastrefine.production.worker import Worker

ROOT = Path(__file__).parents[2]
HERE = __name__
PRIOR = {"name": "normal", "shape": [4]}


class Generator(nn.Sequential):
    """(N, 4) -> (N, 1, 4, 4)."""

    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4)))


class Discriminator(nn.Sequential):
    """(N, 1, 4, 4) -> (N, 1)."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 1))


def generator():
    """A factory of the user's own: harmless, but a function."""
    return Generator()


FINISHED = Generator()


class Trap:
    """No network; its constructor, its property and its ``__class__`` leave a trace."""

    trace: Path

    def __init__(self, path=None):
        Path(path or Trap.trace).touch()

    @property
    def Generator(self):
        Trap.trace.touch()
        return Generator


trap = object.__new__(Trap)


class Lazy(type):
    """A metaclass that makes attributes up."""

    def __getattr__(cls, name):
        Trap.trace.touch()
        return Generator


class Holder(metaclass=Lazy):
    class Inner(Generator):
        pass


@pytest.fixture
def trace(tmp_path):
    Trap.trace = tmp_path / "trace"
    return Trap.trace


@pytest.fixture
def pair(tmp_path):
    torch.manual_seed(0)
    return fr.save_pair(
        tmp_path / "pair", Generator(), Discriminator(), code=(f"{HERE}:Generator", f"{HERE}:Discriminator"), prior=fr.Normal(4)
    )


def changed(pair, role="generator", **entries):
    """The pair with other entries for one of its networks."""
    file = pair / "config.json"
    config = json.loads(file.read_text())
    config[role].update(entries)
    file.write_text(json.dumps(config))
    return pair


def hostile(trace):
    """(code, arguments) of callables that everybody has."""
    return [
        ("subprocess:getoutput", {"cmd": f"touch {trace}"}),
        ("os:system", {"command": f"touch {trace}"}),
        ("builtins:open", {"file": str(trace), "mode": "w"}),
        (f"{HERE}:Trap", {"path": str(trace)}),
        (f"{HERE}:trap.Generator", {}),
        (f"{HERE}:Holder.Generator", {}),
        (f"{HERE}:sys.modules", {}),
        (f"{HERE}:Path.touch", {"self": str(trace)}),
        ("pathlib:Path.cwd", {}),
    ]


NUMBERS = range(9)


def command(*arguments, cwd=None, path=None):
    """The command in a process of its own, started in ``cwd`` as ``python -m fastrefine``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *(path or [])]))}
    return subprocess.run(
        [sys.executable, "-m", "fastrefine", *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd,
        env=environment,
    )  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)


def refused(done, trace):
    assert isinstance(done.exception, fr.FastrefineError), (done.output, done.exception)
    assert "--trust-code" in str(done.exception) and not trace.exists()


def both(pair):
    """The two networks of a pair as a configuration."""
    config = json.loads((pair / "config.json").read_text())
    return {role: config[role] | {"weights": str(pair / f"{role}.safetensors")} for role in saved_pair.ROLES}


QUICK = ("--max-steps", 1, "--slots", 4, "--ids", "0-3")


# --- the ways in


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("role", ["generator", "discriminator"])
def test_load_pair_calls_nothing_that_is_no_network(pair, trace, number, role):
    code, arguments = hostile(trace)[number]
    with pytest.raises(fr.InputError, match="config.json names|cannot be imported"):
        fr.load_pair(changed(pair, role, code=code, arguments=arguments))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["refine", "shape", "bench", "layers"])
def test_every_command_with_a_pair_refuses_it(pair, trace, tmp_path, name):
    changed(pair, code="subprocess:getoutput", arguments={"cmd": f"touch {trace}"})
    more = {"refine": (*QUICK, "--outdir", tmp_path / "run"), "shape": ("--real", "digits", "--outdir", tmp_path / "s")}
    refused(invoke(name, "--pair", pair, *more.get(name, ())), trace)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_configuration_calls_nothing_that_is_no_network(pair, trace, tmp_path, number):
    code, arguments = hostile(trace)[number]
    values = {**both(changed(pair, code=code, arguments=arguments)), "prior": PRIOR}
    (tmp_path / "c.json").write_text(json.dumps({"configuration": values}))
    done = invoke("refine", "--config", tmp_path / "c.json", *QUICK, "--outdir", tmp_path / "run")
    assert isinstance(done.exception, fr.InputError) and not trace.exists() and not (tmp_path / "run").exists()
    with pytest.raises(fr.InputError):
        Worker(Configuration.from_json(values))
    assert not trace.exists()


def test_a_manifest_that_is_resumed_calls_nothing(pair, trace, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "c.json").write_text(json.dumps({**both(pair), "prior": PRIOR}))
    assert not invoke("refine", "--config", tmp_path / "c.json", *QUICK, "--outdir", run).exception
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["configuration"]["generator"] |= {"code": "subprocess:getoutput", "arguments": {"cmd": f"touch {trace}"}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    refused(invoke("refine", "--config", run / "manifest.json", "--outdir", run), trace)
    for name, more in (("verify", ()), ("merge", ("--output", tmp_path / "m.npz")), ("evaluate", ("--real", "digits"))):
        invoke(name, run, *more)
        assert not trace.exists()
    done = invoke("refine", "--config", tmp_path / "c.json", *QUICK, "--outdir", run)
    assert "another configuration" in str(done.exception) and not trace.exists()


def test_the_traps_spring_where_the_code_is_trusted(pair, trace):
    changed(pair, code="subprocess:getoutput", arguments={"cmd": f"touch {trace}"})
    with pytest.raises(fr.InputError, match="gave a str"):
        fr.load_pair(pair, trust_code=True)
    assert trace.exists()
    trace.unlink()
    assert "gave a str" in str(invoke("layers", "--pair", pair, "--trust-code").exception) and trace.exists()
    trace.unlink()
    with pytest.raises(fr.InputError, match="gave a str"):
        Worker(Configuration.from_json({**both(pair), "prior": PRIOR}), trust_code=True)
    assert trace.exists()


# --- what is loaded


@pytest.mark.parametrize("name", ["Generator", "Holder.Inner"])
def test_classes_need_no_trust(pair, name):
    assert isinstance(fr.load_pair(changed(pair, code=f"{HERE}:{name}")).generator, Generator)


def test_networks_of_the_package_need_no_trust(tmp_path):
    code = ("fastrefine.models:mlp_generator", "fastrefine.models.mlp:mlp_discriminator")
    networks = fr.models.mlp_generator(latent=4), fr.models.mlp_discriminator(2)
    fr.save_pair(tmp_path, *networks, code=code, arguments=({"latent": 4}, {}), prior=fr.Normal(4))
    assert fr.load_pair(tmp_path).generator(torch.zeros(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("code", [f"{HERE}:generator", f"{HERE}:FINISHED"])
def test_functions_and_finished_modules_need_trust(pair, code):
    changed(pair, code=code)
    with pytest.raises(fr.InputError, match="--trust-code.*trust_code"):
        fr.load_pair(pair)
    assert isinstance(fr.load_pair(pair, trust_code=True).generator, Generator)
    assert "Traceback" not in str(invoke("layers", "--pair", pair, "--trust-code").exception or "")


def test_what_the_user_types_is_trusted(pair, tmp_path):
    typed = ("--generator", f"{HERE}:generator", "--generator-weights", pair / "generator.safetensors",
             "--discriminator", f"{HERE}:Discriminator", "--discriminator-weights", pair / "discriminator.safetensors",
             "--prior", json.dumps(PRIOR))  # fmt: skip
    assert not invoke("refine", *typed, *QUICK, "--outdir", tmp_path / "run").exception
    manifest = tmp_path / "run" / "manifest.json"
    done = invoke("refine", "--config", manifest, "--outdir", tmp_path / "run")  # the same code, now named by a file
    assert isinstance(done.exception, fr.InputError) and "--trust-code" in str(done.exception)
    assert not invoke("refine", "--config", manifest, *typed, "--outdir", tmp_path / "run").exception
    assert not invoke("refine", "--config", manifest, "--trust-code", "--outdir", tmp_path / "run").exception


def test_an_archive_is_not_read_untrusted(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda path: (tmp_path / "trace").touch())
    (pair / "g.pt2").write_bytes(b"x")
    changed(pair, code="g.pt2")
    with pytest.raises(fr.InputError, match="not read.*--trust-code"):
        fr.load_pair(pair)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(fr.InputError):
        fr.load_pair(pair, trust_code=True)
    assert (tmp_path / "trace").exists()


# --- importing is running


def evil(folder, name, trace, package=False):
    """A module that leaves a trace when it is imported, and holds a faultless network."""
    text = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nfrom {HERE} import Generator as Base\n" \
           "class Generator(Base):\n    pass\n"  # fmt: skip
    file = folder / name / "__init__.py" if package else folder / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def forgotten():
    """Modules that a test imports are forgotten after it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("evil", "pair", "linked")):
            del sys.modules[name]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("code", "where", "package"), [
    ("evil_a:Generator", "pair", False), ("evil_b:Generator", "pair", True), ("evil_c.deep:Generator", "pair/evil_c", False),
    ("pair.evil_d:Generator", "pair", False), ("linked_e:Generator", "pair", False),
])  # fmt: skip
def test_a_module_in_the_pairs_folder_is_not_imported(pair, trace, tmp_path, monkeypatch, code, where, package):
    name = code.partition(":")[0].split(".")[-1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(pair)]))  # not even then
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(pair)
    evil(tmp_path / where, name, trace, package)
    if name.startswith("linked"):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / f"{name}.py").symlink_to(pair / f"{name}.py")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *(p for p in sys.path if p != str(pair))])
    with pytest.raises(fr.InputError, match="beside the file that names it.*not imported"):
        fr.load_pair(changed(pair, code=code))
    assert not trace.exists()
    fr.load_pair(pair, trust_code=True)
    assert trace.exists()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("place", ["pair", "work"])
def test_a_link_to_a_module_behind_a_linked_folder_is_not_imported(pair, trace, tmp_path, monkeypatch, place):
    evil(tmp_path / "elsewhere", "evil_far", trace)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "evil_far.py").symlink_to(tmp_path / "elsewhere" / "evil_far.py")
    (tmp_path / "alias").symlink_to(tmp_path / place)
    monkeypatch.syspath_prepend(tmp_path / "alias")
    if place == "work":
        monkeypatch.chdir(tmp_path / place)
    with pytest.raises(fr.InputError, match="not imported"):
        fr.load_pair(changed(pair, code="evil_far:Generator"))
    assert not trace.exists()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("package", [False, True])
def test_a_module_in_the_current_directory_is_imported_only_if_pythonpath_names_it(pair, trace, tmp_path, monkeypatch, package):
    evil(tmp_path / "work", "evil_cwd", trace, package)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    changed(pair, code="evil_cwd:Generator")
    with pytest.raises(fr.InputError, match="in the current directory.*not imported"):
        fr.load_pair(pair)
    assert not trace.exists()
    monkeypatch.setenv("PYTHONPATH", ".")
    fr.load_pair(pair)
    assert trace.exists()


def test_the_command_started_in_a_foreign_folder_imports_nothing_of_it(pair, trace, tmp_path):
    evil(tmp_path, "evil_command", trace)
    changed(pair, code="evil_command:Generator")
    done = command("layers", "--pair", "pair", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("fastrefine: ") and "--trust-code" in done.stderr
    assert not trace.exists()


@pytest.mark.parametrize("code", [
    "this:Generator", "antigravity:X", "json.tool:X", "torch.utils.bottleneck.__main__:X", "a/b:X", ".a:X", "..pair:X", "a:",
    ":X", "a:b..c", "a b:X",
])  # fmt: skip
def test_programs_pythons_library_and_what_is_no_name_are_not_imported(pair, code):
    known = set(sys.modules)
    with pytest.raises(fr.InputError):
        fr.load_pair(changed(pair, code=code))
    assert not {"this", "antigravity", "json.tool", "torch.utils.bottleneck.__main__"} & (set(sys.modules) - known)


# --- paths


@pytest.mark.parametrize("how", ["..", "absolute", "link", "linked folder"])
def test_weights_outside_of_the_pairs_folder_are_not_read(pair, tmp_path, how):
    outside = tmp_path / "outside"
    outside.mkdir()
    (pair / "generator.safetensors").rename(outside / "g.safetensors")
    path = {"..": "../outside/g.safetensors", "absolute": str(outside / "g.safetensors"), "link": "link.safetensors",
            "linked folder": "in/g.safetensors"}[how]  # fmt: skip
    (pair / "link.safetensors").symlink_to(outside / "g.safetensors")
    (pair / "in").symlink_to(outside)
    for trust in (False, True):
        with pytest.raises(fr.InputError, match="leads out of"):
            fr.load_pair(changed(pair, weights=path), trust_code=trust)


def test_a_pair_behind_a_link_is_loaded(pair, tmp_path):
    (tmp_path / "link").symlink_to(pair)
    assert isinstance(fr.load_pair(tmp_path / "link").generator, Generator)


def test_weights_of_a_configuration_stay_in_its_folder_unless_the_user_types_them(pair, tmp_path):
    values, folder = {**both(pair), "prior": PRIOR}, tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(values))
    given = ("refine", "--config", folder / "c.json", *QUICK, "--outdir", tmp_path / "run")
    done = invoke(*given)
    assert isinstance(done.exception, fr.InputError) and "leads out of" in str(done.exception)
    typed = [part for role in saved_pair.ROLES for part in (f"--{role}-weights", pair / f"{role}.safetensors")]
    assert not invoke(*given, *typed).exception
    assert not invoke(*given, "--trust-code").exception
    (pair / "c.json").write_text(json.dumps(values))
    assert not invoke("refine", "--config", pair / "c.json", *QUICK, "--outdir", tmp_path / "run2").exception


def test_a_network_made_in_python_is_trusted_only_when_said(pair):
    weights = str(pair / "generator.safetensors")
    assert isinstance(saved_pair.load_network(Network(f"{HERE}:Generator", weights=weights), "generator"), Generator)
    with pytest.raises(fr.InputError, match="the configuration names"):
        saved_pair.load_network(Network(f"{HERE}:generator", weights=weights), "generator")
    trust = Trust(typed=frozenset([f"{HERE}:generator"]))
    assert saved_pair.load_network(Network(f"{HERE}:generator", weights=weights), "generator", trust=trust) is not None


# --- how networks are called


@pytest.mark.parametrize("name", ["generate", "discriminate"])
@pytest.mark.parametrize("code", ["subprocess:getoutput", f"{HERE}:call"])
def test_functions_that_a_file_names_are_not_imported_or_called(pair, trace, tmp_path, name, code):
    file = pair / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: code}))
    with pytest.raises(fr.InputError, match="--trust-code.*trust_code"):
        fr.load_pair(pair)
    refused(invoke("refine", "--pair", pair, *QUICK, "--outdir", tmp_path / "run"), trace)
    values = {**both(pair), "prior": PRIOR, name: code}
    with pytest.raises(fr.InputError, match="--trust-code"):
        Worker(Configuration.from_json(values))
    (pair / "c.json").write_text(json.dumps(values))
    refused(invoke("refine", "--config", pair / "c.json", *QUICK, "--outdir", tmp_path / "run"), trace)
    if code.endswith(":call"):
        Call.trace = trace
        assert not invoke(
            "refine", "--config", pair / "c.json", f"--{name}", code, *QUICK, "--outdir", tmp_path / "a"
        ).exception
        assert trace.exists()  # typed
        trace.unlink()
        assert not invoke("refine", "--pair", pair, "--trust-code", *QUICK, "--outdir", tmp_path / "b").exception
        assert trace.exists()


class Call:
    trace: Path


def call(network, x):
    """As it is called without a function, but leaves a trace."""
    Call.trace.touch()
    return network(x)
