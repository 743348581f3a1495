"""A second device that every machine has, and a transformer spread over both as accelerate's device maps spread it.

Tensors of it are in main memory. They refuse, as those of a GPU do, to meet tensors that are on no such device.
"""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE, THERE = torch.device("cpu"), torch.device("meta")  # a name that torch knows; values are there all the same
MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_")  # as with a GPU


class Far(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device=THERE, **layout)  # noqa: SLF001 torch's way

    def __init__(self, near):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001 torch's way

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):
        return self.near.tolist()


class TwoDevices(TorchDispatchMode):
    """While it is entered, new tensors can be made there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """What a function of torch makes. Raises where tensors of two devices meet."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    far = any(isinstance(one, Far) for one in tensors)
    if far and function.name() not in MAY_MIX and not all(isinstance(one, Far) for one in tensors if one.ndim):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two in {function.name()}")
    asked = kwargs.get("device")
    goes = far if asked is None else torch.device(asked) == THERE
    if goes and asked is not None:
        kwargs = {**kwargs, "device": HERE}
    args_here, kwargs_here = tree_map(lambda one: one.near if isinstance(one, Far) else one, (args, kwargs))
    made = function(*args_here, **kwargs_here)
    if function._schema.is_mutable:  # noqa: SLF001 as above
        return args[0]
    return tree_map(lambda one: Far(one) if goes and isinstance(one, torch.Tensor) else one, made)


def spread(transformer, stacks):
    """Puts the later half of every stack there, with accelerate's hooks, which move what blocks are given.

    stacks: lists of blocks.
    """
    later = [block for blocks in stacks for block in blocks[len(blocks) // 2 :]]
    for module in [part for block in later for part in block.modules()]:
        weights, buffers = vars(module)["_parameters"], vars(module)["_buffers"]
        weights.update({name: torch.nn.Parameter(Far(one.detach()), False) for name, one in held(weights)})
        buffers.update({name: Far(one) for name, one in held(buffers)})
    for block in later:
        _move_arguments(block, THERE)
    others = [part for name, part in transformer.named_modules() if name and part.__class__ is not torch.nn.ModuleList]
    for module in others:
        if not any(module is part for block in later for part in block.modules()):
            _move_arguments(module, HERE)
    _move_arguments(transformer, HERE, back=True)


def held(tensors):
    return [(name, one) for name, one in tensors.items() if one is not None]


def _move_arguments(module, device, *, back=False):
    """The hook that ``accelerate.dispatch_model`` attaches. back: whether results go where arguments came from."""
    hook = AlignDevicesHook(execution_device=device, io_same_device=back)
    hook.init_hook = lambda module: module  # weights lie where they belong
    add_hook_to_module(module, hook)
