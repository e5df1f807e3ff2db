"""Gather real text for calibration and evaluation from Debian packages, without a model hub.

    python benchmarks/texts.py FOLDER

writes FOLDER/calibration and FOLDER/evaluation, two sets from different sources, and
FOLDER/manifest.json with the package versions and the sha256 of every file. It compares the
result with benchmarks/text-manifest.json, which says what the shipped presets were calibrated
and measured on; --update replaces that file. It needs Debian or Ubuntu with apt-get and dpkg (and
package lists: apt-get update). Packages are unpacked into a temporary folder, not installed.

            calibration                              evaluation
    prose   quotations and anecdotes (fortunes)      the King James Bible
    docs    Debian policy, developer's reference     the Python 3.11 documentation
    code    SQLAlchemy, Jinja, Flask, Click, ...     the Python 3.11 standard library

Code of libraries is cut to CODE_LIMIT characters a package, so that none outweighs the rest.
Calibration takes its windows from the files in turn, evaluation spreads them over each file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MANIFEST = Path(__file__).with_name("text-manifest.json")
CODE_LIMIT = 300_000
EVALUATION_LIMIT = 2_000_000

PACKAGES = (
    "bible-kjv",
    "bible-kjv-text",
    "debian-policy",
    "developers-reference",
    "doc-debian",
    "fortunes",
    "fortunes-min",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3-click",
    "python3-flask",
    "python3-jinja2",
    "python3-requests",
    "python3-sqlalchemy",
    "python3.11-doc",
)
FORTUNES = ("computers", "definitions", "humorists", "science", "wisdom")
FORTUNES_MIN = ("literature",)
LIBRARIES = ("click", "flask", "jinja2", "requests", "sqlalchemy")
BOOKS = ("Genesis", "Ruth", "Job", "Ecclesiastes", "Mark", "Acts")
DOCS = ("tutorial", "howto", "faq")
MODULES = (
    "argparse",
    "ast",
    "asyncio/base_events",
    "collections/__init__",
    "concurrent/futures/process",
    "csv",
    "dataclasses",
    "email/message",
    "heapq",
    "http/client",
    "json/decoder",
    "logging/__init__",
    "shutil",
    "statistics",
    "textwrap",
    "unittest/mock",
    "zipfile",
)

Root = Callable[[str], Path]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write calibration/ and evaluation/ to")
    parser.add_argument("--update", action="store_true", help=f"replace {MANIFEST.name}")
    arguments = parser.parse_args()
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            print(f"{tool} is missing: run this on Debian or Ubuntu.", file=sys.stderr)
            return 1
    try:
        manifest = gather(arguments.folder)
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(error.cmd)}\n{error.stderr}", file=sys.stderr)
        print("Run `apt-get update` first; bible.data needs libreadline8.", file=sys.stderr)
        return 1
    if arguments.update:
        MANIFEST.write_text(manifest)
    if not MANIFEST.exists() or MANIFEST.read_text() != manifest:
        print(f"These texts differ from {MANIFEST.name}: other package versions.", file=sys.stderr)
    return 0


def gather(folder: Path) -> str:
    """Write both sets to `folder`; return the manifest as JSON."""
    with tempfile.TemporaryDirectory() as work:
        versions = {package: _unpack(package, Path(work)) for package in PACKAGES}

        def root(package: str) -> Path:
            return Path(work) / package

        sets = {"calibration": _calibration(root), "evaluation": _evaluation(root)}
        files = {name: list(_write(folder / name, texts)) for name, texts in sets.items()}
    manifest = json.dumps({"packages": versions, **files}, indent=2) + "\n"
    (folder / "manifest.json").write_text(manifest)
    for name, entries in files.items():
        total = sum(entry["bytes"] for entry in entries)
        print(f"{folder / name}: {len(entries)} files, {total:,} bytes")
    return manifest


def _unpack(package: str, work: Path) -> str:
    """Download and unpack a package into `work`/`package`; return its version."""
    target = work / package
    target.mkdir()
    _run("apt-get", "download", package, cwd=target)
    (archive,) = target.glob("*.deb")
    _run("dpkg", "-x", str(archive), str(target))
    return _run("dpkg-deb", "--field", str(archive), "Version").strip()


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout


def _calibration(root: Root) -> Iterator[tuple[str, str]]:
    for package, names in (("fortunes", FORTUNES), ("fortunes-min", FORTUNES_MIN)):
        for name in names:
            text = _read(root(package) / "usr/share/games/fortunes" / name)
            # A line with a percent sign alone parts two quotations.
            yield f"prose-{name}.txt", re.sub(r"^%\n", "\n", text, flags=re.MULTILINE)
    doc = root("debian-policy") / "usr/share/doc/debian-policy"
    yield "docs-debian-policy.txt", _read(doc / "policy.txt.gz")
    doc = root("doc-debian") / "usr/share/doc/debian"
    yield "docs-debian-constitution.txt", _read(doc / "constitution.txt.gz")
    doc = root("developers-reference") / "usr/share/developers-reference"
    yield "docs-developers-reference.txt", _read(doc / "developers-reference.txt.gz")
    for name in LIBRARIES:
        package = root(f"python3-{name}") / "usr/lib/python3/dist-packages" / name
        yield f"code-{name}.txt", _join(sorted(package.rglob("*.py")), CODE_LIMIT)


def _evaluation(root: Root) -> Iterator[tuple[str, str]]:
    program = root("bible-kjv") / "usr/bin/bible"
    data = root("bible-kjv-text") / "usr/lib"
    # References beyond a book's end are read as its last verse.
    books = [f"{book}1:1-{book}999:999" for book in BOOKS]
    yield "prose.txt", _run(str(program), "-l78", "-p", str(data), *books).lstrip("\n")
    sources = root("python3.11-doc") / "usr/share/doc/python3.11/html/_sources"
    pages = [page for part in DOCS for page in sorted((sources / part).glob("*.txt"))]
    yield "docs.txt", _join(pages, EVALUATION_LIMIT)
    roots = [root(f"libpython3.11-{part}") / "usr/lib/python3.11" for part in ("minimal", "stdlib")]
    paths = [folder / f"{name}.py" for name in MODULES for folder in roots]
    yield "code.txt", _join((path for path in paths if path.exists()), EVALUATION_LIMIT)


def _read(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


def _join(paths: Iterable[Path], limit: int) -> str:
    """Whole files in the given order, as long as the result stays below `limit` characters."""
    text = ""
    for path in paths:
        part = _read(path)
        if part and len(text) + len(part) < limit:
            text += part.rstrip("\n") + "\n\n\n"
    return text


def _write(folder: Path, texts: Iterable[tuple[str, str]]) -> Iterator[dict[str, object]]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts:
        content = text.encode()
        (folder / name).write_bytes(content)
        yield {
            "name": name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


if __name__ == "__main__":
    sys.exit(main())
