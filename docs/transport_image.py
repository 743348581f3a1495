"""Draws docs/images/transport.webp: channels of one generation moved into another, at more and more strength."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import dit_lens as dl

SOURCE, TARGET = (
    "a big yellow triangle right on a plain green background",
    "a big red circle left on a checkered blue background",
)
STRENGTHS = (0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1)
SIDE, GAP, TEXT = 168, 12, 24  # pixels
LAST = 1800  # milliseconds for which the last frame stands; the others 180


def frame(images: list[Image.Image], strength: float) -> Image.Image:
    """The source, and the target with channels of it."""
    width = len(images) * (SIDE + GAP) - GAP
    made = Image.new("RGB", (width, SIDE + TEXT), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(13)
    labels = ("source", f"8 strongest channels, {strength:.0%}", f"8 random channels, {strength:.0%}")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        made.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (i * (SIDE + GAP), 0))
        draw.text((i * (SIDE + GAP) + SIDE / 2, SIDE + TEXT / 2), label, "#222222", font, anchor="mm")
    return made


def frames() -> list[Image.Image]:
    """One for every strength: the strongest channels of the source beside as many random ones."""
    lens = dl.DiTLens.toy()
    massive = lens.massive_channels(SOURCE, k=8, seed=0)
    made = []
    for strength in STRENGTHS:
        ops = [
            dl.Swap("blocks.*.img", source="row:0", rows=row, channels=channels, strength=strength)
            for row, channels in ((1, massive), (2, massive.random(seed=0)))
        ]
        made.append(frame(lens.run([SOURCE, TARGET, TARGET], ops, seed=0).images, strength))
    return made


if __name__ == "__main__":
    first, *others = frames()
    first.save(
        Path(__file__).parent / "images" / "transport.webp",
        save_all=True,
        append_images=others,
        duration=[700, *[180] * (len(others) - 1), LAST],
        loop=0,
        quality=85,
        method=6,
    )
