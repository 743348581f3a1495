"""Tiny random pipelines of models with a tensor for each stream."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLQwenImage,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image

from tests.zoo import Entry
from tests.zoo.parts import (
    FEATURES,
    GRID,
    HEADS,
    JOINT,
    SECOND,
    SIZE,
    SPLIT,
    TOKENS,
    absent,
    autoencoder,
    flow,
    masked_call,
    pair,
    prompt_masks_call,
    texts,
    tiny,
    true_cfg_call,
)


@torch.no_grad()
def amplify(model: torch.nn.Module, factor: float = 3**0.5) -> None:
    """Scale weights up: with the default initialisation a linear map then keeps the variance of its input."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)


@tiny
def aura_flow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    amplify(transformer)
    return absent(AuraFlowPipeline, transformer=transformer, scheduler=flow())


@tiny
def hidream():
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[FEATURES, 10],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(12, 12),
        llama_layers=[0, 1, 1, 2, 2],
    )
    pipe = absent(HiDreamImagePipeline, transformer=transformer, scheduler=flow())
    pipe.default_sample_size = 10
    return pipe


def hidream_call(rows):
    llama = {key: value.transpose(0, 1) for key, value in pair("prompt_embeds_llama3", rows, 3, SECOND, 10).items()}
    pooled = {f"{sign}pooled_prompt_embeds": texts(f"{sign}pooled", rows, 8) for sign in ("", "negative_")}
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds_t5", rows, TOKENS, FEATURES), **llama, **pooled}


@tiny
def joy_image():
    transformer = JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=FEATURES,
        mlp_width_ratio=2.0,
        num_layers=3,
        rope_dim_list=[4, 6, 6],
    )
    pipe = absent(JoyImageEditPipeline, transformer=transformer, scheduler=flow())
    pipe.vae_image_processor.get_default_height_width = lambda _, height, width: (height, width)
    return pipe


def qwen_transformer():
    return QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=FEATURES, axes_dims_rope=(4, 6, 6)
    )


@tiny
def qwen():
    return absent(QwenImagePipeline, transformer=qwen_transformer(), scheduler=flow())


@tiny
def qwen_edit():
    """The pipeline enlarges its image to a megapixel: a factor of 128 leaves 2 x 8 reference tokens of it."""
    vae = AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * 8,
        num_res_blocks=0,
        temperal_downsample=[False] * 7,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    return absent(QwenImageEditPipeline, transformer=qwen_transformer(), scheduler=flow(), vae=vae)


def qwen_edit_call(rows):
    image = Image.linear_gradient("L").convert("RGB").resize((64, 16))
    return {**true_cfg_call(rows), "height": 1024, "width": 1536, "image": image}


def sd3_pipeline(**settings):
    transformer = SD3Transformer2DModel(
        **HEADS,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=FEATURES,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
        **settings,
    )
    return absent(StableDiffusion3Pipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())


@tiny
def sd3():
    return sd3_pipeline()


@tiny
def sd35():
    return sd3_pipeline(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def sd3_call(rows):
    pooled = {f"{sign}pooled_prompt_embeds": texts(f"{sign}pooled", rows, 10) for sign in ("", "negative_")}
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, TOKENS, FEATURES), **pooled}


ENTRIES = (
    Entry("aura_flow", "AuraFlowTransformer2DModel", aura_flow, masked_call, GRID, JOINT, 8 + TOKENS, 5),
    Entry("hidream", "HiDreamImageTransformer2DModel", hidream, hidream_call, GRID, JOINT, TOKENS + 2 * SECOND, 5),
    Entry("joy_image", "JoyImageEditTransformer3DModel", joy_image, prompt_masks_call, GRID, SPLIT, TOKENS, 3),
    Entry("qwen", "QwenImageTransformer2DModel", qwen, true_cfg_call, GRID, SPLIT, TOKENS, 3),
    Entry("qwen-edit", "QwenImageTransformer2DModel", qwen_edit, qwen_edit_call, GRID, SPLIT, TOKENS, 3),
    Entry("sd3", "SD3Transformer2DModel", sd3, sd3_call, GRID, JOINT, TOKENS, 3),
    Entry("sd35", "SD3Transformer2DModel", sd35, sd3_call, GRID, JOINT, TOKENS, 3),
)
