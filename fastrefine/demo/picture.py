"""Rows of small images with labels, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LABEL, GAP, CAPTION = 16, 132, 6, 26


def pixels(images: Tensor) -> np.ndarray:
    """(N, 1 or 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, by floor(127.5 x + 128) clipped."""
    levels = np.clip(np.floor(127.5 * images.detach().float().cpu().numpy() + 128), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels, (len(levels), 3, *levels.shape[2:])).transpose(0, 2, 3, 1))


def signed(difference: Tensor, largest: float) -> np.ndarray:
    """(N, 1, H, W) -> (N, H, W, 3) uint8: red where ink was added, blue where it was taken, white where nothing moved."""
    x = np.clip(difference[:, 0].float().numpy() / largest, -1, 1)
    fade = 255 * (1 - np.abs(x))
    red, blue = np.where(x > 0, 255, fade), np.where(x < 0, 255, fade)
    return np.stack([red, fade, blue], -1).astype(np.uint8)


def comparison(path: Path, rows: Sequence[tuple[str, np.ndarray]], notes: Sequence[str], title: str, side: int = 64) -> None:
    """Write a PNG: a row for each (label, images (N, H, W, 3)), a note under each column, a title above."""
    columns = len(rows[0][1])
    width = 2 * MARGIN + LABEL + columns * (side + GAP)
    height = 2 * MARGIN + CAPTION + len(rows) * (side + GAP) + CAPTION
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    top = MARGIN + CAPTION
    for label, images in rows:
        draw.text((MARGIN, top + side // 2 - 8), label, fill="black", font=font)
        for i, image in enumerate(images):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            left = MARGIN + LABEL + i * (side + GAP)
            canvas.paste(tile, (left, top))
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=(200, 200, 200))
        top += side + GAP
    small = ImageFont.load_default(11)
    draw.text((MARGIN, top + 2), "logit", fill="black", font=font)
    for i, note in enumerate(notes):
        draw.text((MARGIN + LABEL + i * (side + GAP) + 2, top + 4), note, fill="black", font=small)
    canvas.save(path)
