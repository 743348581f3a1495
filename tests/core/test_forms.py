"""What can be meant works in every form: functions as sites, numbers of numpy and torch, what functions return."""

import re

import numpy as np
import pytest
import torch

from dit_lens import Add, Apply, DiTLens, MeanAblate, Read, Resample, Scale, Swap, TokenMean, Zero, sigma
from dit_lens.errors import ExecutionError, NotYetError, OpError, PromptError, SiteError
from dit_lens.families.sites import match
from dit_lens.ops import from_json, to_json
from tests import pipelines

SITE = "blocks.3.img"
CALL = {"height": 16, "width": 24, "num_inference_steps": 2, "output_type": "latent"}  # 4 x 6 tokens
EVERY = Read("blocks.*.{img,txt}", branch="both", name="after")


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults={**pipelines.TRUE_CFG, **CALL})


@pytest.fixture(scope="module")
def source(lens):
    return lens.run(["red", "blue"], [Read(SITE, branch="both")], seed=7)


def after(lens, ops, **call):
    run = lens.run(["red", "blue"], [*ops, EVERY], seed=3, **call)
    return {site: value.as_subclass(torch.Tensor) for site, value in run["after"].items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[site], other[site]) for site in one)


FILTERS = {
    "function": (lambda name: name.startswith("blocks.3.") and name.endswith(".img"), [SITE]),
    "mixed": (["blocks.1.txt", lambda name: name == SITE], ["blocks.1.txt", SITE]),
    "tuple": ((lambda name: name in ("velocity", SITE),), [SITE, "velocity"]),
    "iterator": (lambda: iter([lambda name: name == SITE, "velocity"]), [SITE, "velocity"]),
    "bound method": ({SITE, "final.img"}.__contains__, [SITE, "final.img"]),
}


class TestFilters:
    @pytest.mark.parametrize("name", FILTERS)
    def test_wherever_a_pattern_is_taken(self, lens, name):
        given, expected = FILTERS[name]

        def fresh():
            return given() if name == "iterator" else given

        assert lens.sites(fresh()) == expected
        assert list(lens.run("red", [Read(fresh())], seed=0)) == expected
        assert list(lens.run_with_cache("red", fresh(), seed=0)[1]) == expected
        met = []
        lens.run_with_hooks("red", [(fresh(), lambda x, hook: met.append(hook.name))], seed=0)
        assert set(met) == set(expected)
        with lens.trace("red", seed=0) as t:
            kept = t.read(fresh())
        assert list(kept) == expected

    def test_of_instruments(self, lens):
        assert list(lens.massive_channels("red", 2, site=lambda name: name == SITE)) == [SITE]
        assert lens.heads(lambda name: name == "blocks.3.img.attn.q") == lens.heads("blocks.3.img.attn.q")
        for chosen in (lambda name: name == SITE, lambda name: name == f"{SITE}.x0", [SITE]):
            assert [site for site in lens.read_x0("red", chosen, steps=0, seed=0).run if site != "x0"] == [f"{SITE}.x0"]

    def test_have_no_json_form(self, lens):
        run = lens.run(
            "red", [Read(lambda name: name == SITE), Read(["velocity", lambda name: name == SITE], name="b")]
        )
        for op in (Read(lambda name: True), Zero(["velocity", len]), Apply(SITE, fn=len)):
            with pytest.raises(OpError, match="holds a Python function, which has no JSON form"):
                to_json(op)
        with pytest.raises(PromptError, match=r"JSON cannot keep.*ops\[0\], ops\[1\]"):
            lens.run_spec(run.spec)

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            (lambda name: False, r"<lambda> chose none of the \d+ sites.*lens\.sites\(\)"),
            (lambda name: np.ones(2), r"is to say whether .* is meant, and returned ndarray"),
            (lambda: True, r"does not name a site.*fn\(name\)"),
            (int, r"<class 'int'> \(type\) does not name a site"),
            (None, r"None \(NoneType\) does not name a site"),
            ([3], r"3 \(int\) does not name a site"),
            ([], "no site was named"),
            (np.array(None), "does not name a site"),
            ("blocks[-:2].img", "no site is called"),
            ("blocks." + "9" * 5000 + ".img", "no site is called"),
        ],
    )
    def test_that_cannot_be_meant(self, lens, pattern, message):
        for call in (lens.sites, lambda pattern: lens.cost("red", Read(pattern))):
            with pytest.raises(SiteError, match=message):
                call(pattern)

    def test_what_a_filter_raises_is_passed_on(self, lens):
        def broken(name):
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine") as caught:
            lens.run("red", [Read(SITE), Zero(broken)])
        assert any("ops[1]" in note for note in caught.value.__notes__)

    def test_match_alone(self, lens):
        sites = lens.anatomy.sites
        assert match([sites[3], sites[1].name], sites) == [sites[1], sites[3]]


NUMBERS = {
    "numpy steps": (lambda: Zero(SITE, steps=np.int64(1)), lambda: Zero(SITE, steps=1)),
    "torch steps": (lambda: Zero(SITE, steps=torch.tensor(-1)), lambda: Zero(SITE, steps=-1)),
    "array of steps": (lambda: Zero(SITE, steps=np.array([1, 0])), lambda: Zero(SITE, steps=[0, 1])),
    "tensor of steps": (lambda: Zero(SITE, steps=torch.tensor([1])), lambda: Zero(SITE, steps=[1])),
    "set of steps": (lambda: Zero(SITE, steps={0}), lambda: Zero(SITE, steps=0)),
    "range of steps": (lambda: Zero(SITE, steps=range(1, 2)), lambda: Zero(SITE, steps=1)),
    "slice of numpy": (lambda: Zero(SITE, steps=slice(np.int8(1), None)), lambda: Zero(SITE, steps=1)),
    "numpy fractions": (
        lambda: Zero(SITE, steps=(np.float32(0), np.float32(0.5))),
        lambda: Zero(SITE, steps=(0.0, 0.5)),
    ),
    "torch levels": (lambda: Zero(SITE, steps=sigma(torch.tensor(1), np.float32(0.75))), lambda: Zero(SITE, steps=0)),
    "numpy rows": (lambda: Zero(SITE, rows=np.array(1)), lambda: Zero(SITE, rows=1)),
    "torch rows": (lambda: Zero(SITE, rows=torch.tensor([-1])), lambda: Zero(SITE, rows=[1])),
    "tensor of tokens": (lambda: Zero(SITE, tokens=torch.arange(3, 6)), lambda: Zero(SITE, tokens=[3, 4, 5])),
    "range of tokens": (lambda: Zero(SITE, tokens=range(3, 6)), lambda: Zero(SITE, tokens=slice(3, 6))),
    "array of channels": (lambda: Zero(SITE, channels=np.array([4, 2])), lambda: Zero(SITE, channels=[4, 2])),
    "tensors in a list": (
        lambda: Zero(SITE, channels=[torch.tensor(4), np.uint8(2)]),
        lambda: Zero(SITE, channels=[4, 2]),
    ),
    "iterators in a mapping": (
        lambda: Zero([SITE, "blocks.2.img"], channels={SITE: iter([1]), "blocks.2.img": map(int, "23")}),
        lambda: Zero([SITE, "blocks.2.img"], channels={SITE: [1], "blocks.2.img": [2, 3]}),
    ),
    "torch factor": (lambda: Scale(SITE, factor=torch.tensor(0.5)), lambda: Scale(SITE, factor=0.5)),
    "numpy strength": (
        lambda: Swap(SITE, source="row:0", strength=np.float64(0.25)),
        lambda: Swap(SITE, source="row:0", strength=0.25),
    ),
    "torch strength": (
        lambda: Swap(SITE, source="row:0", strength=torch.tensor(0.25)),
        lambda: Swap(SITE, source="row:0", strength=0.25),
    ),
    "torch mask": (
        lambda: Zero(SITE, mask=torch.eye(4, 6).bool()),
        lambda: Zero(SITE, tokens=[0, 7, 14, 21]),
    ),
    "numpy mask": (lambda: Zero(SITE, mask=np.eye(4, 6, dtype=bool)), lambda: Zero(SITE, tokens=[0, 7, 14, 21])),
    "mask with a graph": (
        lambda: Zero(SITE, mask=torch.eye(4, 6, requires_grad=True)),
        lambda: Zero(SITE, tokens=[0, 7, 14, 21]),
    ),
    "mask in half precision": (
        lambda: Zero(SITE, mask=torch.eye(4, 6).bfloat16()),
        lambda: Zero(SITE, tokens=[0, 7, 14, 21]),
    ),
    "no op": (lambda: Swap(SITE, source=torch.ones(24, 32), channels=[]), lambda: Zero(SITE, channels=[])),
    "no token": (lambda: TokenMean(SITE, tokens=[]), lambda: Zero(SITE, tokens=[])),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_and_torch(lens, name):
    strange, plain = NUMBERS[name]
    expected = after(lens, [plain()])
    assert same(after(lens, [strange()]), expected)
    assert same(after(lens, [from_json(to_json(strange()))]), expected)


RETURNS = {
    "array": lambda x: x.numpy() * 0.5,
    "double": lambda x: x.double() * 0.5,
    "list": lambda x: (x * 0.5).tolist(),
    "tensor": lambda x: x * 0.5,
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_a_function_returns(lens, name):
    half = after(lens, [Scale(SITE, factor=0.5)])
    assert same(after(lens, [Apply(SITE, fn=lambda x, hook: RETURNS[name](x))]), half)


@pytest.mark.parametrize("number", [2.5, 2, np.float32(2.5), torch.tensor(2.5), np.array(2.5), True])
def test_a_number_stands_for_all_elements(lens, number):
    expected = after(lens, [Swap(SITE, source=torch.full((1, 1), float(number)), channels=[3, 4], rows=1)])
    assert same(after(lens, [Apply(SITE, fn=lambda x, hook: number, channels=[3, 4], rows=1)]), expected)


def test_none_changes_nothing(lens):
    assert same(after(lens, [Apply(SITE, fn=lambda x, hook: None)]), after(lens, []))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: {"x": x}, "dict"),
        (lambda x: "x", "str"),
        (lambda x: object(), "object"),
        (lambda x: x[..., :1], r"shape \[2, 24, 1\]"),
        (lambda x: x[0], r"shape \[24, 32\]"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: x.to_sparse(), "sparse"),
    ],
)
def test_what_no_function_can_mean(lens, value, what):
    def mine(x, hook):
        return value(x) if hook.step == 1 else None

    message = rf"mine, applied at blocks\.3\.img, step 1 \(cond\), returned .*{what}.* instead of .*\[2, 24, 32\]"
    with pytest.raises(ExecutionError, match=message):
        after(lens, [Apply(SITE, fn=mine)])


def test_what_a_function_raises_is_passed_on(lens):
    mine = KeyError("mine")

    def broken(x, hook):
        raise mine

    with pytest.raises(KeyError) as caught:
        after(lens, [Zero(SITE), Apply(SITE, fn=broken)])
    assert caught.value.args == ("mine",)
    assert any("broken, applied at blocks.3.img, step 0 (cond): ops[1]" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("part", ["rows", "steps", "tokens", "channels"])
def test_one_read_is_a_source_by_its_numbers(lens, source, part):
    """A read of a part, given itself instead of its run, in every way one is at hand."""
    chosen = {part: [1]}
    with lens.trace(["red", "blue"], seed=7) as t:
        handle = t.read(SITE, branch="both", name="mine", **chosen)
    expected = after(lens, [Swap(SITE, source=source, **chosen)])
    for given in (handle, t.run["mine"]):
        op = Swap(SITE, source=given, **chosen)
        assert same(after(lens, [op]), expected)
        assert same(after(lens, [from_json(to_json(op))]), expected)
        if part != "rows":  # a single row stands for all
            with pytest.raises(OpError, match=f"without {part} 0"):
                after(lens, [Swap(SITE, source=given, **{part: [0]})])


CASES = {
    "topk": (lambda: Read(SITE, reduce="topk(999)"), r"'topk\(999\)' asks for 999 channels, but 32 are chosen"),
    "topk of a few": (lambda: Read(SITE, reduce="topk(3)", channels=[1, 2]), r"topk\(2\) at most"),
    "no tokens": (lambda: Read(SITE, reduce="mean", tokens=[]), r"tokens=\[\] chooses none"),
    "reduction of nothing": (lambda: Read(SITE, reduce=3), "3 is not a valid reduction"),
    "too many bins": (lambda: Read(SITE, reduce="histogram(0,1,99999999999)"), "1 to 16777216"),
    "name": (lambda: Read(SITE, name=3), "name=3 is not a name"),
    "token count": (lambda: Swap(SITE, source=torch.ones(23, 32)), "tokens may be 1 or 24, not 23"),
    "factor": (lambda: Scale(SITE, factor=np.ones(2)), "not a finite number"),
    "huge factor": (lambda: Scale(SITE, factor=10**400), "not a finite number"),
    "complex factor": (lambda: Scale(SITE, factor=np.complex64(1)), "not a finite number"),
    "strengths": (lambda: Swap(SITE, source="row:0", strength=np.ones(2)), r"outside \[0, 1\]"),
    "complex strength": (lambda: Swap(SITE, source="row:0", strength=1j), r"outside \[0, 1\]"),
    "row": (lambda: Swap(SITE, source="row:" + "9" * 5000), "not a valid source"),
    "nan": (lambda: Swap(SITE, source=torch.full((32,), float("nan"))), "NaN"),
    "sparse": (lambda: Swap(SITE, source=torch.eye(24, 32).to_sparse()), "without plain values"),
    "key": (lambda: Zero(SITE, channels={SITE: [1], "blocks.33.img": [1]}), "'blocks.33.img', which is no site"),
    "key of a mean": (lambda: MeanAblate(SITE, mean={SITE: torch.ones(32), 0: 1}), "the key 0, which is no site"),
    "seed": (lambda: Resample(SITE, source={SITE: torch.ones(32)}, seed=-1), "not a whole number from 0 up"),
    "branch": (lambda: Zero(SITE, branch=""), "branch='' is not a valid branch"),
    "branches": (lambda: Zero(SITE, branch=np.array(["cond", "both"])), "is not a valid branch"),
    "bytes": (lambda: Zero(SITE, channels=b"\x01"), r"channel b'\\x01' is not an index"),
    "bool tensor": (lambda: Zero(SITE, rows=torch.tensor([True, False])), "row True is not an index"),
    "a slice of words": (lambda: Zero(SITE, channels=slice("a")), "not a slice of whole numbers"),
    "a slice that stays": (lambda: Zero(SITE, steps=slice(None, None, 0)), "a step of 0"),
    "fractions of words": (lambda: Zero(SITE, steps=(0.0, "1")), "not a span of the run"),
    "sigma of words": (lambda: Zero(SITE, steps=sigma("1", 0)), "'1' of sigma.* is not a number"),
    "mask of words": (lambda: Zero(SITE, mask=[["a"]]), "must be a bool array"),
    "ragged mask": (lambda: Zero(SITE, mask=[[True], [True, False]]), "must be a bool array"),
    "mask of a row": (lambda: Zero(SITE, mask=np.ones(24, bool)), r"shape \[24\]"),
    "a function of one": (lambda: Apply(SITE, fn=lambda x: x), r"<lambda> cannot be called as fn\(tensor, hook\)"),
    "keep": (lambda: TokenMean(SITE, keep=["mean"]), "is not a valid part"),
    "ops": (lambda: 3, "ops= takes a list"),
    "text": (lambda: "blocks.3.img", "ops= takes a list"),
    "vector": (lambda: Add(SITE, value=[]), r"shape \[0\]"),
}


class TestBefore:
    """What is told before the first forward pass."""

    @pytest.mark.parametrize("name", CASES)
    def test_in_ops(self, lens, monkeypatch, name):
        make, message = CASES[name]
        monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it was drawn"))
        with pytest.raises(OpError, match=message):
            lens.run(["red", "blue"], make())

    def test_in_other_arguments(self, lens, monkeypatch):
        monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it was drawn"))
        for call, kind, message in (
            (lambda: lens.run("red", prefix="x"), OpError, "prefix= is a str"),
            (lambda: lens.run("red", record="no"), PromptError, "record='no' is neither True nor False"),
            (lambda: lens.trace("red", ops=[]), OpError, "collects its ops inside the with block"),
            (lambda: lens.run_with_hooks("red", [SITE]), OpError, r"fwd_hooks\[0\] is 'blocks\.3\.img'\. Give pairs"),
            (lambda: lens.run_with_hooks("red", 3), OpError, "fwd_hooks= takes a list"),
            (lambda: lens.to_str_tokens(["red"]), PromptError, "takes one prompt"),
            (lambda: lens.rerun("run"), PromptError, "rerun takes a Run"),
            (lambda: lens.run_spec("spec"), PromptError, "takes the spec of a run"),
            (lambda: lens.run_spec({"prompt": 1, "seed": 1, "call": 1, "ops": 1}), PromptError, "call is a mapping"),
            (lambda: to_json("op"), OpError, "str is not an op"),
        ):
            with pytest.raises(kind, match=message):
                call()

    def test_a_handle_before_its_run(self, lens):
        with pytest.raises(NotYetError, match="does not exist yet"), lens.trace("red") as t:  # noqa: PT012
            kept = t.read(SITE)
            lens.run("red", [Swap(SITE, source=kept)])

    def test_outlines_take_what_runs_take(self, lens):
        outline = lens.outline("red", ops=[Read(SITE)], record=True, prefix=None, batch_size=1)
        assert outline.select(np.array([1])) == outline.select(torch.tensor(1)) == [1]
        assert lens.cost("red", None).bytes == 0


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("blocks.1.hook_resid_post", r"'blocks\.1\.img'"),
        ("blocks.*.hook_resid_pre", r"'blocks\.\*\.img\.resid_pre'"),
        ("blocks.0.hook_mlp_out", r"'blocks\.0\.img\.mlp_out'"),
        ("blocks.0.attn.hook_z", r"'blocks\.0\.img\.attn\.z'"),
        ("blocks.0.mlp.hook_pre", r"'blocks\.0\.img\.mlp\.pre'"),
        ("blocks.2.attn.hook_pattern", r"lens\.read_pattern\(prompt, 2, heads="),
        ("blocks.2.attn.hook_attn_scores", r"lens\.read_pattern\(prompt, 2, heads="),
        ("blocks.2.hook_nothing", "no stream 'hook_nothing'"),
    ],
)
def test_names_of_transformerlens_are_told(lens, asked, meant):
    with pytest.raises(SiteError, match=meant) as told:
        lens.sites(asked)
    suggested = re.search(r"here it is '([^']+)'", str(told.value))
    assert suggested is None or lens.sites(suggested[1])


@pytest.mark.parametrize("asked", ["blocks.1.img.attn.{q,k_rot}", "blocks.1.img.{attn.q, attn.k_rot}"])
def test_braces_stand_around_a_part_of_a_point(lens, asked):
    assert lens.sites(asked) == ["blocks.1.img.attn.q", "blocks.1.img.attn.k_rot"]
    with pytest.raises(SiteError, match=r"no point 'attn\.kk'\. Nearest: 'attn\.k'"):
        lens.sites(asked.replace("k_rot", "kk"))
