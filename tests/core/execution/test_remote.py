"""A lens on a model of a server gives what a lens on the model gives; the server knows nothing of dit_lens."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import nnsight
import numpy as np
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

import dit_lens as dl
from dit_lens import Apply, AttentionMask, DiTLens, Feature, Guide, Read, ReadFeatures, Scale, Swap, Zero, toys
from dit_lens.core.execution.connection import Connection
from dit_lens.core.execution.execute import move_answer
from dit_lens.core.execution.later import Later
from dit_lens.core.execution.remote import RemoteEngine, pipeline_without_weights
from dit_lens.dictionaries import Dictionary
from dit_lens.errors import ExecutionError, OpError, PromptError, SiteError, StoreError
from tests import pipelines

HOST = "http://server.test"


@pytest.fixture
def served(monkeypatch, process, tmp_path):
    """The way to a server and back, with files in place of the connection; what was sent: (model key, bytes)."""
    sent = []

    def request(backend, envelope, tracer):
        blob = backend._serialize(tracer)  # noqa: SLF001
        sent.append((envelope.model_key, blob))
        (tmp_path / "request").write_bytes(blob)
        order = [envelope.model_key, str(tmp_path / "request"), str(tmp_path / "result")]
        print(json.dumps(order), file=process.stdin, flush=True)
        if failure := json.loads(process.stdout.readline()):
            raise RemoteError(failure)
        return backend.finalize((tmp_path / "result").read_bytes())

    monkeypatch.setattr(Connection, "request", request)
    monkeypatch.setattr(Later, "ask_about", lambda _: None)  # as of a server that has no dit_lens
    monkeypatch.setattr("nnsight.ndif.pull_env", lambda: None)  # it would send this checkout, as not installed
    return sent


@pytest.fixture
def lenses(folder):
    """On the model here, and on the same of a server."""
    both = DiTLens.from_pretrained(folder), DiTLens.remote(folder, host=HOST)
    for lens in both:
        lens.pipe.set_progress_bar_config(disable=True)
        lens.defaults = dict(pipelines.TRUE_CFG)
    return both


def double(tensor, hook):
    return tensor * 2


def same(one, other):
    """Two runs are equal bit for bit: images, reads, receipt, clock."""
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    for first, second in zip(one.readings, other.readings, strict=True):
        assert all(torch.equal(first[site], second[site]) for site in first)
    assert one.receipt == other.receipt
    assert (one.clock, one.grid, one.spec) == (other.clock, other.grid, other.spec)


def test_a_run_on_a_server_is_the_run_here(lenses, served):
    nnsight.register(sys.modules[__name__])  # the user's own function
    ops = [
        Read("blocks.*.{img,txt}", reduce="|mean|"),
        Zero("blocks.1.img", channels=[3], tokens=[0, 7]),
        Swap("blocks.2.img", source="row:0", rows=1, strength=0.5),
        Swap("blocks.3.img", source=torch.ones(32), steps=[0]),
        Apply("blocks.3.img", fn=double),
        Read("blocks.3.img", channels=[1], name="after", branch="both"),
        Read(["blocks.0.img.attn_out", "blocks.2.img.attn.q", "blocks.*.img.x0"]),
    ]
    here, there = lenses
    local, remote = (lens.run(["red", "blue"], ops, seed=0) for lens in (here, there))
    same(local, remote)
    assert remote.provenance["device"] == f"nnsight server {HOST}"
    assert f"nnsight server {HOST}" in repr(there)
    ((key, blob),) = served
    assert key.startswith("nnsight.modeling.diffusion.DiffusionModel:")
    assert len(blob) < 200_000


def test_what_is_done_inside_of_attention_goes_there(lenses, served):
    ops = [
        AttentionMask("blocks[1:4].img", keys="txt", key_tokens="red", heads=[0], rows=1),
        Scale("blocks.1.{img,txt}.attn.k_rot", factor=1.5, rows=1),
        Read(["blocks.2.img.attn.q_rot", "blocks.2.img.attn.in", "blocks.1.txt.mlp.o"]),
        Guide(scale=0.5),
    ]
    same(*(lens.run(["red", "red"], ops, seed=[0, 0]) for lens in lenses))
    assert len(served) == 1


def test_dictionaries_go_there(lenses, served):
    torch.manual_seed(0)
    width = lenses[0].anatomy.channels(lenses[0].anatomy.find_site("blocks.2.img"))
    weights = torch.randn(width, 9), torch.randn(9), torch.randn(9, width), torch.randn(width)
    sae = Dictionary(*weights, activation="topk", k=3)
    ops = [ReadFeatures("blocks.2.img", sae, [1, 8]), Feature("blocks.2.img", sae, 1, 0)]
    same(*(lens.run("red", ops, seed=0) for lens in lenses))
    assert len(served) == 1


def test_a_run_of_guidance_in_one_batch(folder, served):
    (beside := folder.with_name("sana")).symlink_to(toys.path("sana"))
    ops = [
        Swap("blocks.2.img", source="row:0", rows=1, channels=[0, 5]),
        Read("blocks.2.img", reduce="rms", branch="both"),
        Read("velocity", channels=[0]),
    ]
    prompts = ["a big red circle left on a plain blue background", "a big blue cross right on a plain red background"]
    runs = []
    for lens in (DiTLens.toy("sana"), DiTLens.remote(beside, host=HOST)):
        with lens.quiet():
            runs.append(lens.run(prompts, ops, seed=0, num_inference_steps=2))
    same(*runs)
    assert runs[1].readings[0]["blocks.2.img"].shape[:2] == (2, 2)  # steps, branches


def test_a_recorded_run_goes_there_and_back(lenses, served):
    def edited(lens):
        base = lens.run("red", seed=0, record=True)
        return lens.run("red", Zero("blocks.2.img", channels=[1], steps=[1]), seed=0, prefix=base)

    same(*map(edited, lenses))
    assert move_answer((torch.ones(1),), ((), {"hidden": torch.ones(1, 1, device="meta")}))[0].device.type == "meta"


def test_methods_and_studies_that_are_made_of_runs_work_there(lenses, served):
    here, there = lenses
    found = [lens.massive_channels(["red", "blue"], k=3, seed=0, batch_size=1) for lens in lenses]
    assert dict(found[0]) == dict(found[1])
    assert len(served) == 2
    once = {"num_inference_steps": 1}
    local, remote = (dl.studies.disruption(lens, ["red"], k=3, draws=1, seeds=[0], **once) for lens in lenses)
    assert local.summary.equals(remote.summary)
    bases = {"bases": ["components", "mean-direction"], "k": 3, "ablation": "mean"}
    local, remote = (dl.studies.basis(lens, ["red"], **bases, **once) for lens in lenses)
    assert local.summary.equals(remote.summary)
    inside = np.zeros((8, 12), bool)
    inside[2:6, 3:9] = True
    organisation = dl.studies.organisation(there, ["red"], k=3, draws=1, masks=[inside], words="red", steps=[-1])
    assert any("attention" in note and "on a server" in note for note in organisation.notes)
    assert there.pipe.device.type == "meta"
    assert here.pipe.device.type == "cpu"


def test_embeddings_go_there(lenses, served):
    here, there = lenses
    texts = here.encode(["red", "blue"])
    ops = [Read("blocks.*.img", reduce="mean", branch="both"), Zero("blocks.1.img", channels=[3], rows=[1])]
    same(*(lens.run(ops=ops, **texts, seed=0) for lens in (here, there)))
    same(*(lens.run(ops=ops, **texts, seed=0, batch_size=1) for lens in (here, there)))


def test_mistakes_are_found_before_anything_is_sent(lenses, served):
    _, there = lenses
    with pytest.raises(SiteError, match="blocks has 5"):
        there.run("red", Read("blocks.9.img"))
    with pytest.raises(PromptError, match=r"as one tensor \[b, n, d\].*Pass prompts instead of prompt_embeds="):
        there.run(
            prompt_embeds=torch.zeros(1, 24, 32, 1), pooled_prompt_embeds=torch.zeros(1, 16), negative_prompt=None
        )
    lock = threading.Lock()
    with pytest.raises(OpError, match=r"lambda.* cannot be sent to a server: cannot pickle.*by its source"):
        there.run("red", Apply("blocks.0.img", fn=lambda tensor, hook: lock and tensor))
    assert served == []
    assert there.cost("red", Read("blocks.0.img")).bytes == 2 * 96 * 32 * 4


@pytest.mark.parametrize(
    "work",
    [
        lambda lens: lens.read_x0("red", seed=0),
        lambda lens: lens.encode("red"),
        lambda lens: lens.release_encoders(),
        lambda lens: dl.studies.patching(lens, [("red", "blue")]),
        lambda lens: dl.studies.transfer(lens, [("red", "blue")]),
        lambda lens: lens.read_pattern("red", 2, heads=0),
        lambda lens: lens.find_tokens("red", seed=0),
        lambda lens: lens.find_tokens("red", "sinks", k=1, seed=0),
        lambda lens: lens.gradients("red", "blocks.2.img", metric=torch.mean),
        lambda lens: lens.to("cpu"),
    ],
)
def test_what_needs_weights_is_refused(lenses, served, work):
    with pytest.raises(ExecutionError, match=r"needs? the model's weights on this machine.*DiTLens\.from_pretrained"):
        work(lenses[1])
    assert served == []


def test_relevant_channels_need_weights(lenses, served):
    with pytest.raises(
        ExecutionError, match=r"need the model's weights on this machine.*Leave 'relevant' out of bases="
    ):
        dl.studies.basis(lenses[1], ["red"], k=3)
    assert served == []


def test_a_server_that_fails_says_so(lenses, served):
    _, there = lenses

    def broken(tensor, hook):
        raise ValueError("no such thing")

    with pytest.raises(
        ExecutionError, match=rf"the nnsight server {HOST} answered: ValueError: no such thing\. Nothing was kept"
    ):
        there.run("red", Apply("blocks.0.img", fn=broken), seed=0)

    def elsewhere(tensor, hook):
        import not_there

        return not_there.fn(tensor)

    with pytest.raises(ExecutionError, match=r"No module named 'not_there'\. What a function imports .*register"):
        there.run("red", Apply("blocks.0.img", fn=elsewhere), seed=0)


def test_a_model_that_a_server_does_not_hold(folder, served, tmp_path):
    (tmp_path / "other").symlink_to(folder)
    there = DiTLens.remote(tmp_path / "other", host=HOST)
    there.defaults = dict(pipelines.TRUE_CFG)
    with pytest.raises(ExecutionError, match=r"answered: LookupError: .*other.* is not here\. Nothing"):
        there.run("red", seed=0)


class Refusal(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    def log_message(self, *_):
        pass


def test_a_key_that_is_refused(folder):
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.handle_request).start()
        there = DiTLens.remote(folder, host=f"http://127.0.0.1:{server.server_port}")
        there.defaults = dict(pipelines.TRUE_CFG)
        with pytest.raises(ExecutionError, match=r"refused the connection \(HTTP status 401\)\. Is the key right"):
            there.run("red", seed=0)


def test_the_state_of_a_job_shows_where_a_bar_would(lenses):
    _, there = lenses
    assert not there.engine.backend().display.enabled
    there.pipe.set_progress_bar_config(disable=False)
    assert there.engine.backend().display.enabled
    with there.quiet():
        assert not there.engine.backend().display.enabled


def test_a_server_that_is_not_there(folder):
    there = DiTLens.remote(folder, host="http://127.0.0.1:9")
    there.defaults = dict(pipelines.TRUE_CFG)
    with pytest.raises(ExecutionError, match=r"server http://127\.0\.0\.1:9 could not be reached.*does it run"):
        there.run("red", seed=0)
    there.engine.host = "http://no-such-host.invalid"
    with pytest.raises(ExecutionError, match=r"no-such-host\.invalid could not be reached"):
        there.run("red", seed=0)
    with pytest.raises(ExecutionError, match=r"Invalid host URL: 'localhost'.*Pass host="):
        DiTLens.remote(folder, host="localhost")
    with pytest.raises(StoreError, match="not a diffusers pipeline"):
        DiTLens.remote(folder.parent)


def test_a_name_that_the_hub_does_not_tell(folder):
    model = pipeline_without_weights(folder)
    model.repo_id = "someone/a-model"
    with pytest.raises(StoreError, match="hub did not tell the name of someone/a-model"):
        RemoteEngine(model, HOST)


def test_what_the_configuration_says_of_guidance_is_known(tmp_path):
    """nnsight leaves it out of the pipelines it builds; without it a distilled model would seem to be guided."""
    from tests.zoo.truth import ENTRIES

    pipe = ENTRIES["klein"].build()
    pipe.register_to_config(is_distilled=True)
    pipe.save_pretrained(tmp_path / "klein")
    assert DiTLens.remote(tmp_path / "klein", host=HOST).pipe.config.is_distilled is True


def test_a_toy_brings_its_defaults():
    there = DiTLens.remote(toys.path("flux"), host=HOST)
    assert DiTLens.remote("toy:flux", host=HOST).engine.server == there.engine.server
    assert DiTLens.from_pretrained("toy:flux").pipe.name_or_path == str(toys.path("flux"))
    with pytest.raises(StoreError, match=r"no toy called 'flax'.*'flux'"):
        DiTLens.remote("toy:flax", host=HOST)
    assert there.defaults == DiTLens.toy().defaults
    with pytest.raises(PromptError, match="'purple-ish'"):
        there.run("a purple-ish circle")
    with pytest.raises(OpError, match="channel"):
        there.run("a red circle", Zero("blocks.0.img", channels=[500]))
