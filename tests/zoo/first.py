"""Tiny random pipelines of the families that are used most."""

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image

from tests.zoo import Entry
from tests.zoo.rest import (
    FEATURES,
    GRID,
    JOINT,
    SIZE,
    SPLIT,
    TOKENS,
    absent,
    autoencoder,
    flow,
    masks,
    pair,
    texts,
    tiny,
)

COND = (("cond",),)
COND_UNCOND = (("cond", "uncond"),)
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
STACKS = {**HEADS, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": FEATURES}


def flux(embedded):
    transformer = FluxTransformer2DModel(
        **STACKS, in_channels=16, pooled_projection_dim=10, guidance_embeds=embedded, axes_dims_rope=(4, 6, 6)
    )
    return absent(FluxPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())


@tiny
def flux_true_cfg():
    return flux(embedded=False)


@tiny
def flux_embedded():
    return flux(embedded=True)


def flux_embedded_call(rows):
    embeds = {"prompt_embeds": texts("prompt_embeds", rows, TOKENS, FEATURES)}
    return {**SIZE, **embeds, "pooled_prompt_embeds": texts("pooled", rows, 10)}


def flux_call(rows):
    pooled = {"negative_pooled_prompt_embeds": texts("negative_pooled", rows, 10)}
    return {
        **flux_embedded_call(rows),
        **pair("prompt_embeds", rows, TOKENS, FEATURES),
        **pooled,
        "true_cfg_scale": 3.0,
    }


def flux2_transformer(*, embedded):
    return Flux2Transformer2DModel(
        **STACKS, in_channels=16, guidance_embeds=embedded, axes_dims_rope=(4, 4, 4, 4), mlp_ratio=2.0
    )


def flux2_autoencoder():
    return AutoencoderKLFlux2(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )


@tiny
def flux2():
    transformer = flux2_transformer(embedded=True)
    return absent(Flux2Pipeline, transformer=transformer, scheduler=flow(), vae=flux2_autoencoder())


def unguided_call(rows):
    return {**SIZE, "prompt_embeds": texts("prompt_embeds", rows, TOKENS, FEATURES)}


@tiny
def klein():
    transformer = flux2_transformer(embedded=False)
    return absent(Flux2KleinPipeline, transformer=transformer, scheduler=flow(), vae=flux2_autoencoder())


def klein_call(rows):
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, TOKENS, FEATURES)}


@tiny
def klein_kv():
    """The reference tokens come first, and only in the first step."""
    transformer = flux2_transformer(embedded=False)
    return absent(Flux2KleinKVPipeline, transformer=transformer, scheduler=flow(), vae=flux2_autoencoder())


def klein_kv_call(rows):
    return {**unguided_call(rows), "image": Image.new("RGB", (64, 64), "red")}


def qwen_transformer():
    return QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=FEATURES, axes_dims_rope=(4, 6, 6)
    )


@tiny
def qwen():
    return absent(QwenImagePipeline, transformer=qwen_transformer(), scheduler=flow())


def qwen_call(rows):
    embeds = {**pair("prompt_embeds", rows, TOKENS, FEATURES), **masks("prompt_embeds_mask", rows)}
    return {**SIZE, "true_cfg_scale": 3.0, **embeds}


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
    return {**qwen_call(rows), "height": 1024, "width": 1536, "image": image}


class Processor:
    """As much of a processor as the constructor asks for."""

    tokenizer = SimpleNamespace(encode=lambda text: [1])

    def apply_chat_template(self, messages, **options):
        return [[1, 2, 3]]


@tiny
def qwen21():
    transformer = QwenImage21Transformer2DModel(
        **HEADS, in_channels=16, out_channels=16, num_layers=3, context_in_dim=FEATURES, axes_dims_rope=(4, 6, 6)
    )
    pipe = absent(QwenImage21Pipeline, transformer=transformer, scheduler=flow(), processor=Processor())
    pipe.latent_channels = 16
    return pipe


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
    return {"class_labels": [1, 207][:rows], "guidance_scale": 3.0, "num_inference_steps": 3}


@tiny
def zimage():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=FEATURES,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(transformer, name), std=0.1)
    return absent(ZImagePipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())


def zimage_call(rows):
    embeds = {name: list(value) for name, value in pair("prompt_embeds", rows, TOKENS, FEATURES).items()}
    return {**SIZE, "guidance_scale": 3.0, **embeds}


ENTRIES = (
    Entry("flux", "FluxTransformer2DModel", flux_true_cfg, flux_call, GRID, SPLIT, TOKENS, 5),
    Entry("flux-embedded", "FluxTransformer2DModel", flux_embedded, flux_embedded_call, GRID, COND, TOKENS, 5),
    Entry("flux2", "Flux2Transformer2DModel", flux2, unguided_call, GRID, COND, TOKENS, 5),
    Entry("klein", "Flux2Transformer2DModel", klein, klein_call, GRID, SPLIT, TOKENS, 5),
    Entry("klein-kv", "Flux2Transformer2DModel", klein_kv, klein_kv_call, GRID, COND, TOKENS, 5),
    Entry("qwen", "QwenImageTransformer2DModel", qwen, qwen_call, GRID, SPLIT, TOKENS, 3),
    Entry("qwen-edit", "QwenImageTransformer2DModel", qwen_edit, qwen_edit_call, GRID, SPLIT, TOKENS, 3),
    Entry("qwen21", "QwenImage21Transformer2DModel", qwen21, qwen_call, GRID, SPLIT, TOKENS, 3),
    Entry("sana", "SanaTransformer2DModel", sana, sana_call, GRID, JOINT, None, 3),
    Entry("sana-sprint", "SanaTransformer2DModel", sana_sprint, sana_sprint_call, GRID, COND, None, 3),
    Entry("sd3", "SD3Transformer2DModel", sd3, sd3_call, GRID, JOINT, TOKENS, 3),
    Entry("sd35", "SD3Transformer2DModel", sd35, sd3_call, GRID, JOINT, TOKENS, 3),
    Entry("pixart-sigma", "PixArtTransformer2DModel", pixart_sigma, pixart_call, GRID, JOINT, None, 3),
    Entry("pixart-alpha", "PixArtTransformer2DModel", pixart_alpha, pixart_call, GRID, JOINT, None, 3),
    Entry("dit", "DiTTransformer2DModel", dit, dit_call, (4, 4), COND_UNCOND, None, 3),
    Entry("zimage", "ZImageTransformer2DModel", zimage, zimage_call, GRID, COND_UNCOND, 32, 5),
)
