"""Names of 0.1.0 work for one more release, and each warns of the name it has now."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import dit_lens as dl
from dit_lens.commands import page
from dit_lens.instruments import inversion, latents
from dit_lens.instruments.x0_lens import X0
from dit_lens.old_names import OLD_MODULES, PUBLIC, renamed_keywords
from dit_lens.toys import scenes

NAMES = [  # module, old name, what it has to be
    (dl.toys, "hushed", dl.toys.quiet_loading),
    (dl.families, "Tap", dl.PointSpec),
    (dl.families, "families", dl.families.known_families),
    (dl.explorer, "views", dl.explorer_reads),
    (dl.plots, "births_figure", dl.plots.write_attribution_figure),
    (page, "write_pngs", page.write_figures),
    (scenes, "describe", scenes.recognise_scene),
    (scenes, "Description", scenes.Recognition),
    (inversion, "as_tokens", latents.pack_latents),
    (inversion, "autoencoder", latents.find_autoencoder),
    (inversion, "decode", latents.decode_latents),
    (inversion, "latents_of", latents.encode_images),
    (inversion, "tokens_of", latents.read_latents),
    (inversion, "unpacked", latents.unpack),
    (latents, "as_tokens", latents.pack_latents),
    (latents, "autoencoder", latents.find_autoencoder),
    (latents, "decode", latents.decode_latents),
    (latents, "tokens_of", latents.read_latents),
]


def warns(old: str, new: str):
    return pytest.warns(FutureWarning, match=rf"{re.escape(old)} is called {re.escape(new)} now")


@pytest.mark.parametrize(("old", "new"), PUBLIC.items())
def test_public_names(old, new):
    with warns(f"dit_lens.{old}", f"dit_lens.{new}"):
        assert getattr(dl, old) is getattr(dl, new)


@pytest.mark.parametrize(("old", "new"), OLD_MODULES.items())
def test_modules(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, f"dit_lens.{old}", raising=False)
    with warns(f"dit_lens.{old}", f"dit_lens.{new}"):
        module = importlib.import_module(f"dit_lens.{old}")
    assert module is importlib.import_module(f"dit_lens.{new}")
    assert module.__spec__.name == f"dit_lens.{new}"


@pytest.mark.parametrize(("module", "old", "now"), NAMES)
def test_names_of_modules(module, old, now):
    with pytest.warns(FutureWarning, match=rf"{re.escape(module.__name__)}\.{old} is called .*{now.__name__} now"):
        assert getattr(module, old) is now
    with pytest.raises(AttributeError, match="no attribute 'never_there'"):
        _ = module.never_there


def test_the_explorer_has_no_module_in_the_place_of_an_old_name():
    code = "from dit_lens.explorer import views, explorer_reads; assert views is explorer_reads"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "FutureWarning: dit_lens.explorer.views is called dit_lens.explorer.explorer_reads now" in done.stderr


def test_attributes():
    found = inversion.Inversion(noise=None, velocity=None, latent_error=(0.1,), image_error=(2.0,))
    with warns("Inversion.picture_error", "image_error"):
        assert found.picture_error == (2.0,)
    shown = X0({"x0": []}, (0,), run=None)
    with warns("X0.pictures", "images"):
        assert shown.pictures is shown.images
    protocol = dl.protocols.get("turri2026")
    with warns("Protocol.chosen", "apply"):
        assert protocol.chosen("organisation", {"k": 3}) == protocol.apply("organisation", {"k": 3})


def test_keywords():
    lens = dl.DiTLens.toy()
    with warns("the keyword pictures=", "images="):
        assert dl.recommend(lens.pipe, pictures=4) == dl.recommend(lens.pipe, images=4)
    image = lens.run("a big red circle left on a plain blue background", seed=0, num_inference_steps=2).images[0]
    with warns("the keyword pictures=", "images="):
        way = inversion.noised_reference(lens, pictures=[image], seed=0, num_inference_steps=2)
    assert way.equal(inversion.noised_reference(lens, [image], seed=0, num_inference_steps=2))
    with warns("the keyword pictures=", "images="):
        found = inversion.invert(lens, pictures=[image], num_inference_steps=2)
    assert found.noise.equal(inversion.invert(lens, [image], num_inference_steps=2).noise)


def test_a_keyword_under_both_names_is_refused():
    @renamed_keywords(pictures="images")
    def count(images):
        return len(images)

    assert count("ab") == count(images="ab") == 2
    with pytest.warns(FutureWarning), pytest.raises(TypeError, match="multiple values"):
        count(pictures="ab", images="ab")
    with pytest.warns(FutureWarning), pytest.raises(TypeError, match="multiple values"):
        count("ab", pictures="ab")
