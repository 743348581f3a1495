"""The truth by plain torch hooks, written for FLUX by hand: it shares nothing with the library's plan or families."""

from collections import defaultdict

import torch


def blocks_of(pipe):
    """Every block in execution order."""
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, prompts, seeds, call, edit=None):
    """Runs the plain pipeline; returns its images and, for every forward pass, what passed through.

    A record maps (block, "img" | "txt", "pre" | "post"), "final", "velocity" and "timestep" to clones.
    edit: fn(call, block, stream, tensor) -> tensor or None, applied to block outputs.
    """
    records = defaultdict(dict)
    state = {"call": -1}
    handles = []

    def begin(module, args, kwargs):
        state["call"] += 1
        records[state["call"]]["timestep"] = kwargs["timestep"].clone()

    def enter(index):
        def hook(module, args, kwargs):
            for stream, name in (("img", "hidden_states"), ("txt", "encoder_hidden_states")):
                records[state["call"]][index, stream, "pre"] = kwargs[name].clone()

        return hook

    def leave(index):
        def hook(module, args, kwargs, output):
            txt, img = output
            if edit is not None:
                new_img, new_txt = (
                    edit(state["call"], index, stream, x.clone()) for stream, x in (("img", img), ("txt", txt))
                )
                img = img if new_img is None else new_img
                txt = txt if new_txt is None else new_txt
            records[state["call"]][index, "img", "post"] = img.clone()
            records[state["call"]][index, "txt", "post"] = txt.clone()
            return txt, img

        return hook

    handles.append(pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True))
    for index, block in enumerate(blocks_of(pipe)):
        handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(block.register_forward_hook(leave(index), with_kwargs=True))
    handles.append(
        pipe.transformer.norm_out.register_forward_pre_hook(
            lambda m, args: records[state["call"]].__setitem__("final", args[0].clone())
        )
    )
    handles.append(
        pipe.transformer.register_forward_hook(
            lambda m, args, output: records[state["call"]].__setitem__("velocity", output[0].clone())
        )
    )
    try:
        call = {**call, "generator": generators(seeds)}
        if isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
        images = pipe(list(prompts), **call).images
    finally:
        for handle in handles:
            handle.remove()
    return images, [records[i] for i in range(state["call"] + 1)]
