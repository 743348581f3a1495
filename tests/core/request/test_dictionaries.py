"""Dictionaries of other libraries give what these libraries give, and what cannot be read is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_lens import dictionaries
from dit_lens.dictionaries import Dictionary
from dit_lens.errors import OpError, StoreError
from tests.dictionaries import COUNT, diffract, overcomplete, saelens, sparsify

WIDTH = 20
SAELENS = {
    "standard": {},
    "not centred": {"apply_b_dec_to_input": False},
    "layer norm": {"normalize_activations": "layer_norm"},
    "constant norm": {"normalize_activations": "constant_norm_rescale"},
    "jumprelu": {"architecture": "jumprelu"},
    "log threshold": {"architecture": "jumprelu", "drop": ("threshold",)},
    "topk": {"architecture": "topk", "k": 7},
    "topk of old": {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}, "k": 7},
    "topk by norm": {"architecture": "topk", "k": 7, "rescale_acts_by_decoder_norm": True},
    "transcoder": {"architecture": "transcoder", "apply_b_dec_to_input": False},
    "jumprelu transcoder": {"architecture": "jumprelu_transcoder", "apply_b_dec_to_input": False},
}


def tokens():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(7)) * 2 + 0.5


def assert_same(found, encode, decode, *level, **sigma):
    """All features, some of them, and the reconstruction. level, sigma: where it depends on the noise."""
    x = tokens()
    active = encode(x, *level)
    assert 0 < (active > 0).float().mean() < 0.9
    torch.testing.assert_close(found.encode(x, **sigma), active, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.encode(x, [9, -1, 2], **sigma), active[..., [9, -1, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reconstruct(x, **sigma), decode(active, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", SAELENS.values(), ids=SAELENS)
def test_saelens(settings, tmp_path):
    functions = saelens(tmp_path / "sae", WIDTH, **settings)
    found = dictionaries.load(tmp_path / "sae")
    assert (found.width, found.writes, len(found)) == (WIDTH, WIDTH, COUNT)
    assert_same(found, *functions)
    again = dictionaries.load(found.save(tmp_path / "own.safetensors"))
    assert (again.checksum, repr(again)) == (found.checksum, repr(found))
    assert_same(again, *functions)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(transcode, tmp_path):
    functions = sparsify(tmp_path / "sae", WIDTH, transcode=transcode)
    for path in (tmp_path / "sae", tmp_path / "sae/sae.safetensors"):
        found = dictionaries.load(path)
        assert (found.width, len(found), found.transcoder) == (WIDTH, COUNT, transcode)
        assert_same(found, *functions)
    again = dictionaries.load(found.save(tmp_path / "own.safetensors"))
    assert (again.checksum, repr(again)) == (found.checksum, repr(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "groupmax"}, "the activation 'groupmax' of sparsify is not known here, only 'topk'"),
        ({"signed": True}, "features of either sign"),
        ({"k": None}, "k=None does not go with 'topk'"),
        ({"k": 0}, "k=0 does not go with 'topk'"),
    ],
)
def test_what_sparsify_does_otherwise_is_refused(settings, message, tmp_path):
    sparsify(tmp_path / "sae", WIDTH)
    about = json.loads((tmp_path / "sae/cfg.json").read_text())
    (tmp_path / "sae/cfg.json").write_text(json.dumps({**about, **settings}))
    with pytest.raises((StoreError, OpError), match=message):
        dictionaries.load(tmp_path / "sae")


@pytest.mark.parametrize("kind", ["SAE", "TopKSAE", "JumpSAE", "BatchTopKSAE", "tied"])
def test_overcomplete(kind, tmp_path):
    tied = kind == "tied"
    functions = overcomplete(tmp_path / "a.safetensors", WIDTH, "TopKSAE" if tied else kind, tied=tied)
    assert_same(dictionaries.load(tmp_path / "a.safetensors"), *functions)


def test_what_is_just_at_the_threshold_of_overcomplete_stays(tmp_path):
    overcomplete(tmp_path / "a.safetensors", WIDTH, "BatchTopKSAE")
    stored = load_file(tmp_path / "a.safetensors")
    stored["encoder.final_block.0.weight"] *= 0
    stored["encoder.final_block.0.bias"] = torch.full((COUNT,), 0.25)
    save_file(stored, tmp_path / "a.safetensors", {"overcomplete": "BatchTopKSAE"})
    assert bool((dictionaries.load(tmp_path / "a.safetensors").encode(tokens()) == 0.25).all())


def test_diffract_follows_the_noise_level(tmp_path):
    functions = diffract(tmp_path / "transcoder_img_3.safetensors", WIDTH)
    found = dictionaries.load(tmp_path / "transcoder_img_3.safetensors")
    assert found.transcoder
    for level in (1.0, 0.37):
        assert_same(found, *functions, level, sigma=level)
    with pytest.raises(OpError, match=r"depends on the noise level\. Pass sigma="):
        found.encode(tokens())
    again = dictionaries.load(found.save(tmp_path / "own.safetensors"))
    assert_same(again, *functions, 0.5, sigma=0.5)
    (tmp_path / "own.safetensors").rename(tmp_path / "sae_img_3.safetensors")
    diffract(tmp_path / "img_3.safetensors", WIDTH)
    with pytest.raises(StoreError, match=r"look the same\. Say which it is: load\(path, transcoder=True\)"):
        dictionaries.load(tmp_path / "img_3.safetensors")
    assert not dictionaries.load(tmp_path / "img_3.safetensors", transcoder=False).transcoder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gated"}, "the architecture 'gated' of SAELens is not known here"),
        ({"architecture": "skip_transcoder"}, "'skip_transcoder' of SAELens .* Nearest: 'transcoder'"),
        ({"normalize_activations": "expected_average_only_in"}, "files do not hold the factor"),
        ({"normalize_activations": True}, "files do not hold the factor"),
        ({"normalize_activations": "median"}, "'median' is not a valid normalisation"),
        ({"activation_fn": "topk"}, "activation 'topk' of an architecture of 'relu'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is not known"),
        ({"architecture": "topk", "k": 0}, "k=0 does not go with 'topk'"),
        ({"architecture": "topk"}, "k=None does not go with 'topk'"),
        ({"drop": ("b_enc",)}, r"has no b_enc; it holds b_dec\."),
    ],
)
def test_what_saelens_does_otherwise_is_refused(settings, message, tmp_path):
    saelens(tmp_path / "sae", WIDTH, **settings)
    with pytest.raises((StoreError, OpError), match=message):
        dictionaries.load(tmp_path / "sae")


def test_weights_that_nobody_would_use_are_refused(tmp_path):
    saelens(tmp_path / "sae", WIDTH)
    stored = load_file(tmp_path / "sae/sae_weights.safetensors")
    save_file({**stored, "W_skip": torch.ones(2)}, tmp_path / "sae/sae_weights.safetensors")
    with pytest.raises(StoreError, match="also holds W_skip: an architecture"):
        dictionaries.load(tmp_path / "sae")
    sparsify(tmp_path / "b", WIDTH, skip_connection=True)
    stored = load_file(tmp_path / "b/sae.safetensors")
    save_file({**stored, "W_skip": torch.ones(WIDTH, WIDTH)}, tmp_path / "b/sae.safetensors")
    with pytest.raises(StoreError, match="also holds W_skip: an architecture"):
        dictionaries.load(tmp_path / "b")
    overcomplete(tmp_path / "a.safetensors", WIDTH)
    stored = load_file(tmp_path / "a.safetensors")
    save_file(
        {**stored, "encoder.final_block.1.weight": torch.ones(2)}, tmp_path / "a.safetensors", {"overcomplete": "SAE"}
    )
    with pytest.raises(StoreError, match=r"also holds encoder\.final_block\.1\.weight"):
        dictionaries.load(tmp_path / "a.safetensors")
    save_file(stored, tmp_path / "a.safetensors", {"overcomplete": "MpSAE"})
    with pytest.raises(StoreError, match="the class 'MpSAE' of overcomplete is not known"):
        dictionaries.load(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match="holds a, which is the layout of no library"):
        dictionaries.load(tmp_path / "a.safetensors")


def test_pickles_are_not_read_and_the_error_has_the_lines_that_convert_them(tmp_path, monkeypatch):
    """The lines are run: once on a whole model with the methods of overcomplete, once on a state dict."""
    monkeypatch.chdir(tmp_path)
    encode, _ = overcomplete(tmp_path / "truth.safetensors", WIDTH)
    Pickled.state = {name: value for name, value in load_file("truth.safetensors").items() if "." in name}
    Pickled.made = load_file("truth.safetensors")["dictionary"]
    torch.save(Pickled(), "sae.pth")
    diffract(tmp_path / "b.safetensors", WIDTH)
    strided = {name: value.t().contiguous().t() for name, value in load_file("b.safetensors").items()}  # as it has some
    torch.save(strided, "sae_img_3.pt")
    for name, lines in (("sae.pth", slice(3, 5)), ("sae_img_3.pt", slice(7, 9))):
        with pytest.raises(StoreError, match="is a pickle, which can run any code") as told:
            dictionaries.load(name)
        code = "\n".join(line.strip() for line in str(told.value).splitlines()[lines]).replace("TopKSAE", "")
        exec(code, {})
    torch.testing.assert_close(dictionaries.load("sae.safetensors").encode(tokens()), encode(tokens()))
    assert not dictionaries.load("sae_img_3.safetensors").transcoder


class TopKSAE:
    """As far as the lines use a model of overcomplete."""

    def __init__(self):
        self.top_k, self.training = 5, True

    def eval(self):
        self.training = False
        return self

    def state_dict(self):
        return Pickled.state

    def get_dictionary(self):
        assert not self.training  # normalised only then
        return Pickled.made


Pickled = TopKSAE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": torch.ones(3, 5)}, "encodes 4 channels and decodes 5"),
        ({"encoder_bias": torch.ones(2)}, r"encoder_bias has shape \[2\], and is to have \[3\]"),
        ({"encoder": torch.full((4, 3), torch.nan)}, "encoder holds what is no finite number of"),
        ({"decoder_bias": torch.ones(4, dtype=torch.int64)}, "decoder_bias holds what is no finite number of"),
        ({"activation": "tanh"}, "'tanh' is not a valid activation"),
        ({"activation": "jumprelu"}, "a threshold goes with activation='jumprelu'"),
        ({"transcoder": True}, "so it is not centred"),
        ({"time": {"first.weight": torch.ones(4, 4)}}, "time= takes first.weight"),
        ({"encoder": torch.ones(4)}, r"encoder \[channel, feature\]"),
    ],
)
def test_what_is_no_dictionary_is_refused(changes, message):
    shapes = {"encoder": (4, 3), "encoder_bias": (3,), "decoder": (3, 4), "decoder_bias": (4,)}
    whole = {name: torch.ones(shape) for name, shape in shapes.items()}
    Dictionary(**whole)
    with pytest.raises(OpError, match=message):
        Dictionary(**{**whole, **changes})


def test_files_that_are_damaged_or_missing_are_told(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        dictionaries.load(tmp_path / "none.safetensors")
    with pytest.raises(StoreError, match=r"it has no cfg\.json"):
        dictionaries.load(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(StoreError, match="is incomplete or damaged"):
        dictionaries.load(tmp_path / "a.safetensors")
    saelens(tmp_path / "sae", WIDTH)
    sparsify(tmp_path / "other", WIDTH)
    for folder, library in (("sae", "SAELens"), ("other", "sparsify")):
        (weights,) = (tmp_path / folder).glob("*.safetensors")
        weights.rename(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match=f"has cfg.json and no weights: .*{weights.name} of {library}"):
            dictionaries.load(tmp_path / folder)
        (tmp_path / "elsewhere").rename(weights)
        (tmp_path / folder / "cfg.json").write_text("[]")
        with pytest.raises(StoreError, match=f"is not the configuration of {library}"):
            dictionaries.load(tmp_path / folder)
