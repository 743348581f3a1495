"""A stand-in for a server: runs serialised requests in a process where dit_lens cannot be imported.

For each request a line of JSON: the model's key, the file of the request, a file for the result. It answers null, or
how it failed. As on a server, only some models are there: those in its working directory.
"""

import io
import json
import pathlib
import sys
import traceback


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
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=True)  # noqa: SLF001
    inc()  # as a server does around the body of a trace
    tracer.execute(tracer.info.code)
    variables = tracer.info.frame.f_locals
    answer = io.BytesIO()
    torch.save({name: variables[name] for name in ("store", "results")}, answer)
    pathlib.Path(result).write_bytes(zstandard.ZstdCompressor().compress(answer.getvalue()))


def load(key):
    """The model of a key."""
    from nnsight.modeling.mixins.remotable import Remotable

    if not pathlib.Path(json.loads(key.partition(":")[2])["repo_id"]).is_relative_to(pathlib.Path.cwd()):
        raise LookupError(f"{key} is not here")
    return Remotable.from_model_key(key, dispatch=True)


def main():
    """Answers until nothing more is asked."""
    models = {}
    for line in sys.stdin:
        key, request, result = json.loads(line)
        try:
            models[key] = models.get(key) or load(key)
            serve(models[key], request, result)
        except Exception:  # noqa: BLE001 whatever it is, the client is told
            print(json.dumps(traceback.format_exc()), flush=True)
        else:
            print(json.dumps(None), flush=True)
    assert not [name for name in sys.modules if name.startswith("dit_lens")]


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    main()
