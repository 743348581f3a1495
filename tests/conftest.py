"""Set before torch and the hub's client are imported: one thread a process, no look at the hub."""

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

sys.modules.setdefault("rfc3987_syntax", None)  # with which jsonschema checks addresses: its grammars take two seconds
settings.register_profile("thorough", max_examples=2500, deadline=None)  # --hypothesis-profile=thorough


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items):
    """The slow ones first, so that processes end together; of these the site last, since it shows what lessons drew.

    Tests of one pipeline of the zoo are of one process, which alone makes it; so are those of one file that are not
    slow, for what they share.
    """
    for item in items:
        module, chosen = getattr(item, "module", None), getattr(item, "callspec", None)
        if item.get_closest_marker("xdist_group") is not None:
            continue
        pipeline = chosen and chosen.params.get("zoo", chosen.params.get("name"))
        if pipeline and (hasattr(module, "zoo_of") or hasattr(module, "truth")):
            item.add_marker(pytest.mark.xdist_group(f"zoo-{pipeline}"))
        elif item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "site" in item.fixturenames))


def pytest_collection_finish():
    """What is imported by now stays, and the rest is looked through less often: garbage took a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def declared():
    """Ops that the test declares are gone after it."""
    from dit_lens.core.request.ops import EDITS, OPS

    before = [(known, dict(known)) for known in (OPS, EDITS)]
    yield
    for known, those in before:
        known.clear()
        known.update(those)


@pytest.fixture(scope="session", params=["true-cfg", "embedded"])
def embedded(request):
    """Whether guidance is embedded, as in FLUX.1-dev, or true classifier-free guidance."""
    return request.param == "embedded"


@pytest.fixture(scope="session")
def lens(embedded):
    """A lens over a tiny random FLUX of either form of guidance; its pipeline is as it was after every test."""
    from dit_lens import DiTLens
    from tests import pipelines

    return DiTLens(pipelines.flux(embedded=embedded), defaults=pipelines.call_for(embedded))


@pytest.fixture
def forwards(lens):
    """One entry for every forward pass of the transformer of ``lens``, which may be the test file's own."""
    found = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: found.append(1))
    yield found
    handle.remove()


@pytest.fixture(scope="session")
def plain(embedded):
    """The same pipeline, never wrapped."""
    from tests import pipelines

    return pipelines.flux(embedded=embedded)


@pytest.fixture(scope="session")
def cfg_lens():
    """A lens over a tiny random FLUX with true guidance."""
    from dit_lens import DiTLens
    from tests import pipelines

    return DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))


@pytest.fixture(scope="session")
def toy():
    """The trained toy."""
    from dit_lens import DiTLens

    lens = DiTLens.toy()
    lens.pipe.set_progress_bar_config(disable=True)
    return lens
