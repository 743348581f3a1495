"""Images with known content: a small grammar of scenes, which are drawn with exact subject masks and recognised again.

>>> scene = Scene("big", "red", "circle", "left", "checkered", "blue")
>>> scene.caption
'a big red circle left on a checkered blue background'
>>> drawing = draw(scene, seed=0)
>>> drawing.image.size, drawing.mask.shape
((64, 64), (64, 64))
>>> recognise_scene(drawing.image).scene == scene
True

Letters: c candidate position of a subject, P pixels of an image.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.arguments.numbers import MOST, check_number
from dit_lens.errors import PromptError, nearest
from dit_lens.old_names import find_old_names

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
JITTER = 3.0  # largest random shift of a subject from its named position, in pixels, on each axis
STRETCH = 0.08  # largest random relative change of its radius
SHADE = 0.55  # brightness of the darker parts of a texture, relative to the background colour
PITCH = 8  # period of a texture in pixels: width of a stripe or cell, distance of dots
READABLE = 0.6  # smallest share of an image's variance that a scene must explain to be recognised
HELD_OUT = 0.1  # share of the (colour, shape, texture, position) combinations that are held out of training


@dataclass(frozen=True)
class Scene:
    """One sentence of the grammar; ``Scene.parse`` is the inverse of ``caption``.

    size: one of ``SIZES``.
    colour: colour of the subject, one of ``COLOURS``.
    shape: one of ``SHAPES``.
    position: one of ``POSITIONS``.
    texture: texture of the background, one of ``TEXTURES``.
    background: colour of the background, one of ``COLOURS``.
    """

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
        """Whether this combination of colour, shape, texture and position is held out of training."""
        # A hash of the words, so that the split is the same everywhere and needs no list.
        combination = f"{self.colour} {self.shape} {self.texture} {self.position}"
        return zlib.crc32(combination.encode()) % 1000 < 1000 * HELD_OUT

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """Parses a caption. Raises PromptError if it is not a sentence of the grammar.

        >>> Scene.parse("a small white cross top on a plain green background").shape
        'cross'
        """
        words = caption.lower().split()
        if len(words) != 10 or (words[0], *words[5:7], words[9]) != ("a", "on", "a", "background"):
            example = cls("big", "red", "circle", "left", "checkered", "blue").caption
            raise PromptError(f"{caption!r} is not a sentence of the grammar. An example: {example!r}.")
        named = dict(zip(ATTRIBUTES, [*words[1:5], *words[7:9]], strict=True))
        for attribute, word in named.items():
            if word not in VALUES[attribute]:
                raise PromptError(f"{word!r} is not a valid {attribute}.{nearest(word, VALUES[attribute])}")
        return cls(**named)

    def agreement(self, other: Scene | None) -> dict[str, bool]:
        """Returns, for every attribute, whether it equals that of another scene; all False for None (unreadable)."""
        return {
            field.name: other is not None and getattr(self, field.name) == getattr(other, field.name)
            for field in fields(self)
        }


@dataclass(frozen=True)
class Drawing:
    """A drawn scene.

    scene: what is drawn.
    image: RGB, 64 x 64 pixels.
    mask: bool [64, 64], the pixels of the subject.
    """

    scene: Scene
    image: Image
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Recognition:
    """Result of :func:`recognise_scene`.

    scene: the scene that fits the image best, or None if the image is unreadable.
    confidence: share of the image's variance that the scene explains, in [0, 1].
    mask: bool [64, 64], the subject as fitted to this image; empty if it is unreadable.
    """

    scene: Scene | None
    confidence: float
    mask: NDArray[np.bool_]

    def __str__(self) -> str:
        text = self.scene.caption if self.scene else "unreadable"
        return f"{text} ({self.confidence:.2f})"


def every_scene() -> Iterator[Scene]:
    """Yields all scenes of the grammar, in which subject and background always differ in colour."""
    for values in itertools.product(*VALUES.values()):
        scene = Scene(*values)
        if scene.colour != scene.background:
            yield scene


def sample_scenes(n: int, seed: int, *, held_out: bool = False, distinct: bool = False) -> list[Scene]:
    """Samples ``n`` scenes, all from the training split or all from the held-out one.

    >>> all(scene.held_out for scene in sample_scenes(3, seed=0, held_out=True))
    True

    n: number of scenes.
    seed: seed of the choice; the scenes of a larger n begin with those of a smaller one.
    held_out: True for combinations that were not in training, False for those that were.
    distinct: whether no two are equal: prompts of a study. Raises PromptError if there are not so many.
    """
    check_number("n", n, 0, MOST)
    split, rng = _list_split(held_out), np.random.default_rng(seed)
    if not distinct:
        return [split[i] for i in rng.integers(len(split), size=n)]
    if n > len(split):
        where = "held out of training" if held_out else "of training"
        raise PromptError(f"n={n:,} scenes were asked for, and there are {len(split):,} {where}. Ask for fewer.")
    found: dict[int, None] = {}
    while len(found) < n:
        found.setdefault(int(rng.integers(len(split))))
    return [split[i] for i in found]


@functools.cache
def _list_split(held_out: bool) -> list[Scene]:
    return [scene for scene in every_scene() if scene.held_out == held_out]


def draw(scene: Scene, seed: int = 0) -> Drawing:
    """Draws a scene with anti-aliased edges. seed: decides a small shift and scaling of the subject."""
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
    """Returns name -> RGB in [0, 1] of every colour."""
    return {name: np.true_divide(rgb, 255, dtype=np.float32) for name, rgb in COLOURS.items()}


@functools.cache
def backdrop(texture: str, colour: str) -> NDArray[np.float32]:
    """Returns a background without subject, [64, 64, 3] in [0, 1]."""
    y, x = np.mgrid[:PIXELS, :PIXELS]
    dark = {
        "plain": np.zeros((PIXELS, PIXELS), bool),
        "striped": x // PITCH % 2 == 1,
        "checkered": (x // PITCH + y // PITCH) % 2 == 1,
        "dotted": (x % PITCH - (PITCH - 1) / 2) ** 2 + (y % PITCH - (PITCH - 1) / 2) ** 2 < (0.35 * PITCH) ** 2,
    }[texture]
    return palette()[colour] * np.where(dark, SHADE, 1.0)[..., None].astype(np.float32)


def coverage(shape: str, x: Any, y: Any, radius: Any) -> NDArray[np.float32]:
    """Returns the share of each pixel that a shape covers, in [0, 1]: [64, 64], or [c, 64, 64] for arrays.

    shape: one of ``SHAPES``.
    x: horizontal centre in pixels, a number or [c].
    y: vertical centre in pixels, a number or [c].
    radius: in pixels, a number or [c].
    """
    x, y, radius = (np.asarray(value, np.float32)[..., None, None] for value in (x, y, radius))
    columns = np.arange(PIXELS, dtype=np.float32) + 0.5
    rows = columns[:, None]
    u, v = columns - x, rows - y
    # Signed distances to the edge in pixels, negative inside (of polygons up to a constant factor outside corners).
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


def recognise_scene(image: Image) -> Recognition:
    """Finds the scene that fits an image best, by least squares over RGB in [0, 1].

    >>> from PIL import Image
    >>> str(recognise_scene(Image.new("RGB", (64, 64), "gray")))
    'unreadable (0.00)'

    The centre and radius of the subject are fitted as well, so that the mask is that of this image. The image is
    unreadable if the best scene explains less than 60 % of its variance.
    """
    found = _recognise(image.convert("RGB").resize((PIXELS, PIXELS)).tobytes())
    return replace(found, mask=found.mask.copy())  # what is kept stays as it is


@functools.lru_cache(1024)  # a study compares the same image with several prompts
def _recognise(data: bytes) -> Recognition:
    pixels = np.true_divide(np.frombuffer(data, np.uint8).reshape(PIXELS, PIXELS, 3), 255, dtype=np.float32)
    to_subject, to_backdrop = _squared_errors(pixels)
    total = float(((pixels - pixels.mean((0, 1))) ** 2).sum())
    error, best = min(
        (_refine(*candidate, to_subject, to_backdrop) for candidate in _candidates(to_subject, to_backdrop)),
        key=lambda found: found[0],
    )
    # 1 - residual sum of squares / total sum of squares (R^2); a nearly uniform image has no variance to explain.
    confidence = max(0.0, 1 - error / total) if total > 1e-3 * PIXELS**2 else 0.0
    if confidence < READABLE:
        return Recognition(None, confidence, np.zeros((PIXELS, PIXELS), bool))
    shape, colour, (texture, background), x, y, radius = best
    scene = Scene(_closest_size(radius), colour, shape, _closest_position(x, y), texture, background)
    return Recognition(scene, confidence, coverage(shape, x, y, radius) > 0.5)


_BACKDROPS = tuple(itertools.product(TEXTURES, COLOURS))
_CANDIDATE_CENTRES = np.arange(12.0, PIXELS - 11, 2)  # on each axis
_CANDIDATE_RADII = (8.5, 10.0, 11.5, 14.5, 16.5, 18.5)


def _squared_errors(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the squared error of every pixel to every subject colour [8, P] and to every background [32, P]."""
    subjects = np.stack([palette()[colour] for colour in COLOURS])[:, None, None]
    backdrops = np.stack([backdrop(*pair) for pair in _BACKDROPS])
    to_subject = ((pixels - subjects) ** 2).sum(-1).reshape(len(COLOURS), -1)
    to_backdrop = ((pixels - backdrops) ** 2).sum(-1).reshape(len(_BACKDROPS), -1)
    return to_subject, to_backdrop


@functools.cache
def _templates(shape: str) -> tuple[list[tuple[float, float, float]], NDArray[np.float32]]:
    """Returns every candidate (x, y, radius) of a shape, and their coverages of squares of 2 x 2 pixels, [c, P / 4]."""
    centres = _CANDIDATE_CENTRES
    candidates = [(x, y, radius) for radius in _CANDIDATE_RADII for y in centres for x in centres]
    masks = _sum_2x2(coverage(shape, *np.array(candidates).T)).reshape(len(candidates), -1)
    return candidates, np.true_divide(masks, 4, dtype=np.float32)


def _sum_2x2(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums [*, 64, 64] over squares of 2 x 2 pixels: [*, 32, 32]."""
    return x.reshape(*x.shape[:-2], PIXELS // 2, 2, PIXELS // 2, 2).sum((-3, -1))


def _candidates(
    to_subject: NDArray[np.float32], to_backdrop: NDArray[np.float32]
) -> Iterator[tuple[str, int, int, float, float, float]]:
    """Yields for each shape its best (shape, colour, background, x, y, radius), at half the resolution."""
    subject, backdrops = (
        _sum_2x2(x.reshape(-1, PIXELS, PIXELS)).reshape(len(x), -1) for x in (to_subject, to_backdrop)
    )
    # A scene never has a subject in the colour of its background.
    same_colour = np.arange(len(_BACKDROPS)) % len(COLOURS) == np.arange(len(COLOURS))[:, None]  # [8, 32]
    for shape in SHAPES:
        candidates, masks = _templates(shape)
        inside, outside = masks @ subject.T, backdrops.sum(1) - masks @ backdrops.T  # [c, 8], [c, 32]
        error = inside[:, :, None] + outside[:, None, :]
        error[:, same_colour] = np.inf
        best, colour, background = np.unravel_index(error.argmin(), error.shape)
        yield (shape, int(colour), int(background), *candidates[best])


def _refine(
    shape: str,
    colour: int,
    background: int,
    x: float,
    y: float,
    radius: float,
    to_subject: NDArray[np.float32],
    to_backdrop: NDArray[np.float32],
) -> tuple[float, tuple]:
    """Returns the smallest squared error near a coarse candidate, and the fit that has it.

    shape: shape of the candidate.
    colour: index of the subject's colour.
    background: index of the background in ``_BACKDROPS``.
    x: horizontal centre of the candidate, in pixels.
    y: vertical centre, in pixels.
    radius: in pixels.
    to_subject: [8, P], squared error of every pixel to every subject colour.
    to_backdrop: [32, P], squared error of every pixel to every background.
    """
    gain, base = to_subject[colour] - to_backdrop[background], to_backdrop[background].sum()
    around = np.linspace(-1.5, 1.5, 5)
    near = np.stack(np.meshgrid(x + around, y + around, radius + around, indexing="ij"), -1).reshape(-1, 3)
    errors = base + coverage(shape, *near.T).reshape(len(near), -1) @ gain
    best = int(errors.argmin())
    return float(errors[best]), (shape, tuple(COLOURS)[colour], _BACKDROPS[background], *near[best].tolist())


def _closest_size(radius: float) -> str:
    return min(RADII, key=lambda name: abs(RADII[name] - radius))


def _closest_position(x: float, y: float) -> str:
    return min(POSITIONS, key=lambda name: np.hypot(x - POSITIONS[name][0], y - POSITIONS[name][1]))


__getattr__ = find_old_names(__name__, {"describe": "recognise_scene", "Description": "Recognition"})
