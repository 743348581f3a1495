"""What a checkout and an installation weigh: bounds, and nothing twice."""

import hashlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from zipfile import ZipFile

import pytest

from dit_lens.toys.kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
MB = 1_000_000


@pytest.fixture(scope="module")
def tracked():
    """The files of the repository, and their bytes; those that are deleted and not yet committed are left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return {str(file.relative_to(ROOT)): file.read_bytes() for file in files if file.is_file()}


def test_the_repository_is_under_40_mb(tracked):
    """It weighs 39 MB; 31 of them are the weights of four toys, 4 the documentation."""
    folders = defaultdict(int)
    for name, data in tracked.items():
        folders["/".join(name.split("/")[:3])] += len(data)
    heaviest = sorted(folders.items(), key=lambda item: -item[1])[:8]
    assert sum(folders.values()) < 40 * MB, heaviest


def test_nothing_large_is_kept_twice(tracked):
    places = defaultdict(list)
    for name, data in tracked.items():
        if len(data) > 10_000:
            places[hashlib.sha256(data).hexdigest()].append(name)
    assert not [names for names in places.values() if len(names) > 1]


def test_images_of_pages_are_webp(tracked):
    """A sixth as large as PNG."""
    assert not [name for name in tracked if name.startswith("docs/") and name.endswith((".png", ".jpg", ".gif"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without the network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_is_under_30_mb(wheel):
    """It weighs 29 MB, nearly all of it the weights of four toys."""
    size = wheel.stat().st_size
    assert size < 30 * MB, f"{size / MB:.1f} MB"


def test_the_wheel_is_the_package_alone(wheel):
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dit_lens"}
    package = [name for name in names if name.startswith("dit_lens/")]
    assert all("tests" not in name.split("/") and not name.endswith(".pyc") for name in package)
    weights = {name.split("/")[3] for name in package if name.startswith("dit_lens/toys/weights/")}
    assert weights == set(KINDS)


def test_the_wheel_leaves_nothing_of_the_package_out(wheel, tracked):
    assert {name for name in tracked if name.startswith("dit_lens/")} <= set(ZipFile(wheel).namelist())
