"""The documentation: links lead somewhere, and the reference is the code's."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

import vllm_kvpca
from vllm_kvpca import errors
from vllm_kvpca.cli import tables
from vllm_kvpca.cli.main import app
from vllm_kvpca.lab.docs.api import ENVIRONMENT

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "presets").rglob("*.md"),
    ]
)
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)\"""")


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for match in LINK.finditer(page.read_text()):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, part = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: {target} is not there"
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), f"{link}: no such heading"


def test_images_are_small():
    images = list((ROOT / "docs" / "images").iterdir())
    assert images and sum(path.stat().st_size for path in images) < 2e6


def test_the_reference_is_fresh():
    result = CliRunner().invoke(app, ["api-docs", "--output", str(API), "--check"])
    assert result.exit_code == 0, result.stderr


def test_tables_are_those_of_the_records():
    pages = [str(ROOT / page) for page in tables.FILES]
    records = str(ROOT / "benchmarks" / "records")
    result = CliRunner().invoke(app, ["tables", *pages, "--records", records, "--check"])
    assert result.exit_code == 0, result.stderr


def test_the_reference_names_everything_public():
    text = API.read_text()
    for name in set(vllm_kvpca.__all__) - {"__version__"}:
        assert f"vllm_kvpca.{name}(" in text
    tree = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(f"`{error.__name__}`" in text for error in tree)
    commands = CliRunner().invoke(app, ["--help"]).output
    for name in ("calibrate", "doctor", "presets", "tables"):
        assert name in commands and f"`vllm-kvpca {name}`" in text
    assert "`vllm-kvpca evaluate quality`" in text and "--thresholds" in text


def test_the_reference_names_every_variable_that_is_read():
    places = ["vllm_kvpca/**/*.py", "deploy/**/*", "Makefile", ".ci/run"]
    files = [path for place in places for path in ROOT.glob(place) if path.is_file()]
    found = {name for path in files for name in re.findall(r"KVPCA_[A-Z_]+[A-Z]", _text(path))}
    assert found == set(ENVIRONMENT)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""
