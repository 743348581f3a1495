"""Tiny random pipelines of the families beside the first ones."""

import functools
import inspect
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DDPMScheduler,
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests.pipelines import tokenizer
from tests.zoo import Entry

GRID = (4, 6)
TOKENS = 7
SECOND = 5
FEATURES = 12
SIZE = {"height": 64, "width": 96, "num_inference_steps": 3, "output_type": "latent"}
JOINT = (("uncond", "cond"),)
SPLIT = (("cond",), ("uncond",))
PROMPTS = ["a house", "3 birds"]
NEGATIVES = ["blurred", "o trees"]
SENTENCES = ["a house by the sea at night", "three birds on one wire at noon"]


def tiny(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Seed a builder, wake what it initialises to zero, and put the pipeline into evaluation mode."""

    @functools.wraps(build)
    def seeded() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build()
            for name in ("transformer", "unconditional_transformer"):
                if hasattr(pipe, name):
                    wake(getattr(pipe, name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return seeded


@torch.no_grad()
def wake(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Give every parameter that is exactly zero a small random value."""
    model.eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=scale)


@torch.no_grad()
def amplify(model: torch.nn.Module, factor: float = 3**0.5) -> None:
    """Scale weights up: with the default initialisation a linear map then keeps the variance of its input."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)


def absent(cls: type, **components) -> DiffusionPipeline:
    """A pipeline whose components are None but for those given."""
    needed = inspect.signature(cls.__init__).parameters.values()
    missing = [p.name for p in needed if p.name != "self" and p.default is p.empty]
    return cls(**{**dict.fromkeys(missing), **components})


def texts(name: str, rows: int, *shape: int) -> torch.Tensor:
    """Random features, seeded by name and row."""
    seeds = [zlib.crc32(f"{name}{row}".encode()) for row in range(rows)]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def pair(name: str, rows: int, *shape: int) -> dict:
    """Random features for an argument and its negative."""
    return {key: texts(key, rows, *shape) for key in (name, f"negative_{name}")}


def masks(name: str, rows: int, tokens: int = TOKENS) -> dict:
    """Full masks for an argument and its negative."""
    return {key: torch.ones(rows, tokens, dtype=torch.long) for key in (name, f"negative_{name}")}


def autoencoder() -> AutoencoderKL:
    """An autoencoder of factor 8."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
    )


def flow(**settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


@tiny
def lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(16, 8, 8),
        cap_feat_dim=FEATURES,
    )
    return absent(Lumina2Pipeline, transformer=transformer, scheduler=flow())


def lumina2_call(rows):
    return {
        **SIZE,
        "guidance_scale": 3.0,
        **pair("prompt_embeds", rows, TOKENS, FEATURES),
        **masks("prompt_attention_mask", rows),
    }


def ragged_call(rows):
    """Row r has TOKENS - r words; the negatives have 4."""
    call = lumina2_call(rows)
    lengths = torch.arange(TOKENS, TOKENS - rows, -1)
    call["prompt_attention_mask"] = (torch.arange(TOKENS) < lengths[:, None]).long()
    call["negative_prompt_attention_mask"] = (torch.arange(TOKENS) < 4).long().expand(rows, -1)
    return call


@tiny
def lumina():
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=FEATURES,
    )
    torch.nn.init.normal_(transformer.pad_token)
    return absent(LuminaPipeline, transformer=transformer, scheduler=flow())


@tiny
def chroma():
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return absent(ChromaPipeline, transformer=transformer, scheduler=flow())


def chroma_call(rows):
    call = lumina2_call(rows)
    return {key: value.float() if "mask" in key else value for key, value in call.items()}


def cogview3(scheduler):
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=FEATURES,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return absent(CogView3PlusPipeline, transformer=transformer, scheduler=scheduler)


@tiny
def cogview3_ddim():
    return cogview3(CogVideoXDDIMScheduler())


@tiny
def cogview3_dpm():
    return cogview3(CogVideoXDPMScheduler())


def guided_call(rows):
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, TOKENS, FEATURES)}


def cogview3_call(rows):
    """Without a negative prompt the pipeline takes zeros, whatever negative embeddings it is given."""
    return {key: value for key, value in guided_call(rows).items() if not key.startswith("negative")}


@tiny
def cogview4():
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=FEATURES,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return absent(CogView4Pipeline, transformer=transformer, scheduler=flow())


@tiny
def glm_image():
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=FEATURES,
        time_embed_dim=8,
        condition_dim=2,
        prior_vq_quantizer_codebook_size=64,
    )
    return absent(GlmImagePipeline, transformer=transformer, scheduler=flow())


def glm_image_call(rows):
    prior = (texts("prior", rows, GRID[0] * GRID[1]) * 16).long() % 64
    return {**guided_call(rows), "prior_token_ids": prior}


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
def hunyuan_image():
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=FEATURES,
        text_embed_2_dim=10,
        rope_axes_dim=(8, 8),
    )
    guiders = {"guider": AdaptiveProjectedMixGuidance(), "ocr_guider": AdaptiveProjectedMixGuidance()}
    return absent(HunyuanImagePipeline, transformer=transformer, scheduler=flow(), **guiders)


def hunyuan_image_call(rows):
    return {
        **SIZE,
        "height": 128,
        "width": 192,
        **pair("prompt_embeds", rows, TOKENS, FEATURES),
        **masks("prompt_embeds_mask", rows),
        **pair("prompt_embeds_2", rows, SECOND, 10),
        **masks("prompt_embeds_mask_2", rows, SECOND),
    }


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
def bria():
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=[4, 6, 6],
    )
    return absent(BriaPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())


@tiny
def bria_fibo():
    transformer = BriaFiboTransformer2DModel(
        in_channels=5,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=8,
    )
    encoder = SmolLM3Config(
        vocab_size=104,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    parts = {"text_encoder": SmolLM3ForCausalLM(encoder).eval(), "tokenizer": tokenizer("$A")}
    return absent(BriaFiboPipeline, transformer=transformer, scheduler=flow(), **parts)


def bria_fibo_call(rows):
    return {**SIZE, "guidance_scale": 3.0, "prompt": PROMPTS[:rows], "negative_prompt": NEGATIVES[:rows]}


@tiny
def ovis():
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(4, 6, 6),
    )
    return absent(OvisImagePipeline, transformer=transformer, scheduler=flow())


def ovis_call(rows):
    return {**guided_call(rows), "negative_prompt": None}


@tiny
def longcat():
    """The pipeline counts prompts before it looks for embeddings, so that it must be told their number."""
    transformer = LongCatImageTransformer2DModel(
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        pooled_projection_dim=FEATURES,
        axes_dims_rope=[4, 6, 6],
    )
    pipe = absent(LongCatImagePipeline, transformer=transformer, scheduler=flow())
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, prompt_embeds, **rest: encode(
        [""] * len(prompt_embeds), prompt_embeds=prompt_embeds, **rest
    )
    return pipe


def longcat_call(rows):
    return {**guided_call(rows), "enable_prompt_rewrite": False}


@tiny
def prx():
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=FEATURES, hidden_size=32, num_heads=2, depth=3, axes_dim=[8, 8]
    )
    return absent(PRXPipeline, transformer=transformer, scheduler=flow())


def prx_call(rows):
    full = {key: value.bool() for key, value in masks("prompt_attention_mask", rows).items()}
    return {**guided_call(rows), **full, "use_resolution_binning": False}


def unguided_call(rows):
    """With guidance the pipeline hands two times to the model, which serve one prompt only."""
    return {**prx_call(rows), "guidance_scale": 1.0}


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


@tiny
def ernie():
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        text_in_dim=FEATURES,
        rope_axes_dim=(4, 6, 6),
    )
    return absent(ErnieImagePipeline, transformer=transformer, scheduler=flow())


def ernie_call(rows):
    call = ovis_call(rows)
    return {key: list(value) if torch.is_tensor(value) else value for key, value in call.items()}


@tiny
def krea2():
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=FEATURES,
        num_text_layers=4,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=20,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=2,
        axes_dims_rope=(4, 6, 6),
    )
    return absent(Krea2Pipeline, transformer=transformer, scheduler=flow())


def krea2_call(rows):
    full = {key: value.bool() for key, value in masks("prompt_embeds_mask", rows).items()}
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, TOKENS, 4, FEATURES), **full}


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


def nucleus_call(rows):
    return {**guided_call(rows), **masks("prompt_embeds_mask", rows)}


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


class Words:
    """A tokenizer of the last TOKENS words of a text."""

    model_max_length = TOKENS

    def __call__(self, text: str) -> SimpleNamespace:
        words = text.split()[-TOKENS:]
        return SimpleNamespace(input_ids=[3 + zlib.crc32(word.encode()) % 60 for word in words])


@tiny
def omnigen():
    """Without torchvision the pipeline can be built only with a stand-in for its image transforms."""
    transformer = OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        num_layers=3,
        pad_token_id=0,
        vocab_size=64,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": [1.0] * 10, "long_factor": [1.0] * 10},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    scheduler = flow(invert_sigmas=True, num_train_timesteps=1)
    with (
        mock.patch.object(processor_omnigen, "transforms", create=True),
        mock.patch.object(
            pipeline_omnigen, "OmniGenMultiModalProcessor", processor_omnigen.OmniGenMultiModalProcessor, create=True
        ),
    ):
        parts = {"scheduler": scheduler, "tokenizer": Words(), "vae": autoencoder()}
        return absent(OmniGenPipeline, transformer=transformer, **parts)


def omnigen_call(rows):
    return {**SIZE, "guidance_scale": 3.0, "prompt": SENTENCES[:rows]}


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


@tiny
def bria_fibo2():
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=FEATURES,
        injection_layer_ids=(0, 2),
        perceiver_num_layers=2,
        min_num_gist_tokens=6,
        max_num_gist_tokens=16,
        gist_step=2,
        gist_min_text_len=8,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 8, 8),
    )
    return absent(BriaFibo2Pipeline, transformer=transformer, scheduler=flow())


def bria_fibo2_call(rows):
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, 3, TOKENS, FEATURES)}


class Letters(torch.nn.Embedding):
    """A text encoder that knows letters only."""

    device = torch.device("cpu")


@tiny
def ideogram4():
    """A second transformer without text makes the unconditional call."""
    settings = {
        "in_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "adaln_dim": 8,
        "llm_features_dim": FEATURES,
        "mrope_section": (4, 2, 2),
    }
    letters = tokenizer("$A")
    letters.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    pipe = absent(
        Ideogram4Pipeline,
        transformer=Ideogram4Transformer2DModel(**settings),
        unconditional_transformer=Ideogram4Transformer2DModel(**settings),
        scheduler=flow(),
        text_encoder=Letters(104, FEATURES),
        tokenizer=letters,
    )
    pipe._get_text_encoder_hidden_states = lambda encoder, tokens, *_: [encoder(tokens)]
    return pipe


def ideogram4_call(rows):
    call = {"guidance_scale": 3.0, "guidance_schedule": None, "max_sequence_length": TOKENS}
    return {**SIZE, **call, "prompt": PROMPTS[:rows]}


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
    return {**lumina2_call(rows), "height": 128, "width": 192, "num_frames": 9}


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


@tiny
def hunyuan_video():
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=FEATURES,
        pooled_projection_dim=10,
        rope_axes_dim=(4, 6, 6),
    )
    return absent(HunyuanVideoPipeline, transformer=transformer, scheduler=flow())


def hunyuan_video_call(rows):
    return {
        **SIZE,
        "num_frames": 5,
        "prompt_embeds": texts("prompt_embeds", rows, TOKENS, FEATURES),
        "pooled_prompt_embeds": texts("pooled", rows, 10),
        "prompt_attention_mask": torch.ones(rows, TOKENS, dtype=torch.long),
    }


ENTRIES = (
    Entry("lumina2", "Lumina2Transformer2DModel", lumina2, lumina2_call, GRID, SPLIT, TOKENS, 7),
    Entry("lumina2-ragged", "Lumina2Transformer2DModel", lumina2, ragged_call, GRID, SPLIT, TOKENS, 7),
    Entry("lumina", "LuminaNextDiT2DModel", lumina, lumina2_call, GRID, (("cond", "uncond"),), None, 3),
    Entry("chroma", "ChromaTransformer2DModel", chroma, chroma_call, GRID, SPLIT, TOKENS, 5),
    Entry("cogview3", "CogView3PlusTransformer2DModel", cogview3_ddim, cogview3_call, GRID, JOINT, TOKENS, 3),
    Entry("cogview3-dpm", "CogView3PlusTransformer2DModel", cogview3_dpm, cogview3_call, GRID, JOINT, TOKENS, 3),
    Entry("cogview4", "CogView4Transformer2DModel", cogview4, guided_call, GRID, SPLIT, TOKENS, 3),
    Entry("glm_image", "GlmImageTransformer2DModel", glm_image, glm_image_call, GRID, SPLIT, TOKENS, 3),
    Entry("hunyuan_dit", "HunyuanDiT2DModel", hunyuan_dit, hunyuan_dit_call, GRID, JOINT, None, 6),
    Entry("hunyuan_image", "HunyuanImageTransformer2DModel", hunyuan_image, hunyuan_image_call, GRID, SPLIT, 12, 6),
    Entry("aura_flow", "AuraFlowTransformer2DModel", aura_flow, lumina2_call, GRID, JOINT, 8 + TOKENS, 5),
    Entry("hidream", "HiDreamImageTransformer2DModel", hidream, hidream_call, GRID, JOINT, TOKENS + 2 * SECOND, 5),
    Entry("bria", "BriaTransformer2DModel", bria, guided_call, GRID, JOINT, TOKENS, 5),
    Entry("bria_fibo", "BriaFiboTransformer2DModel", bria_fibo, bria_fibo_call, GRID, JOINT, TOKENS, 5),
    Entry("ovis", "OvisImageTransformer2DModel", ovis, ovis_call, GRID, SPLIT, TOKENS, 5),
    Entry("longcat", "LongCatImageTransformer2DModel", longcat, longcat_call, GRID, SPLIT, TOKENS, 5),
    Entry("prx", "PRXTransformer2DModel", prx, prx_call, GRID, JOINT, None, 3, rows=1),
    Entry("prx-unguided", "PRXTransformer2DModel", prx, unguided_call, GRID, (("cond",),), None, 3),
    Entry("kandinsky5", "Kandinsky5Transformer3DModel", kandinsky5, kandinsky5_call, GRID, SPLIT, TOKENS, 5),
    Entry("ernie", "ErnieImageTransformer2DModel", ernie, ernie_call, GRID, JOINT, TOKENS, 3),
    Entry("krea2", "Krea2Transformer2DModel", krea2, krea2_call, GRID, SPLIT, TOKENS, 3),
    Entry("nucleus", "NucleusMoEImageTransformer2DModel", nucleus, nucleus_call, GRID, SPLIT, None, 5),
    Entry("cosmos2", "CosmosTransformer3DModel", cosmos2, guided_call, GRID, SPLIT, None, 3),
    Entry("omnigen", "OmniGenTransformer2DModel", omnigen, omnigen_call, GRID, (("cond", "uncond"),), TOKENS + 1, 3),
    Entry("joy_image", "JoyImageEditTransformer3DModel", joy_image, nucleus_call, GRID, SPLIT, TOKENS, 3),
    Entry("bria_fibo2", "BriaFibo2Transformer2DModel", bria_fibo2, bria_fibo2_call, GRID, SPLIT, 6, 5),
    Entry("ideogram4", "Ideogram4Transformer2DModel", ideogram4, ideogram4_call, GRID, (("cond",),), TOKENS, 3),
)

VIDEOS = (  # their grid is (frames, h, w)
    Entry("wan", "WanTransformer3DModel", wan, video_call, (2, *GRID), SPLIT, None, 3),
    Entry("ltx", "LTXVideoTransformer3DModel", ltx, ltx_call, (2, *GRID), JOINT, None, 3),
    Entry("cogvideox", "CogVideoXTransformer3DModel", cogvideox, video_call, (2, *GRID), JOINT, TOKENS, 3),
    Entry(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        hunyuan_video,
        hunyuan_video_call,
        (2, *GRID),
        (("cond",),),
        TOKENS,
        6,
    ),
)
