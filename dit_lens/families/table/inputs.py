"""What the arguments of pipelines hold, by name: whose it is where a run goes through the pipeline in batches.

The rows of pipelines say where a name means something else there. An argument that is in neither is unknown.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from dit_lens.families.arguments import belongs_to_prompts, holds_text
from dit_lens.families.row import Pipeline

# "whole": the same for every row, whatever it holds.
# "texts": one for each prompt, or one for all.
# "prompts": one entry for each prompt: embeddings, their masks, class labels.
# "latents": one entry for each row.
# "row images", "prompt images": one image for all, or one for each row or prompt, as in Pipeline.
# "image": one for all; whose several are is not known.
# "features": of an image, tensors with one row each that stand for all rows; whose more are is not known.
# "settings": a mapping; numbers and words in it are the same for every row, and whose anything else is, is not known.
# "function": it is called with all rows.
# "unknown": a number or word is the same for every row, and whose anything else is, is not known.
Holding: TypeAlias = Literal[
    "whole",
    "texts",
    "prompts",
    "latents",
    "row images",
    "prompt images",
    "image",
    "features",
    "settings",
    "function",
    "unknown",
]

_NAMES: dict[Holding, str] = {
    "whole": """
        generator num_inference_steps num_images_per_prompt num_videos_per_prompt output_type return_dict seed
        height width resolution output_resolution original_size target_size crops_coords_top_left max_area
        max_input_image_size use_input_image_size_as_output use_resolution_binning _auto_resize padding_mask_crop
        num_frames fps frame_rate layers
        sigmas timesteps mu std eta strength denoise_strength max_timesteps intermediate_timesteps
        guidance_scale guidance_scale_2 true_cfg_scale img_guidance_scale distilled_guidance_scale guidance_rescale
        guidance_schedule cfg_normalization cfg_normalize cfg_renorm_min cfg_trunc_ratio cfg_truncation
        enable_cfg_renorm use_dynamic_cfg pag_scale pag_adaptive_scale skip_guidance_layers
        skip_layer_guidance_scale skip_layer_guidance_start skip_layer_guidance_stop
        controlnet_conditioning_scale control_guidance_start control_guidance_end control_mode
        controls_conditioning_scale
        max_sequence_length tokenizer_max_length clip_skip clean_caption skip_text_cleaning system_prompt
        complex_human_instruction text_encoder_out_layers use_en_prompt enable_prompt_rewrite use_pe
        prompt_upsampling prompt_upsampling_temperature caption_upsample_temperature
        proportional_attn scaling_watershed do_patching clip_value normalize enable_denormalization return_index
        use_kv_cache render_text_images callback_steps callback_on_step_end_tensor_inputs
        augment_sigma sigma_conditioning input_frames_guidance image_cond_noise_scale image_embed_interleave
        num_latent_conditional_frames num_ar_conditional_frames num_ar_latent_conditional_frames
        num_frames_per_chunk conditional_frame_timestep
        upsampling_height upsampling_width upsampling_strength
        adain_factor cond_strength guiding_strength negative_index_strength skip_steps_sigma_threshold
        temporal_tile_size temporal_overlap temporal_overlap_cond_strength
        decode_horizontal_tiles decode_vertical_tiles decode_overlap
    """,
    "latents": "latents",
    "image": """
        image image_reference mask_image mask masked_image_latents control_image control_mask last_image cond_image
        ip_adapter_image negative_ip_adapter_image
    """,
    "features": "ip_adapter_image_embeds negative_ip_adapter_image_embeds image_embeds",
    "settings": "attention_kwargs joint_attention_kwargs prompt_template kwargs",
    "function": "callback callback_on_step_end",
    "unknown": """
        decode_timestep decode_noise_scale
        task_prompt content_prompt prompt_segments fonts text_images input_images
        video control_video control_video_latents conditions frame_index controls controlnet_pooled_projections
        guidance_latents negative_index_latents prior_token_image_ids source_image_grid_thw
    """,
}
INPUTS: dict[str, Holding] = {name: holding for holding, names in _NAMES.items() for name in names.split()}


def find_holding(pipeline: Pipeline, name: str) -> Holding:
    """What an argument of a pipeline holds.

    >>> usual = Pipeline("FluxPipeline", None)
    >>> [find_holding(usual, name) for name in ("prompt_2", "pooled_prompt_embeds", "strength", "new_argument")]
    ['texts', 'prompts', 'whole', 'unknown']
    """
    if name in pipeline.row_images:
        return "row images"
    if name in pipeline.prompt_images:
        return "prompt images"
    if name in pipeline.references:
        return "whole"
    if name in INPUTS:
        return INPUTS[name]
    if holds_text(name):
        return "texts"
    return "prompts" if belongs_to_prompts(name) else "unknown"
