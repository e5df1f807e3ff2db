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


SOURCES = [
    *(path for part in ("vllm_kvpca", "benchmarks") for path in (ROOT / part).rglob("*.py")),
    *(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__).resolve()),
    *(ROOT / "deploy").rglob("*.sh"),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run")),
]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w.~/:$<>{}*-])(?:[a-z_.][\w.-]*/)+[\w-]+\.(?:py|sh|md|toml)\b")
FOLDER = re.compile(
    r"(?<![\w./~-])((?:tests|benchmarks|deploy|docs|presets|vllm_kvpca|\.ci)/[\w.-]*(?:/[\w.-]*)*)(?<!\.)(?![\w\\])"
)
NOT_HERE = {"vllm_kvpca/_presets", "presets/mine"}
"""A folder of the wheel alone; a folder in an example."""
ROOMS = {
    path.name for part in (ROOT, ROOT / "vllm_kvpca") for path in part.iterdir() if path.is_dir()
}


def named_paths(text: str) -> set[str]:
    """Paths of this repository that a text names, commands in fences (of records) left out."""
    text = FENCED.sub("", text)
    return ({match[0] for match in PATH.finditer(text)} | set(FOLDER.findall(text))) - NOT_HERE


def is_there(path: str, beside: Path) -> bool:
    places = (ROOT, ROOT / "vllm_kvpca", beside.parent, *ROOT.glob("tests/*/"))
    return any((place / path).exists() for place in places)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
def test_paths_in_pages_exist(page):
    assert {path for path in named_paths(page.read_text()) if not is_there(path, page)} == set()


def test_paths_in_comments_exist():
    """A file that was renamed leaves its old name in the comments of others."""
    dead = {
        (str(source.relative_to(ROOT)), path)
        for source in SOURCES
        for path in named_paths(source.read_text())
        if path.partition("/")[0] in ROOMS and not is_there(path, source)
    }
    assert dead == set()


def test_a_dead_path_is_found():
    text = "see `serving/step/gone.py` and tests/gone/: `tests/gone/`\n```\nin/a/fence.py\n```\n"
    assert named_paths(text) == {"serving/step/gone.py", "tests/gone/"}


def test_the_architecture_page_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "vllm_kvpca"
    rooms = [
        path.parent
        for part in (package, package / "serving")
        for path in part.glob("*/__init__.py")
    ]
    assert len(rooms) > 10
    assert [room.name for room in rooms if f" {room.name}/ " not in text] == []


def test_nobody_is_sent_to_a_name_on_an_index_that_is_not_ours():
    """Until the package is published, somebody else could take its name: README says where it is
    to be had from, and the other pages link there."""
    install = re.compile(r"pip install (?!--)[^\n`]*")
    found = {page: install.findall(FENCED.sub("", page.read_text())) for page in PAGES}
    commands = [command for lines in found.values() for command in lines]
    assert not [command for command in commands if re.search(r"vllm-kvpca(?!\[)", command)]
    assert found[ROOT / "README.md"].count("pip install .") == 1


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
