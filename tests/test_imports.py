"""``import dit_lens`` is light, and says what it has."""

import subprocess
import sys

import dit_lens

HEAVY = ("torch", "diffusers", "transformers", "nnsight", "plotly", "sklearn", "pandas", "numpy", "PIL")


def test_importing_imports_nothing_heavy():
    code = f"import sys, dit_lens, dit_lens.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in dit_lens.__all__:
        assert getattr(dit_lens, name) is not None
        assert name in dir(dit_lens)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(dit_lens, "DitLens")
