"""Tiny random pipelines with tokenizers and text encoders; one token a letter, so that positions can be counted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import (
    CogView4Pipeline,
    Flux2KleinPipeline,
    HunyuanVideoPipeline,
    Lumina2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

import dit_lens as dl
from tests import pipelines
from tests.zoo.parts import FEATURES, SIZE, absent, autoencoder, flow, tiny
from tests.zoo.truth import ENTRIES

CLIP_LENGTH = 20
VOCABULARY = 104
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


def letters(template: str, length: int, chat: str | None = None, side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of letters. template: around a text $A; chat: of messages; side: where it pads."""
    found = pipelines.tokenizer(template)
    found.model_max_length, found.chat_template, found.padding_side = length, chat, side
    return found


def clip(kind: type, width: int = FEATURES // 2):
    sizes = {"hidden_size": width, "intermediate_size": 8, "projection_dim": width, "num_attention_heads": 1}
    return kind(
        CLIPTextConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=77, **sizes, **MARKS)
    ).eval()


def t5(width: int = FEATURES):
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2, **sizes)).eval()


def language_model(width: int = FEATURES, layers: int = 2):
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    return Qwen3Model(
        Qwen3Config(
            vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, **sizes, **MARKS
        )
    ).eval()


def transformer_of(name: str):
    return ENTRIES[name].build().transformer


@tiny
def sd3():
    transformer = transformer_of("sd3")
    width = transformer.config.pooled_projection_dim // 2
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder(),
        **{name: clip(CLIPTextModelWithProjection, width) for name in ("text_encoder", "text_encoder_2")},
        **{name: letters("<s> $A </s>", CLIP_LENGTH) for name in ("tokenizer", "tokenizer_2")},
        text_encoder_3=t5(transformer.config.joint_attention_dim),
        tokenizer_3=letters("$A </s>", 2000),
    )


@tiny
def qwen():
    return absent(
        QwenImagePipeline,
        transformer=transformer_of("qwen"),
        scheduler=flow(),
        text_encoder=language_model(),
        tokenizer=letters("$A", 2000),
    )


@tiny
def zimage():
    return absent(
        ZImagePipeline,
        transformer=transformer_of("zimage"),
        scheduler=flow(),
        vae=autoencoder(),
        text_encoder=language_model(),
        tokenizer=letters("$A", 2000, CHAT),
    )


@tiny
def lumina2():
    return absent(
        Lumina2Pipeline,
        transformer=transformer_of("lumina2"),
        scheduler=flow(),
        text_encoder=language_model(),
        tokenizer=letters("$A </s>", 2000),
    )


@tiny
def cogview4():
    return absent(
        CogView4Pipeline,
        transformer=transformer_of("cogview4"),
        scheduler=flow(),
        text_encoder=language_model(),
        tokenizer=letters("<s> $A", 2000, side="left"),
    )


@tiny
def klein():
    transformer = transformer_of("klein")
    return absent(
        Flux2KleinPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=ENTRIES["klein"].build().vae,
        text_encoder=language_model(transformer.config.joint_attention_dim // 3, 3),
        tokenizer=letters("$A", 2000, CHAT),
        is_distilled=False,
    )


@tiny
def hunyuan_video():
    transformer = transformer_of("hunyuan_video")
    return absent(
        HunyuanVideoPipeline,
        transformer=transformer,
        scheduler=flow(),
        text_encoder=language_model(layers=3),
        tokenizer=letters("$A", 2000),
        text_encoder_2=clip(CLIPTextModel, transformer.config.pooled_projection_dim),
        tokenizer_2=letters("<s> $A </s>", CLIP_LENGTH),
    )


@dataclass
class Subject:
    """One pipeline to try, and where its text is, as its source says.

    build: makes it.
    call: its arguments.
    path: of its blocks.
    slot: position of the text stream in what a block returns; None where that is one tensor.
    starts: (prompts of a branch, row, branch) -> where the first letter of the prompt is, once for each encoder.
    limits: how many letters of a prompt each encoder takes.
    branches: of every forward pass of a step.
    text: (tensor of a block) -> that of the text stream, a view.
    negative: whether it takes a negative prompt.
    """

    build: Callable
    call: dict
    path: str
    slot: int | None
    starts: Callable
    limits: tuple[int, ...]
    branches: tuple[tuple[str, ...], ...]
    text: Callable = lambda tensor: tensor
    negative: bool = True

    @cached_property
    def lens(self) -> dl.DiTLens:
        return dl.DiTLens(self.build(), defaults={})

    def arguments(self, prompts: list[str], negatives: list[str], seed: int = 0) -> dict:
        """Of a plain call of the pipeline."""
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        negative = {"negative_prompt": list(negatives)} if self.negative else {}
        return {**self.call, **negative, "prompt": list(prompts), "generator": generators}

    def hook(self, block: int, do: Callable, prompts: list[str], negatives: list[str]) -> torch.Tensor:
        """What the plain pipeline draws when ``do(text of a branch, branch, forward pass)`` acts behind a block.

        ``do`` returns another text of that branch, or None.
        """
        count, pipe = 0, self.lens.pipe

        def act(_, __, output):
            nonlocal count
            branches = self.branches[count % len(self.branches)]
            tensor = (output if self.slot is None else output[self.slot]).clone()
            rows = len(prompts)
            for i, branch in enumerate(branches):
                part = self.text(tensor[i * rows : (i + 1) * rows])
                new = do(part, branch, count)
                if new is not None:
                    part.copy_(new)
            count += 1
            return tensor if self.slot is None else (*output[: self.slot], tensor, *output[self.slot + 1 :])

        handle = pipe.transformer.get_submodule(f"{self.path}.{block}").register_forward_hook(act)
        try:
            return pipe(**self.arguments(prompts, negatives))[0]
        finally:
            handle.remove()


STEPS = {**SIZE, "num_inference_steps": 2}
TEMPLATE = qwen().prompt_template_encode
IMAGE = 32  # image tokens of Z-Image, padded
SPLIT, JOINT = (("cond",), ("uncond",)), (("uncond", "cond"),)


def left_padded(prompts: list[str], row: int) -> int:
    """CogView4 pads in front, to a multiple of 16, after a mark of the beginning."""
    longest = 1 + max(map(len, prompts))
    return -(-longest // 16) * 16 - len(prompts[row])


SUBJECTS = {
    "sd3": Subject(
        sd3,
        {**STEPS, "guidance_scale": 3.0, "max_sequence_length": 40},
        "transformer_blocks",
        0,
        lambda *_: (1, CLIP_LENGTH),
        (CLIP_LENGTH - 2, 39),
        JOINT,
    ),
    "qwen": Subject(
        qwen,
        {**STEPS, "true_cfg_scale": 3.0},
        "transformer_blocks",
        0,
        lambda *_: (TEMPLATE.index("{}") - 34,),
        (1000,),
        SPLIT,
    ),
    "zimage": Subject(
        zimage,
        {**STEPS, "guidance_scale": 3.0, "max_sequence_length": 60},
        "layers",
        None,
        lambda *_: (1,),
        (58,),
        (("cond", "uncond"),),
        lambda tensor: tensor[:, IMAGE:],
    ),
    "lumina2": Subject(
        lumina2,
        {**STEPS, "guidance_scale": 3.0, "max_sequence_length": 60, "system_prompt": "say"},
        "layers",
        None,
        lambda _, __, branch: (len("say <Prompt Start> ") if branch == "cond" else 0,),
        (40,),
        SPLIT,
    ),
    "cogview4": Subject(
        cogview4,
        {**STEPS, "guidance_scale": 3.0, "max_sequence_length": 64},
        "transformer_blocks",
        1,
        lambda prompts, row, _: (left_padded(prompts, row),),
        (63,),
        SPLIT,
    ),
    "klein": Subject(
        klein,
        {**STEPS, "guidance_scale": 3.0, "max_sequence_length": 50, "text_encoder_out_layers": (1, 2, 3)},
        "transformer_blocks",
        0,
        lambda *_: (1,),
        (48,),
        SPLIT,
        negative=False,
    ),
    "hunyuan_video": Subject(
        hunyuan_video,
        {
            **STEPS,
            "num_frames": 5,
            "max_sequence_length": 50,
            "prompt_template": {"template": "say {}!", "crop_start": 2},
        },
        "transformer_blocks",
        1,
        lambda *_: (2,),
        (48,),
        (("cond",),),
        negative=False,
    ),
}
