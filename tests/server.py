"""A stand-in for a server: runs a serialised request in a process where dit_lens cannot be imported.

python server.py MODEL_KEY REQUEST RESULT
"""

import pathlib
import sys


class Refuse:
    """dit_lens is not installed here, whatever the environment says."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dit_lens", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}")


def serve(key, request, result):
    """Loads the model, runs the request as a server does, and writes what it stored."""
    import torch
    from nnsight.modeling.mixins.remotable import Remotable
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import inc
    from safetensors.torch import save_file

    model = Remotable.from_model_key(key, dispatch=True)
    tracer = RequestModel.deserialize(pathlib.Path(request).read_bytes(), model._remoteable_persistent_objects())
    inc()  # as a server does around the body of a trace
    tracer.execute(tracer.info.code)
    variables = tracer.info.frame.f_locals
    reads = {repr(key): value.contiguous() for key, value in variables["store"]["reads"].items()}
    assert isinstance(variables["store"]["clock"][0][2], float)
    assert torch.is_tensor(variables["store"]["touched"][0][-1])
    save_file({**reads, "latents": variables["results"][0].images.contiguous()}, result)


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    serve(*sys.argv[1:])
    assert not [name for name in sys.modules if name.startswith("dit_lens")]
