"""A stand-in for a server: runs a serialised request in a process where dit_lens cannot be imported.

python server.py MODEL_KEY REQUEST RESULT
"""

import sys


class Refuse:
    """dit_lens is not installed here, whatever the environment says."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dit_lens", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Refuse())

if __name__ == "__main__":
    import pathlib

    import torch
    from nnsight.modeling.mixins.remotable import Remotable
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import inc
    from safetensors.torch import save_file

    model = Remotable.from_model_key(sys.argv[1], dispatch=True)
    tracer = RequestModel.deserialize(pathlib.Path(sys.argv[2]).read_bytes(), model._remoteable_persistent_objects())
    inc()  # as a server does around the body of a trace
    tracer.execute(tracer.info.code)
    variables = tracer.info.frame.f_locals
    reads = {repr(key): value.contiguous() for key, value in variables["store"]["reads"].items()}
    save_file({**reads, "latents": variables["results"][0].images.contiguous()}, sys.argv[3])
    assert not [name for name in sys.modules if name.startswith("dit_lens")]
    assert isinstance(variables["store"]["clock"][0][2], float)
    assert torch.is_tensor(variables["store"]["touched"][0][-1])
