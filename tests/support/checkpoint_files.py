"""Writes a small checkout of somebody's networks, and the checkpoints that such a repository writes."""

import importlib
import pickle
import sys
import textwrap

import torch

PERSISTENCE = '''
"""A small copy of the way NVlabs' networks are pickled: the source text of the class goes into the pickle, and runs there."""
import copy, inspect, sys, types

def persistent_class(cls):
    source = sys.modules[cls.__module__].__dict__.get("__source__") or inspect.getsource(sys.modules[cls.__module__])
    class Decorator(cls):
        _orig_module_src, _orig_class_name = source, cls.__name__
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)
        def __reduce__(self):
            state = super().__reduce__()[2]
            return _reconstruct, (dict(source=source, name=cls.__name__, state=state),), None
    Decorator.__name__ = cls.__name__
    return Decorator

def _reconstruct(meta):
    module = types.ModuleType("_imported_" + str(abs(hash(meta["source"]))))
    sys.modules[module.__name__] = module
    module.__dict__["__source__"] = meta["source"]
    exec(meta["source"], module.__dict__)
    made = module.__dict__[meta["name"]]
    own = made.__new__(made)
    own.__dict__.update(meta["state"])
    return own
'''

STYLE = """
import torch
from torch import nn
from {utils} import persistence

@persistence.persistent_class
class Mapping(nn.Module):
    def __init__(self, z_dim, c_dim):
        super().__init__()
        self.layer = nn.Linear(z_dim + c_dim, 8)
    def forward(self, z, c):
        return self.layer(z if c is None else torch.cat([z, c], 1)).relu()

@persistence.persistent_class
class Synthesis(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3 * 8 * 8)
        self.register_buffer("noise", torch.zeros(192))
    def forward(self, w, noise_mode="random", force_fp32=False):
        assert noise_mode in ("random", "const") and force_fp32
        noise = torch.randn(len(w), 192) if noise_mode == "random" else self.noise
        return torch.tanh(self.layer(w) + noise).unflatten(1, (3, 8, 8))

@persistence.persistent_class
class Generator(nn.Module):
    def __init__(self, z_dim, c_dim=0, img_resolution=8):
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.mapping, self.synthesis = Mapping(z_dim, c_dim), Synthesis()
    def forward(self, z, c, **synthesis_kwargs):
        assert (c is None) == (self.c_dim == 0)
        return self.synthesis(self.mapping(z, c), **synthesis_kwargs)

@persistence.persistent_class
class Discriminator(nn.Module):
    def __init__(self, c_dim=0):
        super().__init__()
        self.c_dim = c_dim
        self.layer = nn.Linear(192 + c_dim, 1)
    def forward(self, img, c, force_fp32=False):
        assert force_fp32
        x = img.flatten(1)
        return self.layer(x if c is None else torch.cat([x, c], 1))
"""

BIGGAN = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, G_ch=4, dim_z=6, n_classes=10, G_activation=nn.ReLU(inplace=False), no_optim=False, **kwargs):
        super().__init__()
        self.dim_z, self.n_classes = dim_z, n_classes
        self.shared = nn.Embedding(n_classes, 3)
        self.first, self.last, self.activation = nn.Linear(dim_z + 3, G_ch), nn.Linear(G_ch, 192), G_activation
        if not no_optim:
            self.optim = torch.optim.Adam(self.parameters())
    def forward(self, z, y):
        return torch.tanh(self.last(self.activation(self.first(torch.cat([z, y], 1))))).unflatten(1, (3, 8, 8))

class Discriminator(nn.Module):
    def __init__(self, D_ch=4, n_classes=10, D_activation=nn.ReLU(inplace=False), **kwargs):
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(192, D_ch), nn.Linear(D_ch, 1), D_activation
        self.embed = nn.Embedding(n_classes, D_ch)
        self.optim = torch.optim.Adam(self.parameters())
    def forward(self, x, y=None):
        h = self.activation(self.first(x.flatten(1)))
        return self.last(h) + (self.embed(y) * h).sum(1, keepdim=True)
"""

CONFIG = """
import json, types

class Configurations:
    def __init__(self, file):
        values = json.load(open(file))
        for part in ("DATA", "MODEL", "OPTIMIZATION", "STYLEGAN", "RUN"):
            setattr(self, part, types.SimpleNamespace(**values.get(part, {})))
        self.MODULES = None
"""

MODEL = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, z_dim, classes):
        super().__init__()
        self.layer, self.embedding = nn.Linear(z_dim, 192), nn.Embedding(classes, 192)
    def forward(self, z, label, shared_label=None, eval=False):
        return torch.tanh(self.layer(z) + self.embedding(label)).unflatten(1, (3, 8, 8))

class Discriminator(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer, self.embedding = nn.Linear(192, 1), nn.Embedding(classes, 1)
    def forward(self, x, label, eval=False, adc_fake=False):
        return {"adv_output": (self.layer(x.flatten(1)) + self.embedding(label)).squeeze(1), "label": label}

def load_generator_discriminator(DATA, OPTIMIZATION, MODEL, STYLEGAN, MODULES, RUN, device, logger):
    assert device == "cpu" and not RUN.mixed_precision
    g = Generator(MODEL.z_dim, DATA.num_classes)
    return g, None, None, Discriminator(DATA.num_classes), g, None, None, None
"""


def write(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder


def style_checkout(folder, name):
    """A checkout with ``NAME_training/networks.py``, whose classes are persistent, and ``NAME_utils``."""
    style = STYLE.replace("{utils}", f"{name}_utils")
    # like the real ones it has scripts, which must not be imported
    script = "raise SystemExit('a script was run')\n@persistence.persistent_class\nclass Generator:\n    pass\n"
    content = {f"{name}_utils/persistence.py": PERSISTENCE, f"{name}_training/networks.py": style, "train.py": script}
    return write(folder, content)


def style_pickle(checkout, name, file, c_dim=0):
    """Write a pickle {G, D, G_ema} of that checkout; returns the state dicts of G_ema and D. Forgets the checkout's modules."""
    sys.path.insert(0, str(checkout))
    own = importlib.import_module(f"{name}_training.networks")
    torch.manual_seed(0)
    g, d, ema = own.Generator(z_dim=5, c_dim=c_dim), own.Discriminator(c_dim=c_dim), own.Generator(5, c_dim=c_dim)
    file.write_bytes(pickle.dumps({"training_set_kwargs": {}, "G": g, "D": d, "G_ema": ema, "augment_pipe": None}))
    sys.path.remove(str(checkout))
    forget(name)
    return ema.state_dict(), d.state_dict()


def forget(name):
    """Forget the modules whose names begin like this."""
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


class Bomb:
    """Writes the number of its process into a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"import os; open({str(self.path)!r}, 'w').write(str(os.getpid()))",)


def malicious(file, trace):
    """A pickle that looks like {G, D, G_ema} and runs code."""
    file.write_bytes(pickle.dumps({"G": Bomb(trace), "D": torch.nn.Linear(2, 1), "G_ema": torch.nn.Linear(3, 2)}))
    return file
