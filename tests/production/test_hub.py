"""Pairs of the Hugging Face Hub: fetched, pushed, and no code of theirs runs. A folder stands in for the Hub."""

import hashlib
import json
import shutil
import sys
import types

import pytest

import fastrefine as fr
from fastrefine.production import hub
from fastrefine.production.weights_file import digest
from tests.support.commands import fastrefine

CODE = ("fastrefine.models.digits:digits_generator", "fastrefine.models.digits:digits_discriminator")


class FakeHub(types.ModuleType):
    """Repositories in a folder, and snapshots of them as the Hub's client makes them: links into a folder of blobs."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.made = folder, []

    def create_repo(self, name, *, private, exist_ok, token):
        self.made.append((name, private, token))
        (self.folder / "there" / name).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, token, commit_message):
        shutil.copytree(folder_path, self.folder / "there" / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repository, *, revision, allow_patterns):
        there = self.folder / "there" / repository
        if not there.is_dir():
            raise ValueError(f"404 Client Error: {repository}\nsecond line")
        cache = self.folder / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = cache / "snapshots" / (revision or "0123abcd")
        snapshot.mkdir(parents=True, exist_ok=True)
        (cache / "blobs").mkdir(exist_ok=True)
        for file in there.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                blob = cache / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
                shutil.copyfile(file, blob)
                link = snapshot / file.name
                link.unlink(missing_ok=True)
                link.symlink_to(f"../../blobs/{blob.name}")
        return str(snapshot)


@pytest.fixture
def there(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def pair(tmp_path):
    own = fr.load_pair("digits")
    return fr.save_pair(tmp_path / "pair", own.generator, own.discriminator, code=CODE, prior=fr.Normal(32), at="act2",
                        max_steps=7, checkout=tmp_path)  # fmt: skip


def test_a_pair_is_pushed_and_fetched(there, pair, tmp_path):
    (pair / "secret.txt").write_text("mine")
    assert fr.push_pair(pair, "me/digits", private=True, token="t") == "https://huggingface.co/me/digits"
    pushed = tmp_path / "there" / "me" / "digits"
    names = {"config.json", "generator.safetensors", "discriminator.safetensors", "README.md"}
    assert {file.name for file in pushed.iterdir()} == names and there.made == [("me/digits", True, "t")]
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in pushed.iterdir())
    card = (pushed / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fastrefine") and 'fr.load_pair("me/digits")' in card and "normal" in card
    for name in ("me/digits", "me/digits@v1"):
        again = fr.load_pair(name)
        assert digest(again.generator) == digest(fr.load_pair("digits").generator) and again.max_steps == 7
    snapshot = next((tmp_path / "hub").glob("*/snapshots/*"))
    assert (snapshot / "config.json").is_symlink() and fr.load_pair(snapshot).at == "act2"
    done = fastrefine("layers", "--pair", "me/digits")
    assert done.exception is None and "act2" in done.output


def test_the_command_pushes_what_python_pushes(there, pair, tmp_path):
    fr.push_pair(pair, "me/python")
    done = fastrefine("push", pair, "me/command", "--private")
    assert done.exception is None and done.output.startswith("wrote https://huggingface.co/me/command. To use it anywhere")
    assert there.made == [("me/python", False, None), ("me/command", True, None)]
    one, other = (tmp_path / "there" / "me" / name for name in ("python", "command"))
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    for file in ("config.json", "generator.safetensors", "discriminator.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    done = fastrefine("refine", "--pair", "me/command", "--max-steps", 0, "--ids", "0-3", "--outdir", tmp_path / "raw")
    assert done.exception is None and "4 images" in done.output
    for given, says in (((tmp_path, "me/none"), "no saved pair"), ((pair, "none"), "wanted user/name")):
        with pytest.raises(fr.InputError, match=says):
            raise fastrefine("push", *given).exception
    shown = fastrefine("push", "--help").output
    assert "USER/NAME" in shown and "--private" in shown and "hf auth login" in shown


def test_a_model_card_of_ones_own_is_kept(there, pair, tmp_path):
    (pair / "README.md").write_text("my words")
    fr.push_pair(pair, "me/digits")
    assert (tmp_path / "there" / "me" / "digits" / "README.md").read_text() == "my words"


def test_a_snapshot_runs_no_code(there, pair, tmp_path):
    trace = tmp_path / "trace"
    fr.push_pair(pair, "them/evil")
    pushed = tmp_path / "there" / "them" / "evil"
    config = json.loads((pushed / "config.json").read_text())
    for changes in (
        {"generator": config["generator"] | {"code": "subprocess:getoutput", "arguments": {"cmd": f"touch {trace}"}}},
        {"generate": "subprocess:getoutput"},
        {"checkout": str(pushed), "generator": config["generator"] | {"code": "hostile_networks:Generator", "arguments": {}}},
    ):
        (pushed / "config.json").write_text(json.dumps(config | changes))
        (pushed / "hostile_networks.py").write_text(f"open({str(trace)!r}, 'w')\n")
        with pytest.raises(fr.InputError, match="config.json names|cannot be imported"):
            fr.load_pair("them/evil")
        done = fastrefine("layers", "--pair", "them/evil")
        assert isinstance(done.exception, fr.InputError) and not trace.exists()


def test_a_link_out_of_the_repository_is_refused(there, pair, tmp_path):
    fr.push_pair(pair, "them/evil")
    fr.load_pair("them/evil")
    snapshot = next((tmp_path / "hub").glob("*/snapshots/*"))
    (snapshot / "generator.safetensors").unlink()
    (snapshot / "generator.safetensors").symlink_to(pair / "generator.safetensors")
    with pytest.raises(fr.InputError, match="leads out of"):
        fr.load_pair(snapshot)


def test_what_the_hub_refuses_and_what_is_no_pair(there, pair, tmp_path):
    with pytest.raises(fr.InputError, match="nobody/none is no folder here, and no repository of the Hub .Value.*none.$"):
        fr.load_pair("nobody/none")
    with pytest.raises(fr.InputError, match="wanted user/name"):
        fr.push_pair(pair, "digits")
    with pytest.raises(fr.InputError, match="no saved pair"):
        fr.push_pair(tmp_path, "me/digits")
    there.create_repo = lambda *given, **more: (_ for _ in ()).throw(PermissionError("log in first"))
    with pytest.raises(fr.InputError, match="did not take me/digits .PermissionError: log in first"):
        fr.push_pair(pair, "me/digits")


def test_without_the_client_the_line_that_installs_it_is_told(monkeypatch, pair):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: fr.load_pair("nobody/none"), lambda: fr.push_pair(pair, "me/digits")):
        with pytest.raises(fr.InputError, match=r"pip install 'fastrefine\[hub\]'"):
            call()


def test_the_real_client_takes_what_it_is_given():
    client = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    import inspect

    for name, given in {
        "snapshot_download": ("repo_id", "revision", "allow_patterns"),
        "create_repo": ("repo_id", "private", "exist_ok", "token"),
        "upload_folder": ("repo_id", "folder_path", "token", "commit_message"),
    }.items():  # fmt: skip
        assert {*given} <= inspect.signature(getattr(client, name)).parameters.keys()
    assert hub.NAME.fullmatch("me/my-gan.v2@main") and not hub.NAME.fullmatch("a/b/c")
