"""Runs that every driver must serve alike, on the stand-in and on a GPU."""

import torch

import fastrefine as fr

RUNS = {
    "uniform": (dict(), dict(n=60)),
    "fixed": (dict(stop=None), dict(n=60)),
    "fixed, whole blocks": (dict(stop=None), dict(n=64)),
    "hazard": (dict(stop=fr.stopping.Hazard(0.4), max_steps=40), dict(n=160, seed=2**63)),
    "threshold": (dict(stop=0.1, max_steps=30), dict(n=90, first_id=13)),
    "all pass at once": (dict(stop=-1e9), dict(n=200)),
    "no steps": (dict(max_steps=0, stop=None), dict(n=50)),
    "one sample": (dict(), dict(n=1)),
    "fewer than slots": (dict(stop=None), dict(n=5, first_id=6)),
    "best": (dict(keep="best", sampler=fr.DGflow(0.1, gamma=1.0)), dict(n=60)),
    "noise": (dict(sampler=fr.DGflow(0.1, gamma=0.1), stop=None), dict(n=60)),
    "adam": (dict(sampler=fr.Collaborative(0.1, optimizer="adam"), max_grad_norm=0.1), dict(n=60)),
    "float64": (dict(precision="float64"), dict(n=60)),
    "bfloat16": (dict(precision="bfloat16"), dict(n=60)),
    "lockstep": (dict(coupling="lockstep"), dict(n=61, first_id=3)),
    "many slots": (dict(num_slots=33), dict(n=250)),
    "snapshots": (dict(stop=None), dict(n=60, snapshots=(0, 2, 5))),
    "snapshots of the best": (dict(keep="best"), dict(n=60, first_id=3, snapshots=(1, 4))),
    "ddls": (dict(at="input", stop=None, sampler=fr.DDLS((0.1, 0.05), 0.5)), dict(n=60)),
    "mala": (dict(at="input", stop=None, sampler=fr.MALA(0.5, adapt=3)), dict(n=60, snapshots=(2,))),
    "hmc": (dict(at="input", stop=None, max_steps=6, sampler=fr.HMC(0.5, leapfrog=3)), dict(n=60)),
    "dot": (dict(at="input", prior=fr.Uniform(4), sampler=fr.DOT(0.1)), dict(n=60)),
}


class Marks(torch.nn.Module):
    """A discriminator with coordinates that it makes anew at every call."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x):
        return self.d(x * torch.linspace(0.5, 1.5, x.shape[1]).to(x.device))
