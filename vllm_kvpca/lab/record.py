"""A measured result with everything needed to repeat it. A number without one is not published."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from vllm_kvpca.whole_files import whole_files

RECORDS = Path("benchmarks/records")
_VERSIONS = ("vllm-kvpca", "torch", "transformers")
_CHUNK = 1 << 22


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextFile(_Strict):
    """A text that was read: name without folders, size in bytes, sha256 of its content."""

    name: str
    size: int
    sha256: str


class Hardware(_Strict):
    """The machine.

    Attributes:
        cores: logical cores that the process may use.
        threads_bind: value of VLLM_CPU_OMP_THREADS_BIND, the cores vLLM's CPU workers are bound to.
            It has no effect on engines whose core runs in our process (engine.start): all but
            those of "throughput".
        ram_gib: main memory, GiB.
        gpu: name of the first GPU, None without one.
    """

    cpu: str
    cores: int
    threads_bind: str | None
    ram_gib: float
    gpu: str | None


class Record(_Strict):
    """One result.

    Attributes:
        kind: which measurement; also the first part of the file name.
        slug: what tells this record from others of its kind.
        model: name of the model, without folders.
        model_sha256: of its configuration and weights (see `fingerprint`).
        commit, dirty: of the source tree, None if the package was not run from one; whether
            the package or the presets differ from that commit.
        command: the command line that made the record.
        settings: what was chosen; results: what was measured. Keys name their units.
        date: UTC, ISO 8601.
    """

    schema_version: Literal[1] = 1
    kind: str = Field(pattern=r"^[a-z][a-z-]*$")
    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    model: str
    model_sha256: str
    hardware: Hardware
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    command: str
    texts: tuple[TextFile, ...] = ()
    seed: int | None = None
    settings: dict[str, JsonValue]
    results: dict[str, JsonValue]
    date: str

    @property
    def file_name(self) -> str:
        return f"{self.kind}-{self.slug}.json"

    def write(self, folder: Path = RECORDS) -> Path:
        """Write the record to `folder`, replacing an older one of the same name."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
        with whole_files(folder) as new:
            (new / self.file_name).write_text(text)
        return folder / self.file_name


def load_all(folder: Path = RECORDS, kind: str | None = None) -> list[Record]:
    """All records of a folder, or those of one kind, by file name."""
    paths = sorted(folder.glob(f"{kind or '*'}-*.json"))
    records = [Record.model_validate_json(path.read_bytes()) for path in paths]
    return [record for record in records if kind in (None, record.kind)]


def make_record(
    kind: str,
    slug_parts: Iterable[str],
    model: str,
    settings: dict[str, Any],
    results: dict[str, Any],
    texts: Iterable[Path] = (),
    seed: int | None = None,
) -> Record:
    """A record of this moment, this machine and this command line."""
    name = model_name(model)
    commit, dirty = source_state()
    return Record(
        kind=kind,
        slug=slug(name, *slug_parts),
        model=name,
        model_sha256=fingerprint(model),
        hardware=hardware(),
        versions=versions(),
        commit=commit,
        dirty=dirty,
        command=command_line(),
        texts=tuple(text_file(path) for path in texts),
        seed=seed,
        settings=settings,
        results=results,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def slug(*parts: str) -> str:
    """Lower-case words joined by dashes: part of a file name."""
    words = (re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in parts)
    return "-".join(word for word in words if word)


def model_name(model: str) -> str:
    """A model's name; of a local folder its last part only."""
    return Path(model).name if Path(model).is_dir() else model


@lru_cache(maxsize=4)
def fingerprint(model: str) -> str:
    """sha256 over the names and contents of a model folder's config.json and weights.

    For a Hub name that is not a folder: the commit of the copy in the local cache.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True)).name
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        _update(digest, path)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)


def text_file(path: Path) -> TextFile:
    digest = hashlib.sha256()
    _update(digest, path)
    return TextFile(name=path.name, size=path.stat().st_size, sha256=digest.hexdigest())


def hardware() -> Hardware:
    import torch

    return Hardware(
        cpu=_cpu_name(),
        cores=_usable_cores(),
        threads_bind=os.environ.get("VLLM_CPU_OMP_THREADS_BIND"),
        ram_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    )


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter; vLLM's CPU build counts as vllm."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = version(name)
    for name in ("vllm-cpu", "vllm"):
        try:
            found["vllm"] = f"{version(name)}{' (cpu)' if name == 'vllm-cpu' else ''}"
            break
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def source_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree this package runs from, and whether its files differ from it.

    As it is at the first call: engines run for minutes, and the tree may change meanwhile.
    KVPCA_SOURCE_COMMIT names the commit of a clean tree that travelled without its git folder.
    """
    if "KVPCA_SOURCE_COMMIT" in os.environ:
        return os.environ["KVPCA_SOURCE_COMMIT"], False
    tree = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(tree), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        # An installed wheel may lie inside some other repository: ask for our own file.
        if git("ls-files", "--error-unmatch", "vllm_kvpca/__init__.py").returncode:
            return None, None
    except OSError:  # no git
        return None, None
    changed = git("status", "--porcelain", "--", "vllm_kvpca", "presets").stdout
    return git("rev-parse", "HEAD").stdout.strip(), bool(changed.strip())


def command_line() -> str:
    """The command as typed, with the home folder as ~, and without --resume, which changes nothing
    about a result."""
    words = [shlex.quote(word) for word in sys.argv[1:] if word != "--resume"]
    home = str(Path.home())
    return " ".join(["vllm-kvpca", *(word.replace(home, "~") for word in words)])
