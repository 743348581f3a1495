"""Tiny random FLUX pipelines, built from config classes alone: no download, a few thousand parameters."""

import string

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

LENGTH = 24  # text tokens
STEPS = 2
CALL = {"height": 32, "width": 48, "num_inference_steps": STEPS, "max_sequence_length": LENGTH}
EMBEDDED = {**CALL, "guidance_scale": 3.0}
TRUE_CFG = {**CALL, "true_cfg_scale": 2.5, "negative_prompt": "bad"}
GRID = (8, 12)
WIDTH = 32
DEPTH = 5


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token a letter."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {mark: i for i, mark in enumerate([*specials, *string.printable])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def flux(*, embedded: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """2 double and 3 single blocks of width 32; 32 x 48 pixels make a grid of 8 x 12 tokens."""
    torch.manual_seed(seed)
    words = 104
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            shift_factor=0.1,
            sample_size=32,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=16,
                intermediate_size=16,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        tokenizer=tokenizer("<s> $A </s>"),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=2,
            )
        ),
        tokenizer_2=tokenizer("$A </s>"),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=embedded,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)  # which takes as long as a part


def call_for(embedded: bool) -> dict:
    """A call with guidance on, in either form."""
    return dict(EMBEDDED if embedded else TRUE_CFG)
