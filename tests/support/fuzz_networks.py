"""A grammar of networks as people write them: small random generators and discriminators, by seed.

A block is a function (rng, shape) -> (module, shape after it), or None where it does not fit; shapes are those of one sample.
"""

import math
import random
import threading
from collections import namedtuple
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES, LATENT = 3, 6


class Do(nn.Module):
    """A function of (self, x), or of (self, x, labels), with parts."""

    def __init__(self, function, takes="", buffers=(), plain=(), **parts):
        super().__init__()
        self.function, self.takes = function, takes
        for name, part in parts.items():
            if name in buffers:
                self.register_buffer(name, part)
            elif isinstance(part, torch.Tensor) and name not in plain:
                self.register_parameter(name, nn.Parameter(part))
            else:
                setattr(self, name, part)

    def forward(self, x, *given):
        return self.function(self, x, *given)


def noise(*shape, scale=1.0):
    return torch.randn(*shape) * scale / math.sqrt(max(math.prod(shape[1:]), 1))


def flat(shape):
    return len(shape) == 1


def conv_of(rank, transposed=False):
    """The layer for shapes of this many dimensions, channels included."""
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank - 1}d")


# What any shape may go through.


def chunk_split_cat(rng, shape):
    if shape[0] % 2:
        return None

    def run(self, x):
        a, b = x.chunk(2, 1)
        c, d = torch.split(torch.cat([b, a.tanh()], 1), [1, x.shape[1] - 1], dim=1)
        return torch.cat((d, c + 0.5), dim=1)

    return Do(run), shape


def view_as_rows(rng, shape):
    width = math.prod(shape)
    return Do(lambda self, x: self.linear(x.view(x.size(0), -1)), linear=nn.Linear(width, 12)), (12,)


def permute_and_reshape(rng, shape):
    order = list(range(1, len(shape) + 1))
    rng.shuffle(order)
    return Do(lambda self, x: x.permute(0, *order).contiguous().reshape(x.shape)), shape


def transposed_twice(rng, shape):
    return Do(lambda self, x: (x.transpose(0, 1) * 1.5).transpose(1, 0).sin()), shape


def in_place_relu(rng, shape):
    return Do(lambda self, x: (x * 1.3 + 0.1).relu_()), shape


def in_place_leaky(rng, shape):
    return nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.LeakyReLU(0.2, inplace=True)), shape


def in_place_sum(rng, shape):
    def run(self, x):
        out = self.linear(x)
        out += x
        out.mul_(1.2)
        return out

    return Do(run, linear=nn.Linear(shape[-1], shape[-1])), shape


def in_place_on_view(rng, shape):
    def run(self, x):
        out = x.clone()
        out[:, :1] += x[:, -1:].sigmoid()
        out.view(out.size(0), -1)[:, 0].mul_(0.5)
        return out

    return Do(run), shape


def scalar_buffer(rng, shape):
    return Do(
        lambda self, x: x * self.gain + self.shift, buffers=("gain", "shift"), gain=torch.tensor(1.3), shift=torch.ones(())
    ), shape


def computed_buffer(rng, shape):
    return Do(lambda self, x: x * self.wave, buffers=("wave",), wave=torch.linspace(0.5, 1.5, shape[-1])), shape


def kept_tensor(rng, shape):
    def run(self, x):
        self.kept = x.sigmoid()
        return self.kept * x

    return Do(run), shape


def kept_in_a_dict(rng, shape):
    def run(self, x):
        self.store["last"] = x * 2
        self.list.append(x.tanh())
        return self.store["last"] - self.list.pop()

    return Do(run, store={}, list=[]), shape


def computed_attribute(rng, shape):
    base = torch.rand(1) + 0.5
    made = Do(lambda self, x: x * self.scale, base=base)
    made.scale = made.base.exp()
    return made, shape


def computed_in_a_list(rng, shape):
    base = nn.Parameter(torch.rand(2) + 0.5)
    return Do(lambda self, x: x * self.scales[0] + self.scales[1], base=base, scales=list((base * 0.7).unbind())), shape


def uncopyable_attribute(rng, shape):
    return Do(lambda self, x: self.library.tanh(x), library=torch, lock=threading.Lock()), shape


def unregistered_modules(rng, shape):
    parts = [nn.PReLU(), nn.PReLU()]
    return Do(lambda self, x: self.parts[1](self.parts[0](x) - 0.1), parts=tuple(parts)), shape


def tied_weights(rng, shape):
    one = nn.Linear(shape[-1], shape[-1])
    return nn.Sequential(one, nn.Tanh(), one), shape


def pixel_norm(rng, shape):
    return Do(lambda self, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-4)), shape


def layer_norm(rng, shape):
    norm = nn.LayerNorm(list(shape))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    return norm, shape


def einsum(rng, shape):
    weight = noise(shape[0], shape[0])
    return Do(lambda self, x: torch.einsum("nc...,cd->nd...", x, self.weight) + x, weight=weight), shape


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        ctx.save_for_backward(x)
        return torch.where(x > 0, x, x * scale)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, grad, grad * ctx.scale), None


class _NewStyle(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sinh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cosh()


def autograd_function(rng, shape):
    if rng.random() < 0.5:
        return Do(lambda self, x: _NewStyle.apply(x.clamp(-2, 2))), shape
    return Do(lambda self, x: _Round.apply(x, 0.3)), shape


def functional_call(rng, shape):
    inner = nn.Linear(shape[-1], shape[-1])
    parameters = {"weight": noise(shape[-1], shape[-1]), "bias": noise(1, shape[-1])[0]}

    def run(self, x):
        return torch.func.functional_call(self.inner, {**dict(self.inner.named_parameters()), **self.other}, (x,))

    return Do(run, inner=inner, other=parameters), shape


def checkpointed(rng, shape):
    inner = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh())
    return Do(lambda self, x: checkpoint(self.inner, x, use_reentrant=False), inner=inner), shape


def checkpointed_reentrant(rng, shape):
    inner = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh())
    return Do(lambda self, x: checkpoint(self.inner, x, use_reentrant=True), inner=inner), shape


def gradient_inside(rng, shape):
    def run(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (grad,) = torch.autograd.grad((self.inner(x).tanh() ** 2).sum(), x, create_graph=True)
        return x - 0.5 * grad

    return Do(run, inner=nn.Linear(shape[-1], shape[-1])), shape


def vmapped(rng, shape):
    inner = nn.Linear(shape[-1], shape[-1])
    return Do(lambda self, x: torch.func.vmap(lambda row: self.inner(row).tanh() + row)(x), inner=inner), shape


def stopped_gradient(rng, shape):
    def run(self, x):
        with torch.no_grad():
            scale = x.detach().flatten(1).std(1, unbiased=False) + 0.5
        return x / scale.view(-1, *[1] * (x.dim() - 1))

    return Do(run), shape


def branch_for_each_sample(rng, shape):
    def run(self, x):
        return torch.stack([row * 2 if row.mean() > 0 else row * 0.5 for row in x])

    return Do(run), shape


def branch_on_values(rng, shape):
    return Do(lambda self, x: x.tanh() if bool(x.abs().max() < 1e6) else x), shape


def masked_assignment(rng, shape):
    def run(self, x):
        out = x * 1.0
        out[x > 0.3] = x[x > 0.3] * 0.5 + 0.15
        return out

    return Do(run), shape


def branch_on_sizes(rng, shape):
    def run(self, x):
        n, *rest = x.shape
        assert n > 0 and rest == list(shape)
        if n % 2 == 0:
            return x.reshape(n // 2, 2, *rest).flatten(0, 1).cos()
        return x.cos()

    return Do(run), shape


def even_batch(rng, shape):
    def run(self, x):
        assert x.size(0) % 2 == 0, "pairs of samples"
        return x.view(x.size(0) // 2, 2, *x.shape[1:]).atan().view(x.shape)

    return Do(run), shape


def at_least_two(rng, shape):
    def run(self, x):
        if len(x) < 2:
            raise ValueError("Expected more than 1 value per channel")
        return x.squeeze() * 0.9 + 0.1

    return Do(run), shape


def half_inside(rng, shape):
    inner = nn.Linear(shape[-1], shape[-1])
    if rng.random() < 0.5:
        inner = inner.to(torch.bfloat16)
        return Do(lambda self, x: self.inner(x.to(torch.bfloat16)).float() + x, inner=inner), shape

    def run(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float() + x

    return Do(run, inner=inner), shape


def float64_inside(rng, shape):
    return Do(lambda self, x: (x.double().cumsum(-1) / x.shape[-1]).float() + x), shape


def running_state(rng, shape):
    def run(self, x):
        if self.training:
            with torch.no_grad():
                self.average.copy_(x.mean())
        return x - self.average.lerp(x.detach().mean(), 0.0)

    return Do(run, buffers=("average",), average=torch.tensor(0.2)), shape


def sample_statistics(rng, shape):
    def run(self, x):
        low, high = x.flatten(1).min(1).values, x.flatten(1).amax(1)
        shaped = (-1, *[1] * (x.dim() - 1))
        return (x - low.view(shaped)) / (high - low + 0.1).view(shaped)

    return Do(run), shape


def sorted_and_gathered(rng, shape):
    def run(self, x):
        values, order = x.sort(dim=-1)
        return values * 0.5 + x.gather(-1, order.flip(-1))

    return Do(run), shape


def drop_out(rng, shape):
    return nn.Sequential(nn.Dropout(0.5), Do(lambda self, x: F.dropout(x, 0.5, self.training) * 1.1)), shape


def residual(rng, shape):
    inner = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.SiLU())
    return Do(lambda self, x: (x + self.inner(x)) / math.sqrt(2), inner=inner), shape


def weight_hook(rng, shape):
    """An equalised learning rate by a pre-forward hook, as progressive GANs have it."""
    layer = nn.Linear(shape[-1], shape[-1])
    layer.register_parameter("weight_orig", nn.Parameter(layer.weight.detach().clone() * 2))
    del layer._parameters["weight"]
    layer.weight = layer.weight_orig.detach() * 0.7
    layer.register_forward_pre_hook(_equalise)
    return layer, shape


def _equalise(module, args):
    module.weight = module.weight_orig * 0.7


def forward_hook(rng, shape):
    layer = nn.Linear(shape[-1], shape[-1])
    layer.register_forward_hook(_add_input)
    return layer, shape


def _add_input(module, args, output):
    return output * 0.5 + args[0]


# Rows.


def old_spectral_norm(rng, shape):
    return (torch.nn.utils.spectral_norm(nn.Linear(shape[-1], shape[-1])), shape)


def new_spectral_norm(rng, shape):
    return (parametrizations.spectral_norm(nn.Linear(shape[-1], shape[-1])), shape)


def old_weight_norm(rng, shape):
    return torch.nn.utils.weight_norm(nn.Linear(shape[-1], shape[-1])), shape


def new_weight_norm(rng, shape):
    return parametrizations.weight_norm(nn.Linear(shape[-1], shape[-1])), shape


def weight_normalised_inside(rng, shape):
    weight = torch.randn(shape[-1], shape[-1])
    return Do(
        lambda self, x: F.linear(x, self.weight / self.weight.view(len(self.weight), -1).norm() * 2), weight=weight
    ), shape


def wide_bias(rng, shape):
    if not flat(shape):
        return None
    width = shape[0]
    return Do(lambda self, x: torch.addmm(self.bias, x, self.weight), bias=noise(1, 12), weight=noise(width, 12)), (12,)


def batch_norm(rng, shape):
    norm = [None, nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(shape)](shape[0])
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
    before = nn.Linear(shape[0], shape[0]) if flat(shape) else conv_of(len(shape))(shape[0], shape[0], 1)
    return nn.Sequential(before, norm, nn.ReLU(inplace=True)), shape


def batch_norm_inline(rng, shape):
    def run(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, None, self.training, 0.1, 1e-5)

    buffers = {"mean": torch.randn(shape[0]) * 0.2, "var": torch.rand(shape[0]) + 0.5}
    return Do(run, buffers=tuple(buffers), weight=torch.rand(shape[0]) + 0.5, **buffers), shape


def multi_head_attention(rng, shape):
    if not flat(shape) or shape[0] % 4:
        return None
    attention = nn.MultiheadAttention(4, rng.choice([1, 2]), batch_first=True)

    def run(self, x):
        tokens = x.view(x.size(0), -1, 4)
        return (tokens + self.attention(tokens, tokens, tokens, need_weights=rng_weights)[0]).flatten(1)

    rng_weights = rng.random() < 0.5
    return Do(run, attention=attention), shape


def transformer_layer(rng, shape):
    if not flat(shape) or shape[0] % 4:
        return None
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=rng.random() < 0.5)
    return Do(lambda self, x: self.layer(x.view(x.size(0), -1, 4)).reshape(x.shape), layer=layer), shape


def scaled_dot_product(rng, shape):
    if not flat(shape) or shape[0] % 4:
        return None

    def run(self, x):
        q, k, v = self.qkv(x.view(x.size(0), -1, 1, 4).transpose(1, 2)).chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(q, k, v).reshape(x.shape)

    return Do(run, qkv=nn.Linear(4, 12)), shape


def recurrent(kind):
    def make(rng, shape):
        if not flat(shape) or shape[0] % 3:
            return None
        layer = getattr(nn, kind)(3, 3, num_layers=rng.choice([1, 2]), batch_first=True, bidirectional=False)

        def run(self, x):
            found, state = self.layer(x.view(x.size(0), -1, 3))
            last = state[0] if isinstance(state, tuple) else state
            return found.reshape(x.shape) + last[-1].repeat(1, x.shape[1] // 3)

        return Do(run, layer=layer), shape

    return make


def cell(kind):
    def make(rng, shape):
        if not flat(shape) or shape[0] % 3:
            return None

        def run(self, x):
            state, found = None, []
            for step in x.view(x.size(0), -1, 3).unbind(1):
                state = self.layer(step, state)
                found.append(state[0] if isinstance(state, tuple) else state)
            return torch.cat(found, 1)

        return Do(run, layer=getattr(nn, kind)(3, 3)), shape

    return make


def to_picture(rng, shape):
    if not flat(shape):
        return None
    return nn.Sequential(nn.Linear(shape[0], 64), nn.Unflatten(1, (4, 4, 4))), (4, 4, 4)


# Channels and places.


def conv(rng, shape):
    if flat(shape):
        return None
    return conv_of(len(shape))(shape[0], shape[0], 3, padding=1, padding_mode=rng.choice(["zeros", "circular"])), shape


def grouped_conv(rng, shape):
    if flat(shape) or shape[0] % 2:
        return None
    return conv_of(len(shape))(shape[0], shape[0], 3, padding=1, groups=2), shape


def depthwise_conv(rng, shape):
    if flat(shape):
        return None
    one = conv_of(len(shape))
    return nn.Sequential(one(shape[0], shape[0], 3, padding=1, groups=shape[0], bias=False), one(shape[0], 4, 1)), (
        4,
        *shape[1:],
    )


def dilated_conv(rng, shape):
    if flat(shape):
        return None
    return conv_of(len(shape))(shape[0], shape[0], 3, padding="same", dilation=2), shape


def transposed_conv(rng, shape):
    if flat(shape) or shape[1] > 4:
        return None
    size, padding, extra = rng.choice([(4, 1, 0), (3, 1, 1), (2, 0, 0)])
    layer = conv_of(len(shape), True)(shape[0], 4, size, 2, padding, extra, groups=rng.choice([1, 2 - shape[0] % 2]))
    return layer, (4, *(2 * s for s in shape[1:]))


def strided_conv(rng, shape):
    if flat(shape) or shape[1] < 4:
        return None
    return conv_of(len(shape))(shape[0], 4, 3, 2, 1), (4, *((s + 1) // 2 for s in shape[1:]))


def conv_spectral_norm(rng, shape):
    if flat(shape):
        return None
    wrap = rng.choice([torch.nn.utils.spectral_norm, parametrizations.spectral_norm])
    return wrap(conv_of(len(shape))(shape[0], shape[0], 3, padding=1)), shape


def conv_weight_norm(rng, shape):
    if flat(shape):
        return None
    wrap = rng.choice([torch.nn.utils.weight_norm, parametrizations.weight_norm])
    return wrap(conv_of(len(shape))(shape[0], shape[0], 3, padding=1)), shape


def conv_standardised(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x):
        weight = self.weight[0] * self.scale
        weight = weight / (weight.view(weight.size(0), -1).norm(dim=1).view(-1, 1, 1, 1) + 1e-4)
        return F.conv2d(x, weight, None, 1, 1)

    return Do(run, weight=torch.randn(1, 4, shape[0], 3, 3), scale=torch.ones(1)), (4, *shape[1:])


def modulated_conv(rng, shape):
    if len(shape) != 3:
        return None
    demodulate, up = rng.random() < 0.7, shape[1] <= 4 and rng.random() < 0.5

    def run(self, x):
        n, c, h, w = x.shape
        style = self.style(x.mean((2, 3))).view(n, 1, c, 1, 1) + 1
        weight = self.weight * style
        if demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(n, -1, 1, 1, 1)
        x = x.reshape(1, n * c, h, w)
        if up:
            weight = weight.transpose(1, 2).reshape(n * c, -1, 3, 3)
            return F.conv_transpose2d(x, weight, stride=2, padding=0, groups=n).view(n, -1, 2 * h + 1, 2 * w + 1)
        return F.conv2d(x, weight.view(-1, c, 3, 3), padding=1, groups=n).view(n, -1, h, w)

    after = tuple(2 * s + 1 for s in shape[1:]) if up else shape[1:]
    return Do(run, weight=torch.randn(1, 4, shape[0], 3, 3), style=nn.Linear(shape[0], shape[0])), (4, *after)


def instance_norm(rng, shape):
    if flat(shape):
        return None
    norm = [None, None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][len(shape)]
    return norm(shape[0], affine=rng.random() < 0.5, track_running_stats=rng.random() < 0.3), shape


def adaptive_instance_norm(rng, shape):
    if flat(shape):
        return None

    def run(self, x):
        places = tuple(range(2, x.dim()))
        mean, std = x.mean(places, keepdim=True), x.std(places, keepdim=True, unbiased=False)
        gain, shift = self.style(mean.flatten(1)).view(x.size(0), -1, *[1] * len(places)).chunk(2, 1)
        return (x - mean) / (std + 1e-2) * (1 + gain) + shift

    return Do(run, style=nn.Linear(shape[0], 2 * shape[0])), shape


def group_norm(rng, shape):
    return nn.GroupNorm(2 if shape[0] % 2 == 0 and not flat(shape) else 1, shape[0]), shape


def single_head_attention(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x):
        q, k, v = self.q(x).flatten(2), self.k(x).view(x.size(0), 2, -1), self.v(x).flatten(2)
        weights = torch.bmm(q.permute(0, 2, 1), k).softmax(-1)
        return self.gamma * torch.bmm(v, weights.transpose(1, 2)).view(*x.size()) + x

    c = shape[0]
    return Do(run, q=nn.Conv2d(c, 2, 1), k=nn.Conv2d(c, 2, 1), v=nn.Conv2d(c, c, 1), gamma=torch.ones(1) * 0.7), shape


def upsampled(rng, shape):
    if flat(shape) or shape[1] > 4:
        return None
    modes = {2: ["nearest", "linear"], 3: ["nearest", "bilinear", "bicubic"], 4: ["nearest", "trilinear"]}[len(shape)]
    mode = rng.choice(modes)
    after = (shape[0], *(2 * s for s in shape[1:]))
    if rng.random() < 0.5:
        return nn.Upsample(scale_factor=2, mode=mode), after
    corners = None if mode == "nearest" else rng.random() < 0.5
    return Do(lambda self, x: F.interpolate(x, size=after[1:], mode=mode, align_corners=corners)), after


def pixel_shuffled(rng, shape):
    if len(shape) != 3 or shape[1] > 4:
        return None
    return nn.Sequential(nn.Conv2d(shape[0], 16, 1), nn.PixelShuffle(2)), (4, 2 * shape[1], 2 * shape[2])


def pixel_unshuffled(rng, shape):
    if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
        return None
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * shape[0], 4, 1)), (4, shape[1] // 2, shape[2] // 2)


def blurred(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x):
        kernel = self.kernel.expand(x.size(1), 1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.size(1))

    line = torch.tensor([1.0, 2.0, 1.0])
    return Do(run, buffers=("kernel",), kernel=(line[:, None] * line / 16)[None, None]), shape


def pooled(rng, shape):
    if flat(shape) or any(s < 4 for s in shape[1:]):
        return None
    rank = len(shape) - 1
    kind = rng.choice([f"AvgPool{rank}d", f"MaxPool{rank}d"])
    return getattr(nn, kind)(2), (shape[0], *(s // 2 for s in shape[1:]))


def squeeze_and_excite(rng, shape):
    if flat(shape):
        return None

    def run(self, x):
        gate = self.gate(x.flatten(2).mean(-1)).sigmoid()
        return x * gate[(..., *[None] * (x.dim() - 2))] * 2

    return Do(run, gate=nn.Linear(shape[0], shape[0])), shape


def unfolded(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x):
        patches = F.unfold(x, 3, padding=1)
        return F.fold(patches.tanh(), x.shape[2:], 3, padding=1) / 9

    return Do(run), shape


def grid_sampled(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x):
        grid = F.affine_grid(self.theta.expand(x.size(0), -1, -1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    return Do(run, theta=torch.tensor([[[0.9, 0.2, 0.1], [-0.2, 0.9, 0.0]]])), shape


def coordinates(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x):
        n, _, h, w = x.shape
        lines = torch.linspace(-1, 1, h, device=x.device), torch.linspace(-1, 1, w, device=x.device)
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"))[None].expand(n, -1, -1, -1)
        return self.conv(torch.cat([x, grid], 1))

    return Do(run, conv=nn.Conv2d(shape[0] + 2, 4, 1)), (4, *shape[1:])


def channel_shuffled(rng, shape):
    if flat(shape) or shape[0] % 2:
        return None
    return Do(lambda self, x: x.view(x.size(0), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape) * 1.1), shape


def to_sequence(rng, shape):
    if flat(shape):
        return None
    return Do(lambda self, x: x.flatten(2)), (shape[0], math.prod(shape[1:]))


def to_volume(rng, shape):
    if len(shape) != 3 or shape[1] % 2:
        return None
    return Do(lambda self, x: x.unflatten(2, (2, -1))), (shape[0], 2, shape[1] // 2, shape[2])


def spectrogram(rng, shape):
    width = math.prod(shape)
    if width < 16:
        return None
    window = torch.hann_window(8)

    def run(self, x):
        wave = x.reshape(x.size(0), -1)[:, :16]
        found = torch.stft(wave, 8, 4, window=self.window, return_complex=True)
        return torch.cat([found.real, (found.abs() ** 2 + 1e-3).sqrt(), torch.view_as_real(found)[..., 1]], 1)

    return Do(run, buffers=("window",), window=window), (15, 5)


def fourier(rng, shape):
    def run(self, x):
        found = torch.fft.rfft(x, dim=-1) * torch.complex(self.real, self.imaginary)
        return torch.fft.irfft(found, n=x.shape[-1], dim=-1) + 0.5 * x

    width = shape[-1] // 2 + 1
    return Do(run, real=torch.ones(width), imaginary=torch.rand(width)), shape


def snake(rng, shape):
    return Do(lambda self, x: x + (x * self.alpha).sin().pow(2) / (self.alpha + 1e-6), alpha=torch.rand(shape[-1]) + 0.5), shape


def recurrent_over_places(rng, shape):
    if len(shape) != 2:
        return None
    gru = nn.GRU(shape[0], 2, bidirectional=True)

    def run(self, x):
        found, _ = self.gru(x.permute(2, 0, 1))
        return found.permute(1, 2, 0)

    return Do(run, gru=gru), (4, shape[1])


def maxout(rng, shape):
    linear = nn.Linear(shape[-1], 2 * shape[-1])
    return Do(lambda self, x: self.linear(x).unflatten(-1, (-1, 2)).max(-1)[0], linear=linear), shape


def codebook(rng, shape):
    """Nearest entries, with a straight-through gradient."""

    def run(self, x):
        codes = (x.unsqueeze(-1) - self.book).abs().argmin(-1)
        found = F.embedding(codes, self.book[:, None]).squeeze(-1)
        return x + (found - x).detach()

    return Do(run, buffers=("book",), book=torch.linspace(-2, 2, 9)), shape


def softmax_temperature(rng, shape):
    return Do(lambda self, x: (x / 0.7).softmax(1) * x.shape[1]), shape


def looped(rng, shape):
    parts = nn.ModuleDict({str(k): nn.Linear(shape[-1], shape[-1]) for k in range(2)})

    def run(self, x):
        for _name, part in self.parts.items():
            x = part(x).tanh() + self.gains[_name] * x
        return x

    gains = nn.ParameterDict({str(k): nn.Parameter(torch.rand(shape[-1])) for k in range(2)})
    return Do(run, parts=parts, gains=gains), shape


def where_and_clamp(rng, shape):
    return Do(lambda self, x: torch.where(x.abs() > 1, x.sign() * (1 + x.abs()).log(), x).clamp(-2, 2.0)), shape


# With labels or a condition.


def class_gains(rng, shape):
    def run(self, x, labels):
        gain = self.embedding(labels)
        return x * (1 + gain.view(-1, x.size(1), *[1] * (x.dim() - 2)))

    return Do(run, "classes", embedding=nn.Embedding(CLASSES, shape[0])), shape


def one_hot_appended(rng, shape):
    if not flat(shape):
        return None

    def run(self, x, labels):
        return self.linear(torch.cat([x, F.one_hot(labels, CLASSES).to(x.dtype)], 1))

    return Do(run, "classes", linear=nn.Linear(shape[0] + CLASSES, 12)), (12,)


def vector_appended(rng, shape):
    if len(shape) == 3:
        return None
    linear = nn.Linear(math.prod(shape) + CLASSES, 12)
    return Do(lambda self, x, y: self.linear(torch.cat([x.flatten(1), y], -1)), "vectors", linear=linear), (12,)


def one_hot_channels(rng, shape):
    if len(shape) != 3:
        return None

    def run(self, x, y):
        return self.conv(torch.cat([x, y[:, :, None, None].repeat(1, 1, *x.shape[2:])], 1))

    return Do(run, "vectors", conv=nn.Conv2d(shape[0] + CLASSES, 4, 3, 1, 1)), (4, *shape[1:])


def conditioned(rng, shape):
    def run(self, x, condition):
        assert x.shape[0] == condition.shape[0]
        return x + self.linear(condition).view(-1, shape[0], *[1] * (x.dim() - 2))

    return Do(run, "condition", linear=nn.Linear(5, shape[0])), shape


# What cannot be refined as it is.


def minibatch_statistics(rng, shape):
    return Do(lambda self, x: x + x.std(0, keepdim=True)), shape


def fresh_noise(rng, shape):
    return Do(lambda self, x: x + 0.3 * torch.randn_like(x)), shape


def always_dropout(rng, shape):
    return Do(lambda self, x: F.dropout(x, 0.5, True)), shape


def rounding(rng, shape):
    return Do(lambda self, x: (x * 2).round()), shape


def detaching(rng, shape):
    return Do(lambda self, x: x.detach() * 2), shape


def scripted(rng, shape):
    return torch.jit.script(nn.Tanh()), shape


BLOCKS = {
    function.__name__: function
    for function in (
        chunk_split_cat, view_as_rows, permute_and_reshape, transposed_twice, in_place_relu, in_place_leaky, in_place_sum,
        in_place_on_view, scalar_buffer, computed_buffer, kept_tensor, kept_in_a_dict, computed_attribute, computed_in_a_list,
        uncopyable_attribute, unregistered_modules, tied_weights, pixel_norm, layer_norm, einsum, autograd_function,
        functional_call, checkpointed, checkpointed_reentrant, gradient_inside, vmapped, stopped_gradient,
        branch_for_each_sample, branch_on_values, masked_assignment, branch_on_sizes, even_batch,
        at_least_two, half_inside, float64_inside,
        running_state, sample_statistics, sorted_and_gathered, drop_out, residual, weight_hook, forward_hook,
        old_spectral_norm, new_spectral_norm, old_weight_norm, new_weight_norm, weight_normalised_inside, wide_bias, batch_norm,
        batch_norm_inline, multi_head_attention, transformer_layer, scaled_dot_product, to_picture, conv, grouped_conv,
        depthwise_conv, dilated_conv, transposed_conv, strided_conv, conv_spectral_norm, conv_weight_norm, conv_standardised,
        modulated_conv, instance_norm, adaptive_instance_norm, group_norm, single_head_attention, upsampled, pixel_shuffled,
        pixel_unshuffled, blurred, pooled, squeeze_and_excite, unfolded, grid_sampled, coordinates, channel_shuffled,
        to_sequence, to_volume, spectrogram, fourier, snake, recurrent_over_places, maxout, codebook, softmax_temperature,
        looped, where_and_clamp,
    )
}  # fmt: skip
BLOCKS |= {kind.lower(): recurrent(kind) for kind in ("LSTM", "GRU", "RNN")}
BLOCKS |= {kind.lower(): cell(kind) for kind in ("LSTMCell", "GRUCell")}
LABELLED = {
    "classes": (class_gains, one_hot_appended), "vectors": (vector_appended, one_hot_channels), "condition": (conditioned,),
}  # fmt: skip
# kind -> what of it may be refused with one of our errors
REFUSED = {
    function.__name__: function
    for function in (minibatch_statistics, fresh_noise, always_dropout, rounding, detaching, scripted)
}

Named = namedtuple("Named", ["features", "extra"])


@dataclass
class Found:
    """What a block returns."""

    features: torch.Tensor
    extra: object = None
    sizes: list = field(default_factory=list)


PACKED = {
    "plain": (lambda x: x, lambda found: found),
    "tuple": (lambda x: (x, x.detach().mean()), lambda found: found[0]),
    "list": (lambda x: [x, None], lambda found: found[0]),
    "dict": (lambda x: {"step": 1, "features": x}, lambda found: found["features"]),
    "named tuple": (lambda x: Named(x, "text"), lambda found: found.features),
    "dataclass": (lambda x: Found(x), lambda found: found.features),
    "nested": (lambda x: (torch.arange(len(x)), {"here": [x]}), lambda found: found[1]["here"][0]),
}


class Packed(nn.Module):
    """A block that hands on its result in a container, and takes one."""

    def __init__(self, block, opened, closed):
        super().__init__()
        self.block, self.opened, self.closed = block, opened, closed

    def forward(self, given, *inputs):
        return PACKED[self.closed][0](self.block(PACKED[self.opened][1](given), *inputs))


class Network(nn.Module):
    """Blocks one after the other; ``last`` makes images or logits."""

    def __init__(self, blocks, last, containers):
        super().__init__()
        between = ["plain", *containers[: len(blocks)]]
        self.takes = [getattr(block, "takes", "") for block in blocks]
        self.blocks = nn.ModuleList(Packed(block, *between[i : i + 2]) for i, block in enumerate(blocks))
        self.opened, self.last = between[-1], last

    def body(self, x, *given):
        for block, takes in zip(self.blocks, self.takes, strict=True):
            x = block(x, *given) if takes else block(x)
        return self.last(PACKED[self.opened][1](x))

    def forward(self, x):
        return self.body(x)


class WithLabels(Network):
    def forward(self, x, labels):
        return self.body(x, labels)


class WithOptionalClass(Network):
    def forward(self, x, y=None):
        return self.body(x, *() if y is None else (y,))


class InAList(Network):
    def forward(self, xs, randomize_noise=True, return_latents=False):
        assert isinstance(xs, list)
        return self.body(xs[0]), None


class WithUnusedClass(Network):
    """Official StyleGAN2: labels of width 0."""

    c_dim = 0

    def forward(self, z, c, truncation=1.0):
        assert c is None
        return self.body(z)


class WithOptions(Network):
    def forward(self, x, truncation=0.5, noise=None):
        assert noise is None
        return self.body(x * truncation)


class WithCondition(Network):
    def forward(self, x, condition):
        return self.body(x, condition)


class ConditionFirst(Network):
    def forward(self, condition, x):
        return self.body(x, condition)


HEADS = ("logit", "row", "map", "heads", "tuple", "dict", "patches", "energy", "probability", "function probability")


def head(kind, shape):
    width = math.prod(shape)
    to_map = nn.Conv2d(shape[0], 1, 1) if len(shape) == 3 else None

    def rows(self, x):
        return self.linear(x.flatten(1))

    if kind == "logit":
        return Do(lambda self, x: rows(self, x).squeeze(-1), linear=nn.Linear(width, 1))
    if kind == "map" and to_map is not None:
        return to_map
    if kind == "heads" and to_map is not None:
        return Do(lambda self, x: [self.map(x), rows(self, x)], map=to_map, linear=nn.Linear(width, 1))
    if kind == "tuple":
        return Do(lambda self, x: (x, rows(self, x)), linear=nn.Linear(width, 1))
    if kind == "dict":
        return Do(lambda self, x: {"features": x, "score": rows(self, x)}, linear=nn.Linear(width, 1))
    if kind == "patches":
        return Do(rows, linear=nn.Linear(width, 3))
    if kind == "probability":
        return nn.Sequential(nn.Flatten(), nn.Linear(width, 1), nn.Sigmoid())
    if kind == "function probability":
        return Do(lambda self, x: self.squash(rows(self, x)), linear=nn.Linear(width, 1), squash=torch.sigmoid)
    return Do(rows, linear=nn.Linear(width, 1))


@dataclass
class Case:
    """A pair, what it is given, and how it is called: by the options of a Refiner, and by plain functions."""

    generator: nn.Module
    discriminator: nn.Module
    latents: torch.Tensor
    kinds: list
    options: dict = field(default_factory=dict)
    labels: torch.Tensor | None = None
    conditions: dict | None = None
    refusals: set = field(default_factory=set)
    code_arguments: tuple = ()

    def inputs(self):
        return {**({} if self.labels is None else {"labels": self.labels}), **(self.conditions or {})}


def blocks_for(rng, shape, names, least, labelled=None):
    """Modules for the blocks named, as far as they fit, and ``least`` more; those a block needs before it are put in."""
    made, kinds = [], []

    def add(function, name):
        nonlocal shape
        found = function(rng, shape)
        if found is None:
            return False
        module, shape = found
        made.append(module)
        kinds.append(name)
        return True

    for name in names:
        function = (BLOCKS | REFUSED)[name]
        if add(function, name):
            continue
        for bridge in (["view_as_rows"], ["to_picture"], ["to_sequence"], ["view_as_rows", "to_picture"],
                       ["view_as_rows", "to_picture", "to_sequence"], ["pooled"]):  # fmt: skip
            state = len(made), shape
            if all(add(BLOCKS[b], b) for b in bridge) and add(function, name):
                break
            del made[state[0] :], kinds[state[0] :]
            shape = state[1]
        else:
            raise AssertionError(f"{name} fits nowhere")
    if labelled is not None:
        fitting = [f for f in LABELLED[labelled] if f(random.Random(0), shape) is not None]
        function = rng.choice(fitting)
        add(function, function.__name__)
    tries = 0
    while least > 0 and tries < 20:
        tries += 1
        name = rng.choice(sorted(BLOCKS))
        if add(BLOCKS[name], name):
            least -= 1
    return made, kinds, shape


def case(seed):
    """The pair of this seed. The first block of generator or discriminator goes round all kinds."""
    rng = random.Random(seed)
    every = sorted(BLOCKS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _case(rng, seed, every[seed % len(every)])


def _case(rng, seed, first):
    refused = sorted(REFUSED)[seed // 16 % len(REFUSED)] if seed % 16 == 7 else None
    labelled = rng.choice([None, None, None, "classes", "vectors", "condition"]) if refused is None else None
    who = rng.choice(["g", "d", "both"]) if labelled else ""
    in_g = seed % 2 == 0
    picture = rng.random() < 0.15
    shape = (2, 4, 4) if picture else (LATENT,)
    names = [first] if in_g else []
    if refused and rng.random() < 0.5:
        names = [*names, refused]
    start = [] if picture or rng.random() < 0.4 else ["to_picture"]
    blocks, kinds, shape = blocks_for(
        rng, shape, [*start, *names], rng.choice([1, 2]), labelled if who in ("g", "both") else None
    )
    rank = len(shape)
    last = [nn.Linear(shape[0], 9), nn.Conv1d(shape[0], 2, 3, 1, 1), nn.Conv2d(shape[0], 2, 3, 1, 1), nn.Conv3d(shape[0], 2, 1)]
    containers = [rng.choice(sorted(PACKED)) if rng.random() < 0.5 else "plain" for _ in blocks]
    kinds += [f"packed: {c}" for c in containers]
    image = (9,) if rank == 1 else (2, *shape[1:])
    g_kind = "labels" if labelled in ("classes", "vectors") and who in ("g", "both") else ""
    g_kind = "condition" if labelled == "condition" and who in ("g", "both") else g_kind
    options = {}
    if g_kind == "labels":
        g_class = rng.choice([WithLabels, WithOptionalClass])
    elif g_kind == "condition":
        g_class = rng.choice([WithCondition, ConditionFirst])
    else:
        g_class = rng.choice([Network, Network, InAList, WithUnusedClass, WithOptions])
    generator = g_class(blocks, nn.Sequential(last[rank - 1], nn.Tanh()), containers)
    kinds.append(f"generator: {g_class.__name__}")

    names = [] if in_g else [first]
    if refused and refused not in kinds:
        names = [*names, refused]
    d_blocks, d_kinds, shape = blocks_for(rng, image, names, rng.choice([0, 1]), labelled if who in ("d", "both") else None)
    d_containers = [rng.choice(sorted(PACKED)) if rng.random() < 0.3 else "plain" for _ in d_blocks]
    kinds += d_kinds + [f"packed: {c}" for c in d_containers]
    kind = rng.choice(HEADS)
    if labelled and kind in ("patches", "energy"):
        kind = "row"
    d_takes = who in ("d", "both")
    d_class = Network
    if d_takes:
        d_class = rng.choice([WithCondition, ConditionFirst] if labelled == "condition" else [WithLabels, WithOptionalClass])
    discriminator = d_class(d_blocks, head(kind, shape), d_containers)
    kinds += [f"head: {kind}", f"discriminator: {d_class.__name__}"]

    # How they are called. With a condition both functions are given it.
    if labelled == "condition":
        first_g, first_d = g_class is ConditionFirst, d_class is ConditionFirst
        if g_kind:
            options["generate"] = (lambda G, z, cond: G(cond, z)) if first_g else (lambda G, z, cond: G(z, cond))
        else:
            options["generate"] = _plain_generate(g_class)
        if d_takes:
            options["discriminate"] = (lambda D, x, cond: D(cond, x)) if first_d else (lambda D, x, cond: D(x, cond))
        else:
            options["discriminate"] = lambda D, x, **_: D(x)
    elif g_class is InAList:
        options["generate"] = _plain_generate(g_class)
    elif g_class is WithOptions:
        options["generator_kwargs"] = {"truncation": 0.8, "noise": None}
    if kind == "tuple":
        options["output_key"] = 1
    elif kind == "dict":
        options["output_key"] = "score"
    elif kind == "patches":
        options["discriminate"] = lambda D, x, **_: D(x).mean(1)
    elif kind == "energy":
        options["discriminate"] = lambda D, x, **_: -(D(x) - x.flatten(1).mean(1, keepdim=True)).abs().flatten(1).mean(1)
    elif "probability" in kind:
        options["discriminator_output"] = "probability"
    if options.get("discriminate") is not None and d_class is not Network and labelled != "condition":
        options["discriminate"] = None

    n = 6 if "even_batch" in kinds else 5
    latents = torch.randn(n, 2, 4, 4) if picture else torch.randn(n, LATENT)
    labels = None
    if labelled == "classes":
        labels = torch.arange(n) % CLASSES
    elif labelled == "vectors":
        labels = F.one_hot(torch.arange(n) % CLASSES, CLASSES).float()
    conditions = {"cond": torch.randn(n, 5)} if labelled == "condition" else None
    if labelled:
        kinds.append(f"labels: {labelled} of {who}")
    made = Case(
        generator, discriminator, latents, kinds, {k: v for k, v in options.items() if v is not None}, labels, conditions
    )
    made.refusals = {refused} if refused else set()
    return made


def _plain_generate(kind):
    if kind is InAList:
        return lambda G, z, **_: G([z], randomize_noise=False)[0]
    if kind is WithUnusedClass:
        return lambda G, z, **_: G(z, None)
    return lambda G, z, **_: G(z)


def generator(seed):
    return case(seed).generator


def discriminator(seed):
    return case(seed).discriminator
