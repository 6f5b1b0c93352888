"""Blocks of features and of slots: what the step kernels load, and where the view's order puts it."""

import triton
import triton.language as tl


@triton.jit
def scalars_of(pointer, slot, num_slots, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of these slots, of a (COUNT, S) stack of up to three."""
    s = (slot * 0).to(DTYPE)
    t = s
    u = s
    if COUNT > 0:
        s = tl.load(pointer + slot)
    if COUNT > 1:
        t = tl.load(pointer + num_slots + slot)
    if COUNT > 2:
        u = tl.load(pointer + 2 * num_slots + slot)
    return s, t, u


@triton.jit
def vectors_of(pointer, at, stride, inside, COUNT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of up to three vectors, ``stride`` apart."""
    v = tl.zeros([BLOCK], DTYPE)
    w = v
    x = v
    if COUNT > 0:
        v = tl.load(pointer + at, mask=inside, other=0.0)
    if COUNT > 1:
        w = tl.load(pointer + stride + at, mask=inside, other=0.0)
    if COUNT > 2:
        x = tl.load(pointer + 2 * stride + at, mask=inside, other=0.0)
    return v, w, x


@triton.jit
def prior_of(latent, element, features, inside, LATENT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Precision, low and high of these elements; without a prior, uniform everywhere."""
    precision = tl.zeros([BLOCK], DTYPE)
    low = precision + float("-inf")
    high = precision + float("inf")
    if LATENT:
        precision = tl.load(latent + element, mask=inside, other=0.0)
        low = tl.load(latent + features + element, mask=inside, other=0.0)
        high = tl.load(latent + 2 * features + element, mask=inside, other=0.0)
    return precision, low, high


@triton.jit
def clip_of(norm, hyper, DTYPE: tl.constexpr):
    """The factor that shortens gradients of this norm to max_grad_norm."""
    limit = tl.load(hyper + 2)
    return tl.where(norm > limit, limit / norm, 1.0).to(DTYPE)


@triton.jit
def places(program, features, channels, pixels, CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of the activation that the lanes of a program have, and places of the view, each with its mask.

    Where the orders differ a program has a tile of channels x pixels: its lanes run along pixels in the activation and
    along channels in the view, so that whole sectors are read and written on both sides.
    """
    lane = tl.arange(0, BLOCK)
    if CHANNEL_TILE > 0:
        PIXEL_TILE: tl.constexpr = BLOCK // CHANNEL_TILE
        tiles = tl.cdiv(pixels, PIXEL_TILE)
        first_channel, first_pixel = program // tiles * CHANNEL_TILE, program % tiles * PIXEL_TILE
        channel, pixel = first_channel + lane // PIXEL_TILE, first_pixel + lane % PIXEL_TILE
        element, inside = channel * pixels + pixel, (channel < channels) & (pixel < pixels)
        channel, pixel = first_channel + lane % CHANNEL_TILE, first_pixel + lane // CHANNEL_TILE
        place, place_inside = pixel * channels + channel, (channel < channels) & (pixel < pixels)
    else:
        element = program * BLOCK + lane
        inside = element < features
        place, place_inside = element, inside
    return element, inside, place, place_inside


@triton.jit
def transposed(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The lanes of a flattened (ROWS, COLUMNS) tile in the order of its transpose."""
    return tl.reshape(tl.trans(tl.reshape(x, [ROWS, COLUMNS])), [ROWS * COLUMNS])


@triton.jit
def write(
    activation, view, at, value, inside, view_at, view_inside,
    VIEW: tl.constexpr, CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The activation, and the networks' view of it."""
    tl.store(activation + at, value, mask=inside)
    if VIEW:
        seen = value.to(view.dtype.element_ty)
        if CHANNEL_TILE > 0:
            seen = transposed(seen, CHANNEL_TILE, BLOCK // CHANNEL_TILE)
        tl.store(view + view_at, seen, mask=view_inside)
