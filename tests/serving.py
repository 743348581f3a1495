"""Starts servers as whole processes; what they import is imported once, and each is a fork.

For each a line of JSON: a pipeline's folder, options of serve, and a file for what it says; the answer is its process.
Where there is code in place of a pipeline, it is a client.
"""

import json
import os
import signal
import sys


def child(order):
    """One server, in its own process."""
    import torch

    from dit_lens.errors import DitLensError
    from dit_lens.server.serve import ServeOptions, serve

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)

    if "code" in order:
        exec(order["code"])
        sys.stdout.flush()
        os._exit(0)
    options = ServeOptions(**{"port": 0, "dtype": torch.float32, **order["options"]})
    try:
        serve(order["pipeline"], options, lambda line: print(line, flush=True))
    except DitLensError as problem:
        print(f"dit-lens: {problem}", flush=True)
        os._exit(2)
    os._exit(0)


def main():
    """Forks for every line; what has ended is put away by the system."""
    from dit_lens.server import serve

    serve.prepare()
    import nnsight.modeling.diffusion  # noqa: F401
    import uvicorn.protocols.websockets.websockets_sansio_impl  # noqa: F401
    from diffusers import AutoencoderKL, FluxPipeline  # noqa: F401
    from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel  # noqa: F401

    import dit_lens.core.jobs
    import dit_lens.lens
    import dit_lens.server.app
    import dit_lens.server.work  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if not (process := os.fork()):
            sys.stdin.close()
            child(json.loads(line))
        print(process, flush=True)


if __name__ == "__main__":
    main()
