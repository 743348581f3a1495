"""A whole NDIF server on one machine, on loopback: redis, an object store, Ray, NDIF's controller, its API, models."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

HERE = Path(__file__).parent
LONGEST = 40  # characters of Ray's folder: the paths of its sockets add 63 to it, and may have 107
# Ports that Ray would wait for no longer than some seconds, until whoever listens there has started.
AGENTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port")
ADOPT = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


class NotUpError(Exception):
    """A part of the server failed or was late. log: what it said."""

    def __init__(self, what: str, log: Path):
        super().__init__(what)
        self.log = log


class Cluster:
    """Comes up when it is entered; when it is left, for whatever reason, every process of it is ended.

    folder: with the environment in "venv"; it receives "logs" and what the services keep.
    patience: seconds in which each part has to be there.
    """

    def __init__(self, folder: Path, patience: float):
        self.folder, self.patience = folder, patience
        self.bin, self.logs, self.ray = folder / "venv" / "bin", folder / "logs", folder / "ray"
        if sys.platform != "linux":
            raise SystemExit("the processes of this server can be taken down on Linux only.")
        if shutil.which("redis-server") is None:
            raise SystemExit("redis-server is not there. Install it: apt-get install redis-server")
        if len(str(self.ray)) > LONGEST:
            raise SystemExit(f"{self.ray} is too long a path for Ray's sockets. Name a folder such as /tmp/ndif.")
        names = ("redis", "store", "ray", "dashboard", "api", *AGENTS)
        self.ports = dict(zip(names, find_ports(len(names)), strict=True))
        self.host = f"http://127.0.0.1:{self.ports['api']}"

    def __enter__(self):
        ctypes.CDLL(None).prctl(
            ADOPT, 1, 0, 0, 0
        )  # what loses its parent becomes a child of this process: none is lost
        for made in (self.logs, self.ray):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
        try:
            self.bring_up()
        except BaseException:
            end_processes()
            raise
        return self

    def __exit__(self, *_):
        end_processes()

    def bring_up(self) -> None:
        """Starts the services in the order in which they need each other."""
        redis, store, ray, board, api, *agents = self.ports.values()
        self.start("redis", "redis-server", "--port", redis, "--bind", "127.0.0.1", "--save", "", "--dir", self.folder)
        self.start("store", self.bin / "moto_server", "-H", "127.0.0.1", "-p", store)
        for name in ("redis", "store"):
            self.wait(name, lambda name=name: is_listening(self.ports[name]))
        self.finish(
            *("ray", self.bin / "python", HERE / "on_server" / "start.py", "head", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={ray}", f"--temp-dir={self.ray}", "--num-cpus=3"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={board}"),
            *(f"--{name}={port}" for name, port in zip(AGENTS, agents, strict=True)),
            *(
                "--num-gpus=1",
                "--object-store-memory=300000000",
            ),  # a GPU is pretended: NDIF places models on nothing else
            '--resources={"head":10,"cuda_memory_bytes":8000000000,"cpu_memory_bytes":8000000000}',
        )
        self.finish("controller", self.bin / "python", HERE / "on_server" / "start.py", "controller")
        settings = ("--config", "python:ndif.services.api.gunicorn_conf", "--bind", f"127.0.0.1:{api}")
        self.start("api", self.bin / "gunicorn", *settings, "ndif.services.api.app:app")
        self.wait("api", lambda: answers(f"{self.host}/connected"))

    def deploy(self, pipelines: list[Path]) -> None:
        """Has NDIF load pipelines; they are served when this returns."""
        models = [
            {
                "checkpoint": str(path),
                "model_key": "nnsight.modeling.diffusion.DiffusionModel:"
                + json.dumps({"repo_id": str(path), "revision": None}),
                "envoy_class": "nnsight.modeling.diffusion.DiffusionModel",
                "actor_class": "cpu_actor.CPUActor",
                "dtype": "float32",
                "size_bytes": 50_000_000,
                "padding_bias": 0,
                "execution_timeout_seconds": self.patience,
            }
            for path in pipelines
        ]
        asked = self.folder / "models.yaml"
        asked.write_text(json.dumps({"models": models}))  # which is YAML, too
        self.finish("deploy", self.bin / "ndif", "deploy", "-f", asked)

    @property
    def environment(self) -> dict[str, str]:
        """Of all services."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NDIF_", "RAY_"))}
        return {
            **inherited,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE / "on_server"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray takes the machine's own address for 127.0.0.1
            "RAY_prestart_worker_first_driver": "0",
            "RAY_worker_register_timeout_seconds": str(int(self.patience)),
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(self.patience)),
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(int(self.patience)),
            "NDIF_TEST_PATIENCE": str(self.patience),
            "NDIF_HOME": str(self.folder / "home"),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.ports['redis']}/",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{self.ports['store']}",
            "NDIF_RAY_ADDRESS": f"127.0.0.1:{self.ports['ray']}",
            "NDIF_RAY_TEMP_DIR": str(self.ray),
            "NDIF_API_HOST": "127.0.0.1",
            "NDIF_API_PORT": str(self.ports["api"]),
            "NDIF_API_WORKERS": "1",
            "NDIF_API_TIMEOUT": str(int(self.patience)),
            "NDIF_SANDBOX_POOL_SIZE": "1",
        }

    def start(self, name: str, *command: object) -> None:
        """Starts a service, which says what it says in the log of its name."""
        with self.log(name).open("wb") as log:
            running = subprocess.Popen(
                [*map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # Ctrl-C ends this process, and this process ends the others
            )
        self.running = {**getattr(self, "running", {}), name: running}

    def wait(self, name: str, ready) -> None:
        """Until a service is ready. Raises NotUpError if it ends before, or is late."""
        end = time.monotonic() + self.patience
        while not ready():
            if (code := self.running[name].poll()) is not None:
                raise NotUpError(f"{name} ended with {code}", self.log(name))
            if time.monotonic() > end:
                raise NotUpError(f"{name} was not there within {self.patience:.0f} s", self.log(name))
            time.sleep(0.5)

    def finish(self, name: str, *command: object) -> None:
        """Runs a command to its end. Raises NotUpError if it fails, or is late."""
        self.start(name, *command)
        self.wait(name, lambda: self.running[name].poll() == 0)

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def find_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=10):
            return True
    except (URLError, OSError):
        return False


def end_processes(grace: float = 15.0) -> None:
    """Ends every process that descends from this one: asked first, then killed. grace: seconds between the two."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        end = time.monotonic() + grace
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < end:
            for process in left:
                try:
                    ask(process)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=2)
    for number, handler in before.items():
        signal.signal(number, handler)
