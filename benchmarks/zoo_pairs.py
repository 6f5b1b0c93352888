"""Pairs that are measured as their authors wrote them: how each is imported from a checkout, sized, called and cut.

Nothing of their code is here. A checkout is a folder named ``owner+name`` or ``name``. Weights are random, sizes small.
``OURS`` are the networks of ``fastrefine.models``, which need no checkout.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import models

Networks = tuple[nn.Module, nn.Module]


def called(network: nn.Module, *given: Tensor, **inputs: Tensor) -> Tensor:
    """A network that is called with all that there is, in this order."""
    return network(*given, *inputs.values())


def first(found: Any) -> Tensor:
    """The first tensor of a nested list or tuple."""
    return first(found[0]) if isinstance(found, (tuple, list)) else found


@dataclass(frozen=True)
class ZooPair:
    """A pair of a checkout. make: its modules and classes as ``load`` finds them -> (generator, discriminator).

    latent: shape of a latent, or of the image or sound that is translated. place: an inner module. classes: 0 without labels.
    absent: packages that the files
    import and that this pair does not need: an empty stand-in takes their place where they are not installed.
    bare: packages and modules of the checkout whose own code is not run, for it imports everything.
    """

    name: str
    checkout: str
    latent: tuple[int, ...]
    place: str
    make: Callable[[Path], Networks]
    generate: Callable[..., Tensor] = called
    discriminate: Callable[..., Tensor] = called
    classes: int = 0
    output: str = "logit"  # or "probability", as Refiner(discriminator_output=) takes it
    absent: Sequence[str] = ()
    bare: Sequence[str] = ()
    coupling: str = "refuse"  # as Refiner takes it; where it is another, the loops do not compute the same
    root: str = "."  # the folder of the checkout that its own imports start from

    def load(self, zoo: Path | None) -> Networks:
        """(generator, discriminator) in eval mode, weights of seed 0; FileNotFoundError without the checkout.

        After 15 forward passes in training mode, for spectral norms that iterate and batch statistics that settle there.
        """
        folder = checkout_of(zoo, self.checkout) if self.checkout else Path()
        with torch.random.fork_rng(), imports(folder / self.root, self.absent, self.bare) if self.checkout else nothing():
            torch.manual_seed(0)
            generator, discriminator = self.make(folder)
            z, given = self.latents(16), self.labels(16)
            with torch.no_grad():
                for _ in range(15):
                    self.discriminate(discriminator, self.generate(generator, z, **given), **given)
        return generator.eval(), discriminator.eval()

    def logits(self, discriminator: nn.Module, images: Tensor, **inputs: Tensor) -> Tensor:
        """What ``discriminate`` gives, as logits."""
        found = self.discriminate(discriminator, images, **inputs)
        return torch.logit(found) if self.output == "probability" else found

    def latents(self, n: int) -> Tensor:
        """(n, *latent) normal numbers."""
        return torch.randn(n, *self.latent, generator=torch.Generator().manual_seed(1))

    def labels(self, n: int) -> dict[str, Tensor]:
        """{"labels": (n,)} where the pair takes them."""
        return {"labels": torch.arange(n) % self.classes} if self.classes else {}


nothing = contextlib.nullcontext


def checkout_of(zoo: Path | None, name: str) -> Path:
    """The folder of a checkout: ``owner+name`` or ``name``."""
    if zoo is not None:
        for folder in (zoo / name, zoo / name.partition("+")[2]):
            if folder.is_dir():
                return folder
    raise FileNotFoundError(f"no checkout {name} in {zoo}")


class _StandIn(types.ModuleType):
    """A module whose every name is an empty class."""

    __version__ = "0"

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: makes stand-ins of packages that are not installed."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = any(name == own or name.startswith(f"{own}.") for own in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        found = _StandIn(spec.name)
        if spec.name == "pkg_resources":  # setuptools dropped it
            found.parse_version = importlib.import_module("packaging.version").parse  # type: ignore[attr-defined]
        return found

    def exec_module(self, module: types.ModuleType) -> None:
        pass


forgotten: dict[str, types.ModuleType] = {}  # by the last of ``imports``


@contextlib.contextmanager
def known_again() -> Iterator[None]:
    """The modules that were forgotten last have their names: torch.compile looks for them."""
    modules = dict(forgotten)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def imports(folder: Path, absent: Sequence[str] = (), bare: Sequence[str] = ()) -> Iterator[None]:
    """Imports start from a folder; afterwards the modules that came are forgotten, for checkouts use the same names."""
    forgotten.clear()
    before, path, finder = set(sys.modules), list(sys.path), _StandIns(absent)
    sys.path.insert(0, str(folder))
    sys.meta_path.append(finder)
    for name in bare:
        package = _StandIn(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    try:
        yield
    finally:
        sys.path[:] = path
        sys.meta_path.remove(finder)
        roots = str(folder.resolve())
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
            if isinstance(module, _StandIn) or any(str(Path(place).resolve()).startswith(roots) for place in places):
                forgotten[name] = sys.modules.pop(name)


def classes_of(path: Path, **names: Any) -> types.SimpleNamespace:
    """The classes and functions of a training script, without running it. names: the script's globals that they read."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    space = {
        "__name__": path.stem,
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "np": importlib.import_module("numpy"),
        **names,
    }
    exec(compile(tree, str(path), "exec"), space)
    return types.SimpleNamespace(**space)


def _examples(folder: Path) -> Networks:
    own = classes_of(folder / "dcgan" / "main.py", nz=32, ngf=16, ndf=16, nc=3)
    return own.Generator(1), own.Discriminator(1)


def _pytorch_gan(name: str, folder: Path) -> Networks:
    shape = (1, 32, 32)
    options = types.SimpleNamespace(latent_dim=100, img_size=32, channels=1, n_classes=10)
    own = classes_of(folder / "implementations" / name / f"{name}.py", opt=options, img_shape=shape)
    return own.Generator(), own.Discriminator()


def _mimicry(folder: Path) -> Networks:
    own: Any = importlib.import_module("torch_mimicry.nets.sngan")
    return own.SNGANGenerator32(nz=32, ngf=32), own.SNGANDiscriminator32(ndf=32)


def _stylegan2(folder: Path, deviation: int = 0) -> Networks:
    """deviation: channels of D's minibatch standard deviation."""
    own: Any = importlib.import_module("training.networks")
    sizes = {"channel_base": 1024, "channel_max": 32, "num_fp16_res": 0}
    generator = own.Generator(32, 0, 32, 32, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=sizes)
    return generator, own.Discriminator(0, 32, 3, epilogue_kwargs={"mbstd_num_channels": deviation}, **sizes)


def _stylegan3(folder: Path) -> Networks:
    g: Any = importlib.import_module("training.networks_stylegan3")
    d: Any = importlib.import_module("training.networks_stylegan2")
    sizes = {"channel_base": 256, "channel_max": 16, "num_fp16_res": 0}
    generator = g.Generator(16, 0, 16, 16, 3, mapping_kwargs={"num_layers": 2}, num_layers=4, num_critical=1, **sizes)
    return generator, d.Discriminator(0, 16, 3, epilogue_kwargs={"mbstd_num_channels": 0}, **sizes)


def _rosinality(folder: Path) -> Networks:
    from torch.utils import cpp_extension

    load, cpp_extension.load = cpp_extension.load, lambda *_, **__: None  # its CUDA kernels are not for a CPU
    try:
        own: Any = importlib.import_module("model")
    finally:
        cpp_extension.load = load
    generator, discriminator = own.Generator(8, 16, 2, channel_multiplier=1), own.Discriminator(8, channel_multiplier=1)
    discriminator.stddev_group = 1  # no statistics over the batch
    return generator, discriminator


def _biggan(folder: Path) -> Networks:
    own: Any = importlib.import_module("BigGAN")
    sizes = {"resolution": 32, "n_classes": 5, "SN_eps": 1e-6}
    generator = own.Generator(
        G_ch=16, dim_z=16, G_attn="16", BN_eps=1e-5, G_shared=True, shared_dim=8, hier=False, G_init="N02", **sizes
    )
    for module in generator.modules():
        if hasattr(module, "stored_var"):
            module.stored_var.uniform_(0.5, 1.5)
    return generator, own.Discriminator(D_ch=16, D_attn="16", D_init="N02", **sizes)


def _studiogan(folder: Path) -> Networks:
    misc: Any = importlib.import_module("utils.misc")
    misc.dummy_context_mgr = contextlib.nullcontext
    ops: Any = importlib.import_module("utils.ops")
    own: Any = importlib.import_module("models.resnet")
    made = types.SimpleNamespace(
        g_linear=ops.snlinear, g_conv2d=ops.snconv2d, g_bn=ops.ConditionalBatchNorm2d, g_act_fn=nn.ReLU(inplace=True),
        d_linear=ops.snlinear, d_conv2d=ops.snconv2d, d_embedding=ops.sn_embedding, d_bn=ops.batchnorm_2d,
        d_act_fn=nn.ReLU(inplace=True),
    )  # fmt: skip
    options = types.SimpleNamespace(
        info_type="N/A", g_info_injection="N/A", info_num_discrete_c=0, info_dim_discrete_c=0, info_num_conti_c=0
    )
    generator = own.Generator(16, "N/A", 32, 16, True, [2], "cBN", 5, "ortho", "N/A", False, made, options)
    return generator, own.Discriminator(
        32, 16, True, True, [1], "PD", "W/O", "N/A", False, 5, "ortho", "N/A", False, made, options
    )


def _basicsr(folder: Path) -> Networks:
    g: Any = importlib.import_module("basicsr.archs.rrdbnet_arch")
    d: Any = importlib.import_module("basicsr.archs.discriminator_arch")
    return g.RRDBNet(3, 3, num_feat=16, num_block=2, num_grow_ch=8), d.UNetDiscriminatorSN(3, num_feat=16)


def _cyclegan(folder: Path) -> Networks:
    own: Any = importlib.import_module("models")
    return own.Generator(3, 3, 1), own.Discriminator(3)


def _timegan(folder: Path) -> Networks:
    own: Any = importlib.import_module("timegan")
    options = types.SimpleNamespace(
        feature_dim=8, Z_dim=8, hidden_dim=24, num_layers=2, padding_value=-1.0, max_seq_len=12, device="cpu"
    )
    return own.GeneratorNetwork(options), own.DiscriminatorNetwork(options)


def _hifigan(folder: Path) -> Networks:
    own: Any = importlib.import_module("models")
    options = types.SimpleNamespace(
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]], upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        upsample_initial_channel=16, resblock="1",
    )  # fmt: skip
    return own.Generator(options), own.MultiPeriodDiscriminator().discriminators[0]


def _lengths(x: Tensor) -> Tensor:
    return torch.full((len(x),), 12)


TRAINING = (
    "torchvision",
    "tensorboard",
    "torch.utils.tensorboard",
    "cv2",
    "lmdb",
    "requests",
    "skimage",
    "tensorflow",
    "wandb",
)
PUBLIC = (
    ZooPair("examples dcgan", "pytorch+examples", (32, 1, 1), "main.5", _examples, output="probability"),
    ZooPair(
        "PyTorch-GAN dcgan", "eriklindernoren+PyTorch-GAN", (100,), "conv_blocks.2", functools.partial(_pytorch_gan, "dcgan"),
        output="probability",
    ),
    ZooPair(
        "PyTorch-GAN cgan", "eriklindernoren+PyTorch-GAN", (100,), "model.5", functools.partial(_pytorch_gan, "cgan"),
        classes=10,
    ),
    ZooPair(
        "PyTorch-GAN wgan_gp", "eriklindernoren+PyTorch-GAN", (100,), "model.5", functools.partial(_pytorch_gan, "wgan_gp")
    ),
    ZooPair(
        "mimicry sngan", "kwotsin+mimicry", (32,), "block3", _mimicry, absent=TRAINING,
        bare=("torch_mimicry", "torch_mimicry.nets"),
    ),
    ZooPair(
        "rosinality stylegan2", "rosinality+stylegan2-pytorch", (16,), "conv1", _rosinality,
        lambda G, z: G([z], randomize_noise=False)[0],
    ),
    ZooPair(
        "stylegan2-ada", "NVlabs+stylegan2-ada-pytorch", (32,), "synthesis.b8", _stylegan2,
        lambda G, z: G(z, None, noise_mode="const"), lambda D, x: D(x, None), absent=("pkg_resources", "requests"),
    ),
    ZooPair(
        "stylegan2-ada, deviation held", "NVlabs+stylegan2-ada-pytorch", (32,), "synthesis.b8",
        functools.partial(_stylegan2, deviation=1), lambda G, z: G(z, None, noise_mode="const"), lambda D, x: D(x, None),
        absent=("pkg_resources", "requests"), coupling="freeze",
    ),
    ZooPair(
        "stylegan3", "NVlabs+stylegan3", (16,), "synthesis.L1_36_16", _stylegan3, lambda G, z: G(z, None),
        lambda D, x: D(x, None), absent=("pkg_resources", "requests"),
    ),
    ZooPair(
        "BigGAN", "ajbrock+BigGAN-PyTorch", (16,), "blocks.1.0", _biggan, lambda G, z, labels: G(z, G.shared(labels)),
        classes=5, absent=TRAINING,
    ),
    ZooPair(
        "StudioGAN", "POSTECH-CVLab+PyTorch-StudioGAN", (16,), "blocks.1.0", _studiogan,
        discriminate=lambda D, x, labels: D(x, labels)["adv_output"], classes=5, root="src",
        absent=(*TRAINING, "torchlars", "kornia"), bare=("utils.sample", "utils.misc", "utils.losses", "utils.ckpt"),
    ),
    ZooPair(
        "BasicSR esrgan", "XPixelGroup+BasicSR", (3, 8, 8), "body.0", _basicsr,
        absent=TRAINING, bare=("basicsr", "basicsr.archs", "basicsr.utils", "basicsr.ops", "basicsr.ops.dcn"),
    ),
    ZooPair("CycleGAN", "aitorzip+PyTorch-CycleGAN", (3, 32, 32), "model.10", _cyclegan),
    ZooPair(
        "hifi-gan, one head", "jik876+hifi-gan", (80, 16), "ups.1", _hifigan,
        discriminate=lambda D, x: D(x)[0].mean(1), absent=("librosa", *TRAINING),
    ),
    ZooPair(
        "timegan", "birdx0810+timegan-pytorch", (12, 8), "gen_linear", _timegan, lambda G, z: G(z, _lengths(z)),
        lambda D, x: D(x, _lengths(x)).mean(1), root="models",
    ),
)  # fmt: skip


def _mine(make: Callable[[], Networks]) -> Callable[[Path], Networks]:
    return lambda _: make()


OURS = (
    ZooPair("mlp2d", "", (2,), "3", _mine(lambda: (models.mlp_generator(), models.mlp_discriminator()))),
    ZooPair(
        "dcgan16", "", (32,), "2", _mine(lambda: (models.dcgan_generator(16, 32, 32), models.dcgan_discriminator(16, 32)))
    ),
    ZooPair(
        "sngan32, a quarter as wide", "", (128,), "blocks.0",
        _mine(lambda: (models.SNGANGenerator(features=64), models.SNGANDiscriminator(features=32))),
    ),
    ZooPair(
        "stylegan2 16x16", "", (32,), "layers.1",
        _mine(lambda: (models.StyleGAN2Generator(16, 32, 32, 8, 32, 2), models.StyleGAN2Discriminator(16, 8, 32, 0))),
    ),
    ZooPair(
        "cyclegan 32x32", "", (3, 32, 32), "blocks.0",
        _mine(lambda: (models.CycleGANGenerator(16, 2), models.patchgan_discriminator(16, 2))),
    ),
)  # fmt: skip
