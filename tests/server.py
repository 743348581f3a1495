"""A stand-in for a server: runs serialised requests in a process where dit_lens cannot be imported.

python server.py MODEL_KEY, then a line "REQUEST RESULT" of two files for each request; it answers "done", or why not.
"""

import io
import pathlib
import sys


class Refuse:
    """dit_lens is not installed here, whatever the environment says."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dit_lens", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}")


def serve(model, request, result):
    """Runs a request as a server does, and sends back what was saved, as a server does."""
    import torch
    import zstandard
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import inc

    blob = pathlib.Path(request).read_bytes()
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=True)
    inc()  # as a server does around the body of a trace
    tracer.execute(tracer.info.code)
    variables = tracer.info.frame.f_locals
    answer = io.BytesIO()
    torch.save({name: variables[name] for name in ("store", "results")}, answer)
    pathlib.Path(result).write_bytes(zstandard.ZstdCompressor().compress(answer.getvalue()))


def main(key):
    """Answers until nothing more is asked."""
    from nnsight.modeling.mixins.remotable import Remotable

    model = Remotable.from_model_key(key, dispatch=True)
    for line in sys.stdin:
        try:
            serve(model, *line.split())
        except Exception as failure:  # noqa: BLE001 whatever it is, the client is told
            print("failed:", str(failure).replace("\n", " "), flush=True)
        else:
            print("done", flush=True)
    assert not [name for name in sys.modules if name.startswith("dit_lens")]


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    main(*sys.argv[1:])
