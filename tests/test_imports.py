"""``import dit_lens`` is light, and says what it has."""

import inspect
import subprocess
import sys
from pathlib import Path

import dit_lens

HEAVY = ("torch", "diffusers", "transformers", "nnsight", "plotly", "sklearn", "pandas", "numpy", "PIL")


def test_importing_imports_nothing_heavy():
    code = f"import sys, dit_lens, dit_lens.commands.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in dit_lens.__all__:
        assert getattr(dit_lens, name) is not None
        assert name in dir(dit_lens)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(dit_lens, "DitLens")


def test_no_module_takes_the_place_of_a_public_name():
    code = "import dit_lens, dit_lens.core.runs.comparison; assert callable(dit_lens.compare), dit_lens.compare"
    subprocess.run([sys.executable, "-c", code], check=True)
    modules = {path.stem for path in Path(dit_lens.__file__).parent.glob("*.py")}
    names = {name for name in dit_lens.__all__ if not inspect.ismodule(getattr(dit_lens, name))}
    assert not modules & names
