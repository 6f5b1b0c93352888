"""Pictures of samples, drawn with Pillow alone: rows of small images with captions, and what refinement changed in colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastrefine.errors import InputError

MARGIN, LABEL, GAP, LINE, CAPTION = 16, 132, 6, 20, 26
SIDE, LARGEST, WIDTH = 64, 256, 1120  # of an image at least and at most; of all columns together, about
ROWS = {"initial": "before", "refined": "after", "difference": "difference"}
LEGEND = (
    "Difference: red where refinement made the image brighter, blue where it made it darker, white where nothing changed. "
    "Full colour stands for a change by half of the range."
)


def levels(images: Tensor, image_range: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """(N, C, H, W) floats in [low, high] -> (N, H, W, C) uint8: floor(127.5 x + 128), clipped, of x in [-1, 1]."""
    low, high = image_range
    x = images if (low, high) == (-1, 1) else (images - low) * (2 / (high - low)) - 1
    found = np.clip(np.floor(127.5 * x.detach().cpu().numpy() + 128), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(found.transpose(0, 2, 3, 1))


def coloured(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 1, 3 or 4) uint8 -> (N, H, W, 3); what is see-through is white behind."""
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:] / np.float32(255)
        return np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of (N, H, W, C) uint8 -> (N, H, W, 3) uint8, see LEGEND; of colours the mean over the channels counts."""
    x = np.clip((after.astype(np.float32) - before).mean(3) / 127.5, -1, 1)
    fade = 255 * (1 - np.abs(x))
    red, blue = np.where(x > 0, 255, fade), np.where(x < 0, 255, fade)
    return np.stack([red, fade, blue], -1).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of one image (H, W, 1, 3 or 4) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def likely_range(images: Tensor) -> tuple[float, float]:
    """The first of (0, 1) and (-1, 1) that holds all values, else their own lowest and highest."""
    low, high = float(images.min()), float(images.max())
    for usual in ((0.0, 1.0), (-1.0, 1.0)):
        if usual[0] <= low and high <= usual[1]:
            return usual
    return low, high


def from_to(before: float, after: float) -> str:
    """ "-1.0 to 0.1"; no number is "-0.0"."""
    return " to ".join(f"{round(value, 1) + 0.0:.1f}" for value in (before, after))


def grid(
    path: str | Path, before: np.ndarray, after: np.ndarray, logits: Sequence[tuple[float, float]], title: str,
    rows: Sequence[str] = tuple(ROWS),
) -> None:  # fmt: skip
    """Write a picture of samples before and after, both (N, H, W, C) uint8, with a row for each of ``rows`` (see ROWS).

    logits: (before, after) of each sample, or nothing. Small images are enlarged, large ones made smaller; many columns are
    broken into several bands. Raises InputError on other rows, on other than 1, 3 or 4 channels, and on an unknown file suffix.
    """
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise InputError(f"rows are {list(rows)}; wanted some of {', '.join(ROWS)}")
    if after.shape[-1] not in (1, 3, 4):
        raise InputError(f"a picture needs images of 1, 3 or 4 channels, got {after.shape[-1]}")
    made = {"initial": lambda: before, "refined": lambda: after, "difference": lambda: difference(before, after)}
    shown = [(ROWS[row], made[row]()) for row in rows]
    comparison(path, shown, [from_to(*pair) for pair in logits], title, LEGEND if "difference" in rows else "")


def comparison(
    path: str | Path, rows: Sequence[tuple[str, np.ndarray]], notes: Sequence[str], title: str, legend: str = "", side: int = 0
) -> None:
    """Write a picture: a row for each (label, images (N, H, W, 1, 3 or 4)), a note under each column, a title above.

    side: of an image in pixels; 0: a multiple of its own of at least SIDE. Columns that do not fit in WIDTH begin a new band.
    """
    count, (high, wide) = len(rows[0][1]), rows[0][1].shape[1:3]
    side = side or min(max(high, wide) * -(-SIDE // max(high, wide)), LARGEST)
    width, height = (max(round(length * side / max(high, wide)), 1) for length in (wide, high))
    columns = -(-count // -(-count // max(WIDTH // (width + GAP), 1)))  # in bands of about equal length
    bands = range(0, count, columns)
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    band = len(rows) * (height + GAP) + (LINE if notes else 0)
    across = max(2 * MARGIN + LABEL + columns * (width + GAP), 2 * MARGIN + int(font.getlength(title)) + 1)
    lines = _wrapped(legend, small, across - 2 * MARGIN)
    canvas = Image.new("RGB", (across, 2 * MARGIN + CAPTION + len(bands) * (band + GAP) + LINE * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    whole = not (width % wide or height % high)  # then the pixels stay sharp
    sampling = Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC
    top = MARGIN + CAPTION
    for start in bands:
        for label, images in rows:
            draw.text((MARGIN, top + height // 2 - 8), label, fill="black", font=font)
            for i, image in enumerate(coloured(images[start : start + columns])):
                left = MARGIN + LABEL + i * (width + GAP)
                canvas.paste(Image.fromarray(image).resize((width, height), sampling), (left, top))
                draw.rectangle((left, top, left + width - 1, top + height - 1), outline=(200, 200, 200))
            top += height + GAP
        if notes:
            draw.text((MARGIN, top - 2), "score (logit)", fill="black", font=font)
            for i, note in enumerate(notes[start : start + columns]):
                draw.text((MARGIN + LABEL + i * (width + GAP) + 2, top), note.replace(" ", "  "), fill="black", font=small)
            top += LINE
        top += GAP
    for line in lines:
        draw.text((MARGIN, top), line, fill=(90, 90, 90), font=small)
        top += LINE
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        canvas.save(path)
    except ValueError as error:
        raise InputError(f"{path} is no name of a picture ({error}); wanted e.g. grid.png") from error


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]
