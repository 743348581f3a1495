"""Tiny random pipelines of transformers of videos, and images drawn by them."""

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.zoo import Entry
from tests.zoo.parts import (
    FEATURES,
    GRID,
    JOINT,
    SIZE,
    SPLIT,
    TOKENS,
    absent,
    flow,
    guided_call,
    masked_call,
    pair,
    tiny,
)


@tiny
def kandinsky5():
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=FEATURES,
        in_text_dim2=10,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    )
    pipe = absent(Kandinsky5T2IPipeline, transformer=transformer, scheduler=flow())
    pipe.resolutions = [(SIZE["width"], SIZE["height"])]
    return pipe


def kandinsky5_call(rows):
    ends = torch.arange(rows + 1, dtype=torch.int32) * TOKENS
    return {
        **SIZE,
        "guidance_scale": 3.0,
        **pair("prompt_embeds_qwen", rows, TOKENS, FEATURES),
        **pair("prompt_embeds_clip", rows, 10),
        "prompt_cu_seqlens": ends,
        "negative_prompt_cu_seqlens": ends,
    }


class Harmless:
    """A safety checker that lets everything pass."""

    def to(self, device: torch.device) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        return True


@tiny
def cosmos2():
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=FEATURES,
        adaln_lora_dim=6,
        max_size=(1, 16, 16),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    scheduler = flow(use_karras_sigmas=True)
    return absent(Cosmos2TextToImagePipeline, transformer=transformer, scheduler=scheduler, safety_checker=Harmless())


@tiny
def wan():
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=FEATURES,
        freq_dim=8,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return absent(WanPipeline, transformer=transformer, scheduler=flow())


def video_call(rows):
    return {**guided_call(rows), "num_frames": 5}


@tiny
def ltx():
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=FEATURES,
    )
    return absent(LTXPipeline, transformer=transformer, scheduler=flow())


def ltx_call(rows):
    return {**masked_call(rows), "height": 128, "width": 192, "num_frames": 9}


@tiny
def cogvideox():
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=FEATURES,
        num_layers=3,
        sample_width=12,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )
    return absent(CogVideoXPipeline, transformer=transformer, scheduler=CogVideoXDDIMScheduler())


ENTRIES = (
    Entry("kandinsky5", "Kandinsky5Transformer3DModel", kandinsky5, kandinsky5_call, GRID, SPLIT, TOKENS, 5),
    Entry("cosmos2", "CosmosTransformer3DModel", cosmos2, guided_call, GRID, SPLIT, None, 3),
    Entry("wan", "WanTransformer3DModel", wan, video_call, (2, *GRID), SPLIT, None, 3),
    Entry("ltx", "LTXVideoTransformer3DModel", ltx, ltx_call, (2, *GRID), JOINT, None, 3),
    Entry("cogvideox", "CogVideoXTransformer3DModel", cogvideox, video_call, (2, *GRID), JOINT, TOKENS, 3),
)
