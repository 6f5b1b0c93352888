"""layers, shape, distil, evaluate and bench on the command line: what a first-time user gets wrong, and what is told then."""

import json
import os
import re
import signal

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastrefine as fr
from fastrefine.cli import cli
from fastrefine.cli.production import hint_when_busy
from fastrefine.errors import InputError, SplitError
from fastrefine.models import digits as networks
from fastrefine.production import bench, images
from fastrefine.training import distil

NORMAL = ("--prior", '{"name": "normal", "shape": [32]}')
CODE = "fastrefine.models.digits"


def run(*arguments):
    """stdout of a command, run in this process; its errors are raised."""
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False, catch_exceptions=False).output


def usage_error(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 2, done.output
    return done.output


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pair with random weights: saved, as weights, and as archives of torch.export."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    g, d = networks.digits_generator().eval(), networks.digits_discriminator().eval()
    fr.save_pair(folder / "pair", g, d, code=(f"{CODE}:digits_generator", f"{CODE}:digits_discriminator"), prior=fr.Normal(32))
    for name, module, shape in (("g", g, (32,)), ("d", d, (1, 8, 8))):
        torch.save(module.state_dict(), folder / f"{name}.pt")
        batch = {0: torch.export.Dim("batch")}
        torch.export.save(
            torch.export.export(module, (torch.randn(4, *shape),), dynamic_shapes=(batch,)), folder / f"{name}.pt2"
        )
    return folder


def from_code(files):
    return (*NORMAL, *(flag for name in ("generator", "discriminator") for flag in (
        f"--{name}", f"{CODE}:digits_{name}", f"--{name}-weights", files / f"{name[0]}.pt")))  # fmt: skip


def shape(files, outdir, *networks, iterations=2):
    return run("shape", *networks, "--real", "digits", "--iterations", iterations, "--batch-size", 8, "--max-steps", 1,
               "--outdir", outdir)  # fmt: skip


# --- layers


def test_layers_needs_no_discriminator(files):
    listed = json.loads(run("layers", *from_code(files)[:6], "--json"))
    whole = fr.layers(fr.load_pair(files / "pair").generator, torch.randn(8, 32))
    assert [row["name"] for row in listed] == [layer.name for layer in whole]
    assert "no discriminator is needed" in usage_error("layers", *NORMAL)


def test_an_export_has_its_input_and_its_output_as_layers(files):
    rows = json.loads(run("layers", "--generator", files / "g.pt2", *NORMAL, "--json"))
    whole = fr.layers(fr.load_pair(files / "pair").generator, torch.randn(8, 32))
    assert [(row["name"], row["tail_flops"]) for row in rows] == [("input", whole[0].tail_flops), ("output", 0)]


def test_layers_of_another_prior_are_refused_in_words(files):
    with pytest.raises(InputError, match=r"the generator failed.*\(\d+, 5\).*see prior"):
        run("layers", "--pair", files / "pair", "--prior", '{"name": "normal", "shape": [5]}')


def test_layers_takes_the_generators_weights_of_a_file_with_both_networks(files, tmp_path):
    both = {name: torch.load(files / f"{name[-1].lower()}.pt") for name in ("netG", "netD")}
    torch.save(both, tmp_path / "checkpoint.pt")
    code = from_code(files)
    listed = run("layers", *code[:4], "--generator-weights", tmp_path / "checkpoint.pt", "--json")
    assert listed == run("layers", *code[:6], "--json")


class Conditional(nn.Module):
    """(N, 4), (N,) -> (N, 1, 2, 2)."""

    def __init__(self):
        super().__init__()
        self.classes, self.out = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, z, labels):
        return self.out(z + self.classes(labels)).view(-1, 1, 2, 2)


def test_layers_of_a_generator_that_needs_labels_are_listed(tmp_path):
    torch.save(Conditional().state_dict(), tmp_path / "g.pt")
    found = json.loads(run("layers", "--generator", f"{__name__}:Conditional", "--generator-weights", tmp_path / "g.pt",
                           "--prior", '{"name": "normal", "shape": [4]}', "--json"))  # fmt: skip
    assert [row["name"] for row in found] == ["input", "classes", "out", "output"]


# --- shape


def test_shape_takes_the_best_where_it_is_asked_to(files, tmp_path):
    shape(files, tmp_path / "kept", "--pair", "digits", "--take", "best")
    header, *rows = [line.split(",") for line in (tmp_path / "kept" / "curve.csv").read_text().splitlines()]
    at = header.index("held_out_distance")
    assert rows[0][at] == "" and float(rows[-1][at]) > 0


def test_shape_never_writes_over_a_pair_or_a_discriminator(files, tmp_path, monkeypatch):
    monkeypatch.setattr(fr, "shape_discriminator", None)  # nothing is trained before
    before = (files / "pair" / "discriminator.safetensors").read_bytes()
    told = usage_error("shape", "--pair", files / "pair", "--real", "digits", "--outdir", files / "pair")
    assert "holds a pair already; wanted a new or empty --outdir" in told.replace("\n", " ")
    assert (files / "pair" / "discriminator.safetensors").read_bytes() == before
    (tmp_path / "discriminator.safetensors").write_bytes(b"precious")
    told = usage_error("shape", *from_code(files), "--real", "digits", "--outdir", tmp_path)
    assert "holds a discriminator.safetensors already" in told.replace("\n", " ")


@pytest.mark.parametrize("embedded", [False, True])
def test_shaping_a_pair_makes_a_pair(files, tmp_path, embedded):
    source = "digits" if embedded else files / "pair"
    out = shape(files, tmp_path / "shaped", "--pair", source, "--stop", "median")
    told = re.fullmatch("to refine with it: fastrefine refine --pair (.*) --real (.*)", out.splitlines()[-1])
    assert told and told[1] == str(tmp_path / "shaped")
    old, new = fr.load_pair(source), fr.load_pair(tmp_path / "shaped")
    assert isinstance(new.stop, fr.stopping.MedianOfReal) and new.max_steps == 1
    assert repr(old.prior) == repr(new.prior) and old.defaults["at"] == new.defaults["at"]
    for name, equal in (("generator", True), ("discriminator", False)):
        states = [getattr(pair, name).state_dict().values() for pair in (old, new)]
        assert all(map(torch.equal, *states)) == equal


@pytest.mark.parametrize("kind", ["code", "export"])
def test_shaping_two_networks_tells_how_to_use_the_result(files, tmp_path, kind):
    given = from_code(files) if kind == "code" else (*from_code(files)[:6], "--discriminator", files / "d.pt2")
    last = shape(files, tmp_path / "shaped", *given).splitlines()[-1]
    assert f"--discriminator-weights {tmp_path / 'shaped' / 'discriminator.safetensors'}" in last
    assert ("is an export" in last) == (kind == "export")
    code = from_code(files)
    told = (*code[:-1], tmp_path / "shaped" / "discriminator.safetensors")
    run("refine", *told, "--ids", "0-3", "--max-steps", 1, "--outdir", tmp_path / "run")


def test_shaping_without_a_terminal_gives_signs_of_life(files, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrefine.progress.EVERY", 1e9)  # however slow the machine is
    assert "shaping: " not in shape(files, tmp_path / "quick", "--pair", files / "pair")
    monkeypatch.setattr("fastrefine.progress.EVERY", 0.0)
    told = shape(files, tmp_path / "slow", "--pair", files / "pair", iterations=3)
    assert [f"shaping: {k} of 3 iterations" in told for k in range(5)] == [False, True, True, True, False]


@pytest.fixture
def usual_interrupt():
    """SIGINT as Python handles it; a shell may have started the tests with it ignored. SIGTERM, which ends them, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize(("take", "number", "code"), [("last", signal.SIGINT, 130), ("best", signal.SIGTERM, 3)])
def test_the_discriminator_so_far_is_kept_when_shaping_is_stopped(
    files, tmp_path, monkeypatch, usual_interrupt, take, number, code
):  # fmt: skip
    shaping = fr.shape_discriminator

    def stopped(*arguments, callback, **options):
        def told(facts):
            if facts["iteration"] == 1:
                signal.raise_signal(number)
            return callback(facts)

        return shaping(*arguments, callback=told, **options, check_every=1)

    monkeypatch.setattr(fr, "shape_discriminator", stopped)
    command = ("shape", "--pair", files / "pair", "--real", "digits", "--iterations", 5, "--batch-size", 8, "--max-steps", 1,
               "--take", take, "--outdir", tmp_path / "shaped")  # fmt: skip
    done = CliRunner().invoke(cli, list(map(str, command)))
    assert done.exit_code == code and signal.getsignal(signal.SIGINT) is signal.default_int_handler, done.output
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "stopping after this iteration; the same again stops at once" in done.output
    assert "stopped after 2 of 5 iterations; the discriminator so far is kept" in done.output
    assert f"refine --pair {tmp_path / 'shaped'}" in done.output and f"shape --pair {tmp_path / 'shaped'}" in done.output
    assert f"--iterations 3 --outdir {tmp_path / 'shaped2'}" in done.output
    assert "verdict" not in done.output.replace("without a verdict", "")
    assert len((tmp_path / "shaped" / "curve.csv").read_text().splitlines()) == 3
    monkeypatch.setattr(fr, "shape_discriminator", shaping)
    pair = fr.load_pair(tmp_path / "shaped")
    if take == "last":
        shape(files, tmp_path / "two", "--pair", files / "pair", iterations=2)
        wanted = fr.load_pair(tmp_path / "two").discriminator.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in pair.discriminator.state_dict().items())


def test_a_second_interrupt_ends_shaping_at_once(files, tmp_path, monkeypatch, usual_interrupt):
    def stopped(*arguments, **options):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(fr, "shape_discriminator", stopped)
    with pytest.raises(click.Abort):
        run("shape", "--pair", files / "pair", "--real", "digits", "--outdir", tmp_path / "shaped")
    assert not (tmp_path / "shaped").exists()


def test_shaping_tells_means_over_iterations_and_how_long_it_will_take(files, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrefine.progress.EVERY", 0.0)
    out = shape(files, tmp_path / "shaped", "--pair", files / "pair", iterations=20)
    told = re.search(r"real ones from (\S+) to (\S+) \(means of the first and the last 2 of 20 iterations\)", out)
    header, *rows = [line.split(",") for line in (tmp_path / "shaped" / "curve.csv").read_text().splitlines()]
    logits = [float(row[header.index("real_logit")]) for row in rows]
    assert told and [float(x) for x in told.groups()] == pytest.approx([sum(logits[:2]) / 2, sum(logits[-2:]) / 2], abs=6e-4)
    assert out.count("left at the speed of the third iteration") == 1


@pytest.mark.parametrize(("load", "threads", "told"), [(6.1, 2, True), (6.1, 1, False), (2.0, 2, False), (None, 2, False)])
def test_a_busy_machine_and_several_threads_give_a_hint(monkeypatch, capsys, load, threads, told):
    def average():
        if load is None:
            raise OSError
        return load, load, load

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", average)
    hint_when_busy()
    words = "this machine is busy (load 6.1 on 2 cores) and 2 threads are used: OMP_NUM_THREADS=1 may be much faster\n"
    assert capsys.readouterr() == ("", words * told)


@pytest.mark.parametrize("command", ["shape", "check", "evaluate"])
def test_long_commands_ask_whether_the_machine_is_busy(files, tmp_path, monkeypatch, command):
    class Done(Exception):
        pass

    def hint():
        raise Done

    for module in ("models", "production"):
        monkeypatch.setattr(f"fastrefine.cli.{module}.hint_when_busy", hint)
    arguments = {"evaluate": (tmp_path,), "check": ("--pair", "digits")}.get(
        command, ("--pair", "digits", "--outdir", tmp_path / "o")
    )
    with pytest.raises(Done):
        run(command, *arguments, "--real", "digits")


# --- distil


@pytest.mark.parametrize(("at", "kept"), [(1, "map, the discriminator as it was before it"), (3, "map and discriminator")])
def test_what_distil_finished_is_kept_when_it_is_stopped(files, tmp_path, monkeypatch, at, kept):
    calls, shape = [], distil.shape_discriminator

    def stopped(*arguments, **options):
        calls.append(options["iterations"])
        if len(calls) > at:  # the first call only tries what shaping takes
            raise KeyboardInterrupt
        return shape(*arguments, **options)

    monkeypatch.setattr(distil, "shape_discriminator", stopped if at == 1 else shape)
    if at > 1:  # while the pairs of the second round are made
        made = distil.Pairs.made.__func__

        def second(cls, *arguments):
            calls.append(0)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return made(cls, *arguments)

        monkeypatch.setattr(distil.Pairs, "made", classmethod(second))
    flags = ("--real", "digits", "--max-steps", 2, "--pairs", 80, "--rounds", 2, "--iterations", 20, "--shaping-iterations", 2)
    done = CliRunner().invoke(cli, list(map(str, ("distil", "--pair", files / "pair", *flags, "--at", "act2", "--outdir",
                                                  tmp_path / "distilled"))))  # fmt: skip
    assert done.exit_code == 130 and f"stopped; {tmp_path / 'distilled'} holds the pair of round 1" in done.output
    assert kept in done.output
    pair = fr.load_pair(tmp_path / "distilled")
    assert pair.generator.report["rounds"] == 1 and pair.generator.report["shaped"] == (at > 1)
    assert (images.shaped_on(tmp_path / "distilled") is not None) == (at > 1)


def test_distilling_a_pair_makes_a_pair_whose_runs_say_so(files, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrefine.production.evaluation.trained_features.__defaults__", (20, 0))
    flags = ("--real", "digits", "--max-steps", 2, "--pairs", 80, "--iterations", 20, "--samples", 40,
             "--shaping-iterations", 2, "--shaping-batch-size", 16, "--shaping-learning-rate", 1e-3)  # fmt: skip
    out = run("distil", "--pair", files / "pair", *flags, "--at", "act2", "--outdir", tmp_path / "distilled").splitlines()
    out = out[next(i for i, line in enumerate(out) if line.startswith("wrote ")) :]  # progress comes first on a slow machine
    assert out[0].startswith(f"wrote {tmp_path / 'distilled'}") and "features classifier-" in out[1]
    assert [line.split()[0] for line in out[4:]] == ["0", "1", "2", "4"] and "nan" not in "".join(out)
    pair = fr.load_pair(tmp_path / "distilled")
    assert pair.generator.report["pairs"] == 80 and pair.defaults["at"] == "act2"
    before, z = fr.load_pair(files / "pair").discriminator, torch.rand(3, 1, 8, 8)
    assert not torch.equal(pair.discriminator(z), before(z)), "it was shaped on what the map gives"
    assert len(images.shaped_on(tmp_path / "distilled")) > 1000, "and the pair says on which images"
    run("refine", "--pair", tmp_path / "distilled", "--ids", "0-7", "--outdir", tmp_path / "run")
    assert json.dumps(pair.generator.report["sampler"]) in (tmp_path / "run" / "manifest.json").read_text()
    shape(files, tmp_path / "shaped", "--pair", tmp_path / "distilled")
    z = torch.randn(3, 32)
    assert torch.equal(fr.load_pair(tmp_path / "shaped").generator(z), pair.generator(z))
    assert "holds a pair already" in usage_error("distil", "--pair", files / "pair", *flags, "--outdir", tmp_path / "shaped")
    assert "--real is needed" in usage_error("distil", "--pair", "digits", "--outdir", tmp_path / "new")


# --- bench


def test_bench_measures_an_export(files):
    rows = json.loads(run("bench", "--generator", files / "g.pt2", "--discriminator", files / "d.pt2", *NORMAL, "--steps", 1,
                          "--seconds", 0.01, "--slots", 8, "--precisions", "float32", "--json"))  # fmt: skip
    assert [row["at"] for row in rows] == ["input", "output"] and all(row["images_per_second"] > 0 for row in rows)
    for row in rows:
        assert row["ratio_b1"] == row["images_per_second"] / row["b1_images_per_second"] and row["preparation_seconds"] >= 0
        assert any(entry["rung"] == "step recorded" and entry["kept"] for entry in row["ladder"])


def test_bench_says_in_words_how_the_networks_were_prepared(files):
    flags = ("--steps", 1, "--seconds", 0.01, "--slots", 8, "--precisions", "float32")
    told = run("bench", "--pair", files / "pair", "--at", "output", *flags).splitlines()
    assert told[0].split()[:7] == ["at", "precision", "images/s", "B0", "ratio", "B1", "ratio"]
    assert told[1].split()[0] == "output" and told[2].startswith("    prepared in ") and "step recorded" in told[2]


def test_bench_says_which_rung_was_dropped_and_when_a_plain_loop_is_faster():
    ladder = [{"rung": "channels_last", "kept": False, "why": "slower"}, {"rung": "step recorded", "kept": True, "why": ""}]
    row = {"ladder": ladder, "preparation_seconds": 1.26, "ratio_b1": 0.8}
    wanted = "prepared in 1.3 s; used: step recorded; not used: channels_last (slower); here the careful loop, B1, is faster"
    assert bench.prepared(row) == wanted
    assert bench.prepared({**row, "ladder": [], "ratio_b1": 1.2}) == "prepared in 1.3 s; used: plain autograd"


@pytest.mark.parametrize(("flags", "error", "told"), [
    (("--layers", "input,nowhere"), SplitError, "no module named 'nowhere'.*`fastrefine layers` or fastrefine.layers"),
    (("--precisions", "float32,fp8"), InputError, "precision is 'fp8'"),
])  # fmt: skip
def test_bench_checks_everything_before_it_prints_or_measures(files, flags, error, told, monkeypatch, capsys):
    monkeypatch.setattr(bench.Bench, "b0", None)
    done = CliRunner().invoke(cli, ["bench", "--pair", str(files / "pair"), *flags], standalone_mode=False)
    assert done.output == ""
    with pytest.raises(error, match=told):
        raise done.exception


def test_bench_measures_at_the_layer_that_at_names(files):
    flags = ("--steps", 1, "--seconds", 0.01, "--slots", 8, "--precisions", "float32", "--json")
    (row,) = json.loads(run("bench", "--pair", files / "pair", "--at", "output", *flags))
    assert row["at"] == "output"
