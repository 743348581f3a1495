"""Tiny random pipelines of FLUX.1, FLUX.2 and their relatives."""

from diffusers import (
    AutoencoderKLFlux2,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from PIL import Image
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests.pipelines import tokenizer
from tests.zoo import Entry
from tests.zoo.parts import (
    COND,
    FEATURES,
    GRID,
    HEADS,
    JOINT,
    PROMPTS,
    SIZE,
    SPLIT,
    TOKENS,
    absent,
    autoencoder,
    flow,
    guided_call,
    masked_call,
    no_text_call,
    pair,
    texts,
    tiny,
)

NEGATIVES = ["blurred", "o trees"]


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
    call = masked_call(rows)
    return {key: value.float() if "mask" in key else value for key, value in call.items()}


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


ENTRIES = (
    Entry("chroma", "ChromaTransformer2DModel", chroma, chroma_call, GRID, SPLIT, TOKENS, 5),
    Entry("bria", "BriaTransformer2DModel", bria, guided_call, GRID, JOINT, TOKENS, 5),
    Entry("bria_fibo", "BriaFiboTransformer2DModel", bria_fibo, bria_fibo_call, GRID, JOINT, TOKENS, 5),
    Entry("ovis", "OvisImageTransformer2DModel", ovis, no_text_call, GRID, SPLIT, TOKENS, 5),
    Entry("longcat", "LongCatImageTransformer2DModel", longcat, longcat_call, GRID, SPLIT, TOKENS, 5),
    Entry("flux", "FluxTransformer2DModel", flux_true_cfg, flux_call, GRID, SPLIT, TOKENS, 5),
    Entry("flux-embedded", "FluxTransformer2DModel", flux_embedded, flux_embedded_call, GRID, COND, TOKENS, 5),
    Entry("flux2", "Flux2Transformer2DModel", flux2, unguided_call, GRID, COND, TOKENS, 5),
    Entry("klein", "Flux2Transformer2DModel", klein, klein_call, GRID, SPLIT, TOKENS, 5),
    Entry("klein-kv", "Flux2Transformer2DModel", klein_kv, klein_kv_call, GRID, COND, TOKENS, 5),
)
