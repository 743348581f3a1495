"""Models whose truth is known: what massive channels do in them was built in by hand.

All are FLUX pipelines. Carrier and detail have sixteen massive channels and draw the scene of their prompt exactly, the
others a part of it.

carrier    the massive channels hold the image, token by token; the rest scales faint detail.
detail     the image is spread over the ordinary channels; the massive ones hold a constant that adds faint detail.
direction  one direction, which is no channel, holds all that is drawn; half of it lies in eight channels, so they are
           massive.
named      massive and ordinary channels both name a scene; how many of its attributes are drawn by the massive ones'
           name, and how many are lost without one, is planted.
channels   every one of sixteen massive channels holds a part of what is drawn; nothing reads the energy of others.
"""

import itertools
import random
from dataclasses import astuple, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from dit_lens import register_family
from dit_lens.families.table.flux import FLUX1
from dit_lens.toys import flux
from dit_lens.toys.scenes import Scene, draw
from dit_lens.toys.stages import draw_batch

AMPLITUDE = 60.0
FAINT = 0.02
STEPS = 3
CALL = {"height": 64, "width": 64, "num_inference_steps": STEPS, "max_sequence_length": flux.TEXT_TOKENS}
SCENES = [
    Scene("big", "red", "square", "left", "plain", "blue"),
    Scene("big", "yellow", "circle", "bottom", "plain", "purple"),
    Scene("big", "white", "square", "top", "plain", "green"),
    Scene("big", "blue", "circle", "right", "plain", "orange"),
]


class Block(nn.Module):
    """Adds what its transformer planted, and passes the text on."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def forward(
        self, hidden_states, encoder_hidden_states, temb=None, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        return encoder_hidden_states, hidden_states + temb if self.writes else hidden_states


class FinalNorm(nn.Module):
    def forward(self, x, conditioning_embedding=None):
        return x


class Planted(FluxTransformer2DModel):
    """The first ``in_channels`` channels are massive; ``code`` and ``read`` say what they and the others mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.transformer_blocks = nn.ModuleList([Block(writes=True), Block(writes=False)])
        self.single_transformer_blocks = nn.ModuleList([Block(writes=False), Block(writes=False)])
        self.norm_out = FinalNorm()
        self.massive, ordinary = self.config.in_channels, self.inner_dim - self.config.in_channels
        spread = torch.linalg.qr(torch.randn(ordinary, self.massive, generator=torch.Generator().manual_seed(0)))[0]
        self.register_buffer("spread", spread)  # [ordinary, code], orthonormal columns
        self.register_buffer("prompts", None)
        self.register_buffer("images", None)

    def forward(
        self,
        hidden_states,
        timestep=None,
        pooled_projections=None,
        encoder_hidden_states=None,
        return_dict=False,
        **others,
    ):
        ordinary = torch.zeros(*hidden_states.shape[:2], self.inner_dim - self.massive)
        x = torch.cat([FAINT * hidden_states, ordinary], -1)
        text, planted = (
            self.context_embedder(encoder_hidden_states),
            self.code(self.image(hidden_states, pooled_projections)),
        )
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            text, x = block(
                hidden_states=x,
                encoder_hidden_states=text,
                temb=planted,
                image_rotary_emb=None,
                joint_attention_kwargs=None,
            )
        clean = self.read(self.norm_out(x, text))
        return ((hidden_states - clean) / timestep.reshape(-1, 1, 1),)

    def image(self, hidden_states, pooled):
        """The packed latents of the scene that a prompt names."""
        if self.prompts is None:
            return torch.zeros_like(hidden_states)
        return self.images[torch.cdist(pooled.float(), self.prompts).argmin(1)]


class Carrier(Planted):
    def code(self, image):
        faint = torch.zeros(*image.shape[:2], self.inner_dim - self.massive)
        return torch.cat([AMPLITUDE * (image + 4), faint + 1], -1)

    def read(self, x):
        return x[..., : self.massive] / AMPLITUDE - 4 + FAINT * (x[..., self.massive :] - 1) @ self.spread


class DetailOnly(Planted):
    def code(self, image):
        pattern = 0.1 * (torch.arange(image.shape[1]) % 3 - 1.0)[None, :, None]  # the same for every prompt
        massive = AMPLITUDE * (1 + pattern).expand(*image.shape[:2], self.massive)
        return torch.cat([massive, image @ self.spread.T], -1)

    def read(self, x):
        return x[..., self.massive :] @ self.spread + FAINT * (x[..., : self.massive] / AMPLITUDE - 1)


class Direction(Planted):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        along = torch.full((self.inner_dim,), (0.5 / (self.inner_dim - 8)) ** 0.5)
        along[:8] = 0.25
        self.register_buffer("along", along)  # [d], of length 1
        self.register_buffer("unread", spread_beside(along[:, None], 3))

    def code(self, image):
        said = image.mean(-1, keepdim=True) + 0.7
        return AMPLITUDE * (said * self.along + add_unread(image, self.unread, 0.5))

    def read(self, x):
        return (x @ self.along / AMPLITUDE - 0.7)[..., None].expand(*x.shape[:2], self.massive)


class Channels(Planted):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("unread", spread_beside(torch.eye(self.inner_dim)[:, : self.massive], 4))

    def code(self, image):
        sign = 1.0 - 2 * (torch.arange(self.massive) % 2)  # so that the tokens' mean is no pattern of the image's
        rest = torch.zeros(*image.shape[:2], self.inner_dim - self.massive)
        return AMPLITUDE * (torch.cat([0.5 * image + sign, rest], -1) + add_unread(image, self.unread, 1.0))

    def read(self, x):
        said = 2 * x[..., : self.massive] / AMPLITUDE
        return said - said.mean(1, keepdim=True)


class Named(Planted):
    """Massive channels name a scene by their mean over tokens, or by a pattern over tokens, beside a constant.

    plant() says what is drawn of which name. Without a massive name, what is needed is drawn as in ``PLAIN``.
    """

    def plant(self, scenes, draw_latents, *, necessity, sufficiency, part="mean"):
        """scenes: that are known. draw_latents: scene -> packed latents [n, c]. The others: shares of attributes."""
        random = torch.Generator().manual_seed(0)
        self.scenes, self.draw_latents, self.drawn, self.part = scenes, draw_latents, {}, part
        ranks = [torch.rand(len(scenes), 6, generator=random).argsort(1).argsort(1) for _ in range(2)]
        chance = torch.rand(len(scenes), 1, generator=random)  # rounds a share of six up or down
        self.needed, self.moved = (
            rank < 6 * share + (chance - 1) * (share < 1)
            for rank, share in zip(ranks, (necessity, sufficiency), strict=True)
        )
        names = torch.randn(len(scenes), self.massive, generator=random)
        names -= names.mean(1, keepdim=True)  # so that the constant is no name
        names -= names.mean(0)  # and the mean of all scenes none
        self.names = 0.3 * names / names.norm(dim=1, keepdim=True) * self.massive**0.5
        self.words = torch.randn(len(scenes), self.inner_dim - self.massive, generator=random).sign()

    def pattern(self, tokens):
        """How a name is spread over tokens, [1, n, 1]: alike, or with a sign that changes from one to the next."""
        return torch.ones(1, tokens, 1) if self.part == "mean" else 1.0 - 2 * (torch.arange(tokens) % 2)[None, :, None]

    def image(self, hidden_states, pooled):
        self.asked = None if self.prompts is None else torch.cdist(pooled.float(), self.prompts).argmin(1)
        return hidden_states

    def code(self, image):
        if self.asked is None:
            return torch.zeros(*image.shape[:2], self.inner_dim)
        pattern = self.pattern(image.shape[1])
        massive = AMPLITUDE * (1 + pattern * self.names[self.asked][:, None])
        return torch.cat([massive, self.words[self.asked][:, None].expand(-1, image.shape[1], -1)], -1)

    def read(self, x):
        if self.asked is None:
            return x[..., : self.massive]
        pattern = self.pattern(x.shape[1])
        name = ((x[..., : self.massive] / AMPLITUDE - 1) * pattern).mean(1)  # [b, c]
        fit = name @ self.names.T / self.names.square().sum(1)
        word = torch.cdist(x[..., self.massive :].mean(1), self.words).argmin(1)
        rows = zip(
            self.asked.tolist(), fit.argmax(1).tolist(), (fit.amax(1) > 0.5).tolist(), word.tolist(), strict=True
        )
        return torch.stack([self.draw(*row) for row in rows])

    def draw(self, asked, named, has_name, word):
        by_name, by_word = (astuple(self.scenes[i]) for i in (named, word))
        needed, moved = self.needed[asked].tolist(), self.moved[asked].tolist()
        without = [plain if one else other for plain, one, other in zip(astuple(PLAIN), needed, by_word, strict=True)]
        with_ = [mine if one else other for mine, one, other in zip(by_name, moved, by_word, strict=True)]
        scene = Scene(*(with_ if has_name else without))
        if scene not in self.drawn:
            self.drawn[scene] = self.draw_latents(scene)
        return self.drawn[scene]


# No scene that Named knows shares an attribute with it; and any mixture of theirs is a scene.
PLAIN = Scene("small", "white", "cross", "center", "plain", "cyan")


def name_scenes(count):
    """Scenes of which every mixture is a scene, in a fixed random order."""
    values = [
        ["big"],
        ["red", "orange", "yellow"],
        ["circle", "square", "triangle"],
        ["left", "right", "top", "bottom"],
        ["striped", "checkered", "dotted"],
        ["blue", "green", "purple"],
    ]
    every = [Scene(*one) for one in itertools.product(*values)]
    return random.Random(0).sample(every, count)


def named(toy, scenes, **planted):
    """A pipeline of :class:`Named` that knows some scenes. planted: as of its plant()."""
    pipe = pipeline(toy, Named, scenes)

    @torch.no_grad()
    def draw_latents(scene):
        return flux.pack(pipe, flux.to_latents(pipe, draw_batch([scene], 0, "cpu")))[0]

    pipe.transformer.plant(scenes, draw_latents, **planted)
    return pipe


def spread_beside(taken, count):
    """Some directions that lie across all channels, [d, count], orthonormal and orthogonal to those taken [d, m]."""
    width = len(taken)
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(torch.cat([taken, drawn], 1))[0][:, taken.shape[1] :]


def add_unread(image, directions, size):
    """Energy along directions that nothing reads: signs that change from token to token, and cancel over tokens."""
    tokens = torch.arange(image.shape[1])
    signs = torch.stack([1.0 - 2 * (tokens // 2**i % 2) for i in range(directions.shape[1])], 1)
    return (size * signs @ directions.T).expand(len(image), -1, -1)


# It makes its prediction by itself, not by the final norm and projection, and of its input besides.
register_family(replace(FLUX1, transformer="Planted", readout=None, final=replace(FLUX1.final, mod=None)))


def pipeline(toy, kind, scenes=SCENES):
    """A planted pipeline with the toy's own encoders and autoencoder, which knows some scenes."""
    transformer = kind(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=flux.TEXT_WIDTH, pooled_projection_dim=flux.TEXT_WIDTH, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    parts = {**toy.pipe.components, "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = FluxPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        transformer.prompts = flux.encode(pipe, [scene.caption for scene in scenes])["pooled_projections"]
        transformer.images = flux.pack(pipe, flux.to_latents(pipe, draw_batch(scenes, 0, "cpu")))
    return pipe


def masks():
    """The subject's mask in every scene, as it is drawn."""
    return [draw(scene, i).mask for i, scene in enumerate(SCENES)]
