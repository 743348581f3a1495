"""Images with known answers: a small grammar of scenes, drawn with exact subject masks, and read back from pixels.

>>> scene = Scene("big", "red", "circle", "left", "checkered", "blue")
>>> scene.caption
'a big red circle left on a checkered blue background'
>>> image = draw(scene, seed=0)
>>> image.image.size, image.mask.shape
((64, 64), (64, 64))
>>> describe(image.image).scene == scene
True
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.errors import PromptError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from PIL.Image import Image

PIXELS = 64

SIZES = ("small", "big")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (245, 222, 60),
    "green": (46, 160, 67),
    "cyan": (70, 205, 220),
    "blue": (45, 80, 200),
    "purple": (140, 60, 180),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = {  # (x, y)
    "center": (32.0, 32.0),
    "left": (20.0, 32.0),
    "right": (44.0, 32.0),
    "top": (32.0, 20.0),
    "bottom": (32.0, 44.0),
}
TEXTURES = ("plain", "striped", "checkered", "dotted")
VALUES = {
    "size": SIZES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
    "texture": TEXTURES,
    "background": tuple(COLOURS),
}
ATTRIBUTES = tuple(VALUES)
VOCABULARY = tuple(dict.fromkeys(["a", *itertools.chain(*VALUES.values()), "on", "background"]))

RADII = {"small": 10.0, "big": 17.0}
JITTER = 3.0  # pixels a subject may stray from its named position, on each axis
STRETCH = 0.08  # relative spread of its radius
SHADE = 0.55  # the second tone of a texture, as a multiple of the background colour
PITCH = 8  # pixels of one stripe, cell or dot
READABLE = 0.6  # least share of an image's variance a scene must explain to count as an answer
HELD_OUT = 0.1  # share of the (colour, shape, texture, position) combinations kept out of training


@dataclass(frozen=True)
class Scene:
    """One sentence of the grammar; ``Scene.parse`` is the inverse of ``caption``."""

    size: str
    colour: str
    shape: str
    position: str
    texture: str
    background: str

    @property
    def caption(self) -> str:
        return (
            f"a {self.size} {self.colour} {self.shape} {self.position} on a {self.texture} {self.background} background"
        )

    @property
    def held_out(self) -> bool:
        """Whether training never shows this combination of colour, shape, texture and position."""
        combination = f"{self.colour} {self.shape} {self.texture} {self.position}"
        return zlib.crc32(combination.encode()) % 1000 < 1000 * HELD_OUT

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """Reads a caption of the grammar.

        >>> Scene.parse("a small white cross top on a plain green background").shape
        'cross'
        """
        words = caption.lower().split()
        if len(words) != 10 or (words[0], *words[5:7], words[9]) != ("a", "on", "a", "background"):
            example = cls("big", "red", "circle", "left", "checkered", "blue").caption
            raise PromptError(f"{caption!r} is not a scene of the grammar. One reads: {example!r}.")
        named = dict(zip(ATTRIBUTES, [*words[1:5], *words[7:9]], strict=True))
        for attribute, word in named.items():
            if word not in VALUES[attribute]:
                raise PromptError(f"{word!r} is not a {attribute} of the scenes.{nearest(word, VALUES[attribute])}")
        return cls(**named)

    def agreement(self, other: Scene | None) -> dict[str, bool]:
        """Attribute by attribute, whether another scene (or an unreadable image, None) says the same."""
        return {
            field.name: other is not None and getattr(self, field.name) == getattr(other, field.name)
            for field in fields(self)
        }


@dataclass(frozen=True)
class Drawing:
    """A drawn scene: its image (64 x 64 RGB) and the exact subject mask, bool [64, 64]."""

    scene: Scene
    image: Image
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Description:
    """What :func:`describe` read from an image.

    scene: the best matching scene, or None when the image is unreadable.
    confidence: share of the image's variance that scene explains, in [0, 1].
    mask: bool [h, w], the subject as fitted to this image (empty when unreadable).
    """

    scene: Scene | None
    confidence: float
    mask: NDArray[np.bool_]

    def __str__(self) -> str:
        text = self.scene.caption if self.scene else "unreadable"
        return f"{text} ({self.confidence:.2f})"


def every_scene() -> Iterator[Scene]:
    """All scenes of the grammar whose subject and background differ in colour."""
    for values in itertools.product(*VALUES.values()):
        scene = Scene(*values)
        if scene.colour != scene.background:
            yield scene


def sample_scenes(n: int, seed: int, *, held_out: bool = False) -> list[Scene]:
    """``n`` scenes drawn at random, all from training's share of the grammar or all from the held-out one.

    >>> all(scene.held_out for scene in sample_scenes(3, seed=0, held_out=True))
    True
    """
    pool = _pool(held_out)
    return [pool[i] for i in np.random.default_rng(seed).integers(len(pool), size=n)]


@functools.cache
def _pool(held_out: bool) -> list[Scene]:
    return [scene for scene in every_scene() if scene.held_out == held_out]


def draw(scene: Scene, seed: int = 0) -> Drawing:
    """Draws a scene with anti-aliased edges; the seed moves and stretches the subject a little."""
    from PIL import Image

    rng = np.random.default_rng(
        [seed, *(VALUES[name].index(value) for name, value in zip(ATTRIBUTES, astuple(scene), strict=True))]
    )
    x, y = np.asarray(POSITIONS[scene.position]) + rng.uniform(-JITTER, JITTER, 2)
    radius = RADII[scene.size] * (1 + rng.uniform(-STRETCH, STRETCH))
    alpha = coverage(scene.shape, x, y, radius)[..., None]
    pixels = alpha * palette()[scene.colour] + (1 - alpha) * backdrop(scene.texture, scene.background)
    return Drawing(scene, Image.fromarray((255 * pixels).round().astype(np.uint8)), alpha[..., 0] > 0.5)


@functools.cache
def palette() -> dict[str, NDArray[np.float32]]:
    """The RGB of every colour, in [0, 1]."""
    return {name: np.true_divide(rgb, 255, dtype=np.float32) for name, rgb in COLOURS.items()}


@functools.cache
def backdrop(texture: str, colour: str) -> NDArray[np.float32]:
    """The background alone, [64, 64, 3] in [0, 1]."""
    y, x = np.mgrid[:PIXELS, :PIXELS]
    dark = {
        "plain": np.zeros((PIXELS, PIXELS), bool),
        "striped": x // PITCH % 2 == 1,
        "checkered": (x // PITCH + y // PITCH) % 2 == 1,
        "dotted": (x % PITCH - (PITCH - 1) / 2) ** 2 + (y % PITCH - (PITCH - 1) / 2) ** 2 < (0.35 * PITCH) ** 2,
    }[texture]
    return palette()[colour] * np.where(dark, SHADE, 1.0)[..., None].astype(np.float32)


def coverage(shape: str, x: Any, y: Any, radius: Any) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, [64, 64] in [0, 1], from its signed distance.

    x, y, radius: numbers, or arrays [c] of them for [c, 64, 64].
    """
    x, y, radius = (np.asarray(value, np.float32)[..., None, None] for value in (x, y, radius))
    columns = np.arange(PIXELS, dtype=np.float32) + 0.5
    rows = columns[:, None]
    u, v = columns - x, rows - y
    distance = {
        "circle": lambda: np.hypot(u, v) - radius,
        "square": lambda: np.maximum(np.abs(u), np.abs(v)) - 0.9 * radius,
        "triangle": lambda: np.maximum(0.8944 * np.abs(u) - 0.4472 * v - 0.54 * radius, v - radius),
        "cross": lambda: np.minimum(
            np.maximum(np.abs(u) - radius, np.abs(v) - 0.34 * radius),
            np.maximum(np.abs(v) - radius, np.abs(u) - 0.34 * radius),
        ),
    }[shape]()
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def describe(image: Image) -> Description:
    """Reads an image back into the grammar by best match over all scenes.

    The subject's centre and radius are searched as well, so the returned mask is that of this image and not of a
    drawing. Least squares over RGB in [0, 1]; an image of which the best scene explains less than 60 % of the
    variance is unreadable.

    >>> from PIL import Image
    >>> str(describe(Image.new("RGB", (64, 64), "gray")))
    'unreadable (0.00)'
    """
    return _described(image.convert("RGB").resize((PIXELS, PIXELS)).tobytes())


@functools.lru_cache(1024)  # studies ask of one image how near it is to several prompts
def _described(data: bytes) -> Description:
    pixels = np.true_divide(np.frombuffer(data, np.uint8).reshape(PIXELS, PIXELS, 3), 255, dtype=np.float32)
    to_subject, to_backdrop = _errors(pixels)
    total = float(((pixels - pixels.mean((0, 1))) ** 2).sum())
    error, best = min(
        (_refine(*candidate, to_subject, to_backdrop) for candidate in _candidates(to_subject, to_backdrop)),
        key=lambda found: found[0],
    )
    confidence = max(0.0, 1 - error / total) if total > 1e-3 * PIXELS**2 else 0.0
    if confidence < READABLE:
        return Description(None, confidence, np.zeros((PIXELS, PIXELS), bool))
    shape, colour, (texture, background), x, y, radius = best
    scene = Scene(_closest_size(radius), colour, shape, _closest_position(x, y), texture, background)
    return Description(scene, confidence, coverage(shape, x, y, radius) > 0.5)


_BACKDROPS = tuple(itertools.product(TEXTURES, COLOURS))
_GRID = np.arange(12.0, PIXELS - 11, 2)  # candidate centres, on each axis
_CANDIDATE_RADII = (8.5, 10.0, 11.5, 14.5, 16.5, 18.5)


def _errors(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Squared error of every pixel to every subject colour [8, P] and to every background [32, P]."""
    subjects = np.stack([palette()[colour] for colour in COLOURS])[:, None, None]
    backdrops = np.stack([backdrop(*pair) for pair in _BACKDROPS])
    to_subject = ((pixels - subjects) ** 2).sum(-1).reshape(len(COLOURS), -1)
    to_backdrop = ((pixels - backdrops) ** 2).sum(-1).reshape(len(_BACKDROPS), -1)
    return to_subject, to_backdrop


@functools.cache
def _templates(shape: str) -> tuple[list[tuple[float, float, float]], NDArray[np.float32]]:
    """Every candidate (x, y, radius) of a shape, and their coverages of squares of 2 x 2 pixels [candidates, P / 4]."""
    placed = [(x, y, radius) for radius in _CANDIDATE_RADII for y in _GRID for x in _GRID]
    masks = _halved(coverage(shape, *np.array(placed).T)).reshape(len(placed), -1)
    return placed, np.true_divide(masks, 4, dtype=np.float32)


def _halved(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[*, 64, 64] summed over squares of 2 x 2 pixels."""
    return x.reshape(*x.shape[:-2], PIXELS // 2, 2, PIXELS // 2, 2).sum((-3, -1))


def _candidates(
    to_subject: NDArray[np.float32], to_backdrop: NDArray[np.float32]
) -> Iterator[tuple[str, int, int, float, float, float]]:
    """For each shape the best colour, background and place on the coarse grid, at half the resolution."""
    subject, behind = (_halved(x.reshape(-1, PIXELS, PIXELS)).reshape(len(x), -1) for x in (to_subject, to_backdrop))
    for shape in SHAPES:
        placed, masks = _templates(shape)
        inside, outside = masks @ subject.T, behind.sum(1) - masks @ behind.T  # [c, 8], [c, 32]
        error = inside[:, :, None] + outside[:, None, :]
        on_itself = np.arange(len(_BACKDROPS)) % len(COLOURS) == np.arange(len(COLOURS))[:, None]
        error[:, on_itself] = np.inf
        place, colour, ground = np.unravel_index(error.argmin(), error.shape)
        yield (shape, int(colour), int(ground), *placed[place])


def _refine(
    shape: str,
    colour: int,
    behind: int,
    x: float,
    y: float,
    radius: float,
    to_subject: NDArray[np.float32],
    to_backdrop: NDArray[np.float32],
) -> tuple[float, tuple]:
    """The least squared error around a coarse candidate, and the scene that gives it."""
    gain, base = to_subject[colour] - to_backdrop[behind], to_backdrop[behind].sum()
    around = np.linspace(-1.5, 1.5, 5)
    near = np.stack(np.meshgrid(x + around, y + around, radius + around, indexing="ij"), -1).reshape(-1, 3)
    errors = base + coverage(shape, *near.T).reshape(len(near), -1) @ gain
    best = int(errors.argmin())
    return float(errors[best]), (shape, tuple(COLOURS)[colour], _BACKDROPS[behind], *near[best].tolist())


def _closest_size(radius: float) -> str:
    return min(RADII, key=lambda name: abs(RADII[name] - radius))


def _closest_position(x: float, y: float) -> str:
    return min(POSITIONS, key=lambda name: np.hypot(x - POSITIONS[name][0], y - POSITIONS[name][1]))
