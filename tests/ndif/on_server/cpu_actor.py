"""NDIF's own model actor, sandbox included, less what needs a GPU; a deployment names it as its actor_class."""

import ray
import torch
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.mixins.remotable import Remotable

torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_, **__: None


class CPUDeployment(SandboxModelDeployment):
    """Loads where the GPU's actor would move the model to its cards."""

    def load_from_disk(self):
        torch.set_num_threads(1)
        model = Remotable.from_model_key(self.model_key, dispatch=True)
        model.pipeline.set_progress_bar_config(disable=True)
        model._module.requires_grad_(False)  # noqa: SLF001 as its parent
        return model


@ray.remote(num_cpus=0.1, max_restarts=-1)
class CPUActor(CPUDeployment):
    """What Ray starts."""
