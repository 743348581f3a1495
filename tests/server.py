"""A stand-in for a server: runs a serialised request in a process where dit_lens cannot be imported.

python server.py MODEL_KEY REQUEST RESULT
"""

import io
import pathlib
import sys


class Refuse:
    """dit_lens is not installed here, whatever the environment says."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dit_lens", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}")


def serve(key, request, result):
    """Loads the model, runs the request as a server does, and sends back what was saved, as a server does."""
    import torch
    import zstandard
    from nnsight.modeling.mixins.remotable import Remotable
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import inc

    model = Remotable.from_model_key(key, dispatch=True)
    blob = pathlib.Path(request).read_bytes()
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=True)
    inc()  # as a server does around the body of a trace
    tracer.execute(tracer.info.code)
    variables = tracer.info.frame.f_locals
    answer = io.BytesIO()
    torch.save({name: variables[name] for name in ("store", "results")}, answer)
    pathlib.Path(result).write_bytes(zstandard.ZstdCompressor().compress(answer.getvalue()))


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    serve(*sys.argv[1:])
    assert not [name for name in sys.modules if name.startswith("dit_lens")]
