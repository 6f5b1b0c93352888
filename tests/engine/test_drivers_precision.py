"""TF32 and deterministic algorithms: what they change, and what must not depend on them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrefine as fr
from benchmarks.workloads import WORKLOADS
from fastrefine.networks import torch_state
from fastrefine.production import bench
from tests.support.refiners import pair, refiner

aten = torch.ops.aten


def rounded(t):
    """To the 10 bits of mantissa that TF32 multiplies."""
    if t.dtype != torch.float32:
        return t
    bits = t.view(torch.int32)  # of the same strides
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Convolutions and their gradients as on a GPU, where torch's switch allows TF32."""

    factors = {aten.convolution.default: 2, aten.convolution_backward.default: 3}  # noqa: RUF012

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.factors and torch.backends.cudnn.conv.fp32_precision == "tf32":
            n = self.factors[func]
            args = (*map(rounded, args[:n]), *args[n:])
        return func(*args, **(kwargs or {}))


def test_tf32_is_prepared_as_float32_is():
    """Verified in TF32, a fold differs from the exact networks by more than formulas may: BatchNorms stayed unfolded."""
    workload, prepared = WORKLOADS["dcgan16"], {}
    with Tf32():
        for precision in ("float32", "tf32"):
            one = refiner(workload.pair(), prior=fr.Normal(32), at=workload.cuts["first"], precision=precision, max_steps=1)
            one.sample(4)
            prepared[precision] = one._networks.target.folded, one._networks.target.route, one._networks.target.channels_last
    assert prepared["float32"] == prepared["tf32"] == (2, "flat", True)


def test_deterministic_algorithms_are_left_alone_unless_asked_for(monkeypatch):
    asked, original = [], torch.use_deterministic_algorithms
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **own: (asked.append(on), original(on, **own)))
    with torch_state.arithmetic("tf32", False):
        pass
    assert asked == []
    with torch_state.arithmetic("tf32", True):
        assert torch.are_deterministic_algorithms_enabled()
    assert asked == [True, False]


def test_the_usual_loop_is_timed_in_float32(monkeypatch):
    seen, original = set(), bench._loop

    def loop(*given):
        seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision))
        return original(*given)

    monkeypatch.setattr(bench, "_loop", loop)
    bench.Bench(refiner(pair()), 1, 0.01).b0("input")
    assert seen == {(False, "ieee")}


def test_the_careful_loop_of_bench_has_frozen_and_folded_networks_that_give_the_same():
    generator, discriminator = WORKLOADS["dcgan16"].pair()
    made = fr.Refiner(generator, discriminator, fr.Collaborative(0.1), at="2", prior=fr.Normal(32))
    g, d = bench.Bench(made, 1, 0.01)._frozen("2")
    z = torch.randn(3, 32)
    torch.testing.assert_close(g(z), generator(z), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(d(g(z)), discriminator(generator(z)), rtol=1e-3, atol=1e-5)
    norms = [[m for m in n.modules() if isinstance(m, torch.nn.BatchNorm2d)] for n in (generator, g, d)]
    assert 0 < len(norms[1]) < len(norms[0]) and not norms[2]  # what ends before the place stays
    assert not any(p.requires_grad for n in (g, d) for p in n.parameters())
