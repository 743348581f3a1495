"""Tiny random pipelines of models whose text enters by cross-attention."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.zoo import Entry
from tests.zoo.parts import (
    COND,
    COND_UNCOND,
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
    guided_call,
    masks,
    pair,
    prompt_masks_call,
    texts,
    tiny,
)


@tiny
def hunyuan_dit():
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=6,
        cross_attention_dim=FEATURES,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=TOKENS,
        text_len_t5=SECOND,
    )
    return absent(HunyuanDiTPipeline, transformer=transformer, scheduler=DDPMScheduler(), requires_safety_checker=False)


def hunyuan_dit_call(rows):
    return {
        **SIZE,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        **pair("prompt_embeds", rows, TOKENS, FEATURES),
        **masks("prompt_attention_mask", rows),
        **pair("prompt_embeds_2", rows, SECOND, 16),
        **masks("prompt_attention_mask_2", rows, SECOND),
    }


@tiny
def prx():
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=FEATURES, hidden_size=32, num_heads=2, depth=3, axes_dim=[8, 8]
    )
    return absent(PRXPipeline, transformer=transformer, scheduler=flow())


def prx_call(rows):
    full = {key: value.bool() for key, value in masks("prompt_attention_mask", rows).items()}
    return {**guided_call(rows), **full, "use_resolution_binning": False}


def prx_unguided_call(rows):
    """With guidance the pipeline hands two times to the model, which serve one prompt only."""
    return {**prx_call(rows), "guidance_scale": 1.0}


@tiny
def nucleus():
    """Blocks 0 to 2 and 4 are dense, block 3 is a mixture of experts."""
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=6.0,
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
    )
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return absent(NucleusMoEImagePipeline, transformer=transformer, scheduler=flow())


def sana_transformer(**settings):
    return SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=FEATURES,
        sample_size=8,
        **settings,
    )


@tiny
def sana():
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    return absent(SanaPipeline, transformer=sana_transformer(), scheduler=scheduler)


SANA_SIZE = {**SIZE, "height": 128, "width": 192, "use_resolution_binning": False}


def sana_call(rows):
    embeds = {**pair("prompt_embeds", rows, TOKENS, FEATURES), **masks("prompt_attention_mask", rows)}
    return {**SANA_SIZE, "guidance_scale": 3.0, "negative_prompt": None, **embeds}


@tiny
def sana_sprint():
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return absent(SanaSprintPipeline, transformer=transformer, scheduler=scheduler)


def sana_sprint_call(rows):
    embeds = {"prompt_embeds": texts("prompt_embeds", rows, TOKENS, FEATURES)}
    embeds["prompt_attention_mask"] = torch.ones(rows, TOKENS, dtype=torch.long)
    return {**SANA_SIZE, "intermediate_timesteps": None, **embeds}


def pixart_transformer():
    return PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        caption_channels=FEATURES,
        sample_size=8,
        use_additional_conditions=False,
    )


@tiny
def pixart_sigma():
    return absent(PixArtSigmaPipeline, transformer=pixart_transformer(), scheduler=DPMSolverMultistepScheduler())


@tiny
def pixart_alpha():
    return absent(PixArtAlphaPipeline, transformer=pixart_transformer(), scheduler=DPMSolverMultistepScheduler())


def pixart_call(rows):
    embeds = {**pair("prompt_embeds", rows, TOKENS, FEATURES), **masks("prompt_attention_mask", rows)}
    return {**SIZE, "guidance_scale": 3.0, "negative_prompt": None, "use_resolution_binning": False, **embeds}


@tiny
def dit():
    transformer = DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=3, sample_size=8, num_embeds_ada_norm=1000
    )
    return absent(DiTPipeline, transformer=transformer, scheduler=DDIMScheduler(), vae=autoencoder())


def dit_call(rows):
    return {"class_labels": [1, 207][:rows], "guidance_scale": 3.0, "num_inference_steps": 2}


ENTRIES = (
    Entry("hunyuan_dit", "HunyuanDiT2DModel", hunyuan_dit, hunyuan_dit_call, GRID, JOINT, None, 6),
    Entry("prx", "PRXTransformer2DModel", prx, prx_call, GRID, JOINT, None, 3, rows=1),
    Entry("prx-unguided", "PRXTransformer2DModel", prx, prx_unguided_call, GRID, (("cond",),), None, 3),
    Entry("nucleus", "NucleusMoEImageTransformer2DModel", nucleus, prompt_masks_call, GRID, SPLIT, None, 5),
    Entry("sana", "SanaTransformer2DModel", sana, sana_call, GRID, JOINT, None, 3),
    Entry("sana-sprint", "SanaTransformer2DModel", sana_sprint, sana_sprint_call, GRID, COND, None, 3),
    Entry("pixart-sigma", "PixArtTransformer2DModel", pixart_sigma, pixart_call, GRID, JOINT, None, 3),
    Entry("pixart-alpha", "PixArtTransformer2DModel", pixart_alpha, pixart_call, GRID, JOINT, None, 3),
    Entry("dit", "DiTTransformer2DModel", dit, dit_call, (4, 4), COND_UNCOND, None, 3),
)
