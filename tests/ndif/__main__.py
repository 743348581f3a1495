"""Brings up a whole NDIF server with tiny pipelines, compares what it gives with what is computed here, ends it.

    python -m tests.ndif FOLDER [arguments of pytest]

All that is installed, kept and logged lies in FOLDER (a short path, such as /tmp/ndif). Needs redis-server.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from tests.ndif.cluster import HERE, Cluster, NotUpError

REQUIREMENTS = HERE / "requirements.txt"


def main() -> int:
    """The exit code of the tests, or 1 where the server did not come up."""
    parser = argparse.ArgumentParser(
        "python -m tests.ndif", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pipelines", nargs="+", choices=("flux", "sd3", "qwen"), default=["flux", "sd3", "qwen"])
    parser.add_argument("--patience", type=float, default=900.0, help="seconds in which each part has to be there")
    given, rest = parser.parse_known_args()
    folder = given.folder.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cluster = Cluster(folder, given.patience)
    install(folder / "venv")
    say("making pipelines")
    pipelines = make_pipelines(folder / "models", given.pipelines)
    try:
        say("starting redis, an object store, Ray, the controller and the API")
        with cluster:
            say(f"loading {', '.join(pipelines)} at {cluster.host}")
            cluster.deploy(list(pipelines.values()))
            say("comparing")
            code = compare(cluster.host, pipelines, rest)
            say("taking it down")
    except KeyboardInterrupt:
        say("interrupted, and taken down")
        return 128 + signal.SIGINT
    except NotUpError as failure:
        with failure.log.open(errors="replace") as log:
            print(f"\n{failure}. Last lines of {failure.log}:\n\n{''.join(deque(log, 60))}", file=sys.stderr)
        print(
            f"The others are in {cluster.logs}, those of Ray's workers in {cluster.ray}/session_latest/logs.",
            file=sys.stderr,
        )
        return 1
    say("done" if code == 0 else f"the tests failed; logs are in {cluster.logs}")
    return code


def install(venv: Path) -> None:
    """The environment of the server, which has no dit_lens; made once, and again when the requirements change."""
    stamp, asked = venv / ".installed", REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == asked:
        return
    say(f"installing {REQUIREMENTS.name} into {venv}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    # ndif asks for Python 3.12 and runs on 3.11.
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--ignore-requires-python"]
    subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True)
    stamp.write_text(asked)


def make_pipelines(folder: Path, names: list[str]) -> dict[str, Path]:
    """Folders of pipelines by name."""
    from dit_lens import toys
    from tests import pipelines, texts

    tiny = {"flux": pipelines.flux, "sd3": texts.sd3}
    for name in tiny.keys() & set(names):
        tiny[name]().save_pretrained(folder / name)
    return {name: folder / name if name in tiny else Path(toys.path("qwen-image")) for name in names}


def compare(host: str, pipelines: dict[str, Path], arguments: list[str]) -> int:
    """Runs the tests of this folder; returns pytest's exit code."""
    where = {f"DIT_LENS_NDIF_{name.upper()}": str(path) for name, path in pipelines.items()}
    environment = {**os.environ, **where, "DIT_LENS_NDIF": host, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", HERE, "-p", "no:cacheprovider", "--durations=5", *arguments]
    with subprocess.Popen(command, env=environment, cwd=HERE.parents[1]) as tests:
        return tests.wait()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
