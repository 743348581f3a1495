#!/usr/bin/env python3
"""Sets up .venv once, then runs a task in it; needs nothing but Python's standard library.

    python3 dev.py demo [arguments]    the demo: dit-lens demo [arguments]
    python3 dev.py test [arguments]    lint, then pytest [arguments], such as tests/families -k pattern
    python3 dev.py lint [--fix]        ruff check, ruff format, ty, import-linter; --fix corrects what ruff can correct
    python3 dev.py bench [arguments]   what looking costs: python -m benchmarks [arguments]
    python3 dev.py docs [arguments]    the documentation, into build/docs: sphinx-build [arguments]

Which torch is installed: what UV_TORCH_BACKEND says (cpu, cu128, ...) if it is set; else the CPU wheel that
constraints/torch-cpu.txt names, when a folder of pip's find-links setting holds it for this Python; else what .venv has
already; else the build that uv picks for this machine's GPU or CPU. The Python of .venv is the one that made it.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        f"dit_lens needs Python 3.11 or newer; this is {sys.version_info[0]}.{sys.version_info[1]}. "
        f"Run dev.py with a newer one:\n    python3.12 dev.py {' '.join(sys.argv[1:]) or 'test'}"
    )

import ast
import hashlib
import os
import platform
import re
import subprocess
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENV = ROOT / ".venv"
PYTHON = ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = ENV / ".dit-lens-installed"
CONSTRAINTS = ROOT / "constraints"
UV_CHOICE = "where uv finds it for this machine"

NO_TORCH = """
The packages could not be installed; uv's own message is above. torch was to come from PyTorch's package index, so if it
is torch that failed, this machine does not reach that index. Any one of these helps:
  - keep a CPU wheel of {cpu} for Python {python} in a folder, and name the folder:
        PIP_FIND_LINKS=FOLDER python3 dev.py {task}
  - run dev.py with a Python that such a wheel is there for (remove .venv first)
  - install torch into .venv from where you can, then run dev.py again; it keeps what is there:
        {pip} install torch
"""


def main(arguments: list[str]) -> int:
    """Runs the task that the command line names; returns its exit code."""
    if not arguments or arguments[0] not in TASKS:
        print(__doc__.strip(), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    task, *rest = arguments
    set_up(task)
    return TASKS[task](rest)


def demo(rest: list[str]) -> int:
    """The demo of the command line tool."""
    return run("-m", "dit_lens.commands.cli", "demo", *rest)


def lint(rest: list[str]) -> int:
    """All that is checked without running the library."""
    if rest not in ([], ["--fix"]):
        print("python3 dev.py lint takes --fix or nothing.", file=sys.stderr)
        return 2
    return steps(linters(fix=bool(rest)))


def test(rest: list[str]) -> int:
    """Lint, then the tests in three processes of one thread: two cores stay busy while one waits for a browser."""
    pytest = ("-m", "pytest", "-n", "3", "--dist", "loadgroup", "--no-loadscope-reorder", *rest)  # in our order
    return steps(linters() | {"pytest": pytest}, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def docs(rest: list[str]) -> int:
    """The documentation as a web site; a warning or a reference that leads nowhere is an error."""
    say("building build/docs/index.html")
    return run("-m", "sphinx", "-W", "-n", "--keep-going", "--quiet", *rest, "docs", "build/docs")


def bench(rest: list[str]) -> int:
    """The table of benchmarks."""
    return run("-m", "benchmarks", *rest, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def linters(*, fix: bool = False) -> dict[str, tuple[str, ...]]:
    """The checks of the code as text."""
    return {
        "ruff check": ("-m", "ruff", "check", *(["--fix"] if fix else [])),
        "ruff format": ("-m", "ruff", "format", *([] if fix else ["--check"])),
        "ty": ("-m", "ty", "check"),
        "import-linter": (
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-logo'])",
        ),
    }


TASKS = {"bench": bench, "demo": demo, "docs": docs, "lint": lint, "test": test}

# The dependency groups of a task that needs more than "dev".
GROUPS = {"docs": ("dev", "docs"), "test": ("dev", "docs", "live")}


def set_up(task: str) -> None:
    """Makes .venv hold what pyproject.toml and the constraints ask for; does nothing when it does already."""
    groups = GROUPS.get(task, ("dev",))
    held = STAMP.read_text(encoding="utf-8").split() if PYTHON.exists() and STAMP.is_file() else []
    if {fingerprint(), *groups} <= set(held):
        return
    began = time.monotonic()
    STAMP.unlink(missing_ok=True)
    if not works("import sys; assert sys.version_info >= (3, 11)"):
        say(f"making .venv with Python {platform.python_version()}")
        make_environment()
    elif not works("import pip"):
        run("-m", "ensurepip")
    lock = ("--constraint", CONSTRAINTS / "lock.txt")
    if not works("import uv") and run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lock, "uv"):
        sys.exit("uv could not be installed; pip's own message is above. Run dev.py again when pip works.")
    python = ask("-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    source, options = choose_torch(python)
    say(f"installing for Python {python}, torch from {source} (once; later calls skip this)")
    wanted = ("--editable", ".[notebook,png,serve]", *(word for group in groups for word in ("--group", group)))
    if run("-m", "uv", "pip", "install", "--quiet", "--python", PYTHON, *options, *lock, *wanted, **uv_settings()):
        if source == UV_CHOICE:
            sys.exit(NO_TORCH.format(cpu=cpu_torch(), python=python, task=task, pip=f"{PYTHON} -m pip"))
        sys.exit("The packages could not be installed; uv's own message is above. Run dev.py again to go on.")
    STAMP.write_text(" ".join([fingerprint(), *groups]), encoding="utf-8")
    say(f"installed in {time.monotonic() - began:.0f} s")


def make_environment() -> None:
    """A fresh .venv in place of one that does not run."""
    try:
        venv.create(ENV, clear=True, with_pip=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"Python's venv module could not make .venv: {error}\nOn Debian and Ubuntu: apt install python3-venv")


def fingerprint() -> str:
    """What an installation depends on: what is asked for, and the Python it is for."""
    files = [ROOT / "pyproject.toml", ROOT / "dev.py", ENV / "pyvenv.cfg", *sorted(CONSTRAINTS.glob("*.txt"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def choose_torch(python: str) -> tuple[str, list[str | Path]]:
    """Where torch comes from, in words, and uv's options for it."""
    if os.environ.get("UV_TORCH_BACKEND"):
        return UV_CHOICE, []
    tag = "cp" + python.replace(".", "")
    wheel = f"{cpu_torch().replace('==', '-')}+cpu-{tag}-{tag}-*{platform.machine().lower()}.whl"
    for folder in find_links():
        if any(folder.glob(wheel)):
            return str(folder), ["--find-links", folder, "--constraint", CONSTRAINTS / "torch-cpu.txt"]
    if works("import importlib.metadata as m; m.version('torch')"):
        return ".venv as it is", []
    return UV_CHOICE, ["--torch-backend=auto"]


def cpu_torch() -> str:
    """The requirement in constraints/torch-cpu.txt."""
    lines = (CONSTRAINTS / "torch-cpu.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def find_links() -> list[Path]:
    """The folders among pip's find-links; addresses are left out."""
    places = [place.removeprefix("file://") for place in pip_settings().get("find-links", "").split()]
    return [Path(place).expanduser() for place in places if "://" not in place]


def pip_settings() -> dict[str, str]:
    """What pip is set to by its configuration files and, before them, its environment variables."""
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.+)$", ask("-m", "pip", "config", "list"), re.MULTILINE)
    found.sort(key=lambda setting: ("global", "install", ":env:").index(setting[0]))
    return {key: str(ast.literal_eval(value)) for _, key, value in found}


def uv_settings() -> dict[str, str]:
    """A certificate file and an index that pip is set to; uv does not read pip's configuration by itself."""
    known, settings = {"SSL_CERT_FILE": "cert", "UV_DEFAULT_INDEX": "index-url"}, pip_settings()
    return {name: settings[key] for name, key in known.items() if key in settings and name not in os.environ}


def run(*command: str | Path, **variables: str) -> int:
    """Runs .venv's Python with these arguments, its output going to ours; returns its exit code."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles all of torch again
    return subprocess.run([PYTHON, *command], cwd=ROOT, env=environment, check=False).returncode


def ask(*command: str) -> str:
    """What .venv's Python prints when it runs with these arguments."""
    return subprocess.run([PYTHON, *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def works(code: str) -> bool:
    """Whether .venv's Python is there and runs the code without an error."""
    try:
        return subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def steps(commands: dict[str, tuple[str, ...]], **variables: str) -> int:
    """Runs all commands, whatever becomes of the first ones; names those that failed and returns 1 if any did."""
    failed = []
    for name, command in commands.items():
        say(name)
        if run(*command, **variables):
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def say(what: str) -> None:
    """A line of our own among the output of the tools."""
    print(f"dev.py: {what}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
