"""Starts what no command starts on a machine like this: ``start.py head ARGUMENTS...``, or ``start.py controller``."""

import inspect
import os
import sys
import time
from pathlib import Path

PATIENCE = float(os.environ["NDIF_TEST_PATIENCE"])  # seconds

# Files in which Ray's agents tell their ports -> the option that fixes the port. Its node waits 15 s for them, which
# no option changes; what is fixed can be written down beforehand.
PORTS = {
    "metrics_agent_port": "--dashboard-agent-grpc-port",
    "metrics_export_port": "--metrics-export-port",
    "dashboard_agent_listen_port": "--dashboard-agent-listen-port",
    "runtime_env_agent_port": "--runtime-env-agent-port",
}


def head(arguments):
    """``ray start`` on a busy machine."""
    from ray._private import services
    from ray.scripts.scripts import cli

    given = dict(one.split("=", 1) for one in arguments if "=" in one)
    start_raylet, get_node = services.start_raylet, services.get_node

    def start_with_ports(*args, **kwargs):
        asked = inspect.signature(start_raylet).bind(*args, **kwargs).arguments
        for name, option in PORTS.items():
            Path(asked["session_dir"], f"{name}_{asked['node_id']}").write_text(given[option])
        return start_raylet(*args, **kwargs)

    def wait_for_node(*args):
        """Ray itself waits 30 s for the first node."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    services.start_raylet, services.get_node = start_with_ports, wait_for_node
    cli(["start", "--head", *arguments])


def controller(_):
    """The actor that places models; it outlives this process."""
    import ray
    from ndif.services.ray.deployments.controller.controller import app

    ray.init(address=os.environ["NDIF_RAY_ADDRESS"], namespace="NDIF", logging_level="error")
    app()
    ray.get(ray.get_actor("Controller").__ray_ready__.remote(), timeout=PATIENCE)


if __name__ == "__main__":
    {"head": head, "controller": controller}[sys.argv[1]](sys.argv[2:])
