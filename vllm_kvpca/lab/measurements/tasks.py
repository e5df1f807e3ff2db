"""Benchmarks of lm-eval (EleutherAI's Language Model Evaluation Harness) on served engines.

lm-eval starts vLLM itself; ours are the engine's arguments. Prompts are computed in small chunks,
as everywhere here: of a prompt that one step computes whole, nothing would be read from the
archive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_kvpca.errors import OptionsError, SetupError
from vllm_kvpca.lab import engine, presets
from vllm_kvpca.lab.against_stock import Done, Thresholds, nothing_done, record_of, variants
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.extra import need
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import THRESHOLDS_HEAD, Table, after_and_recent, stored


class Chosen(BaseModel):
    """What lm-eval runs.

    Attributes:
        tasks: names of tasks or groups.
        include_path: folder with further tasks (YAML files), None for lm-eval's own only.
        limit: examples of each task, None for all.
        num_fewshot: examples in the prompt, None for what the task says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None


def run(
    model: str,
    preset_names: Sequence[str],
    chosen: Chosen,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0),),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "tasks": one for each preset and pair of thresholds."""
    need("lm_eval")
    presets.check(preset_names, model)
    check(chosen)
    common = EngineSettings(model=model, chunk=chunk, seed=seed, **more)
    todo = variants(common, preset_names, thresholds, done)
    if not todo:
        return
    stock = measure(common, chosen)
    used = chosen.model_dump(mode="json", exclude={"include_path"})
    for settings in todo:
        results = compare(stock, measure(settings, chosen))
        yield record_of("tasks", settings, results, used, (), *chosen.tasks)


def check(chosen: Chosen) -> None:
    """Load the tasks and their data once, before any engine starts.

    Raises:
        SetupError: a task's data cannot be had.
        OptionsError: no task of that name.
    """
    from lm_eval.tasks import get_task_dict

    manager = _manager(chosen)
    known = manager.match_tasks(list(chosen.tasks))
    if unknown := sorted(set(chosen.tasks) - set(known)):
        raise OptionsError(
            f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them; give "
            "--include-path for your own."
        )
    try:
        get_task_dict(list(chosen.tasks), manager)
    except Exception as error:
        # datasets and the Hub client raise many unrelated types.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SetupError(
            f"the data of {', '.join(chosen.tasks)} cannot be loaded ({reason}): download it "
            "where there is a network (HF_HOME holds it), or give --include-path a task with "
            "local data."
        ) from error


def measure(settings: EngineSettings, chosen: Chosen) -> dict[str, Any]:
    """Run the tasks on one engine, in a process of its own.

    Returns:
        lm-eval's results: of each task its metrics; versions; samples; and lm-eval's version.
    """
    return engine.in_process(_measure, settings, chosen)


def _measure(settings: EngineSettings, chosen: Chosen) -> dict[str, Any]:
    engine.prepare_environment(in_core=True)
    import lm_eval

    found = lm_eval.simple_evaluate(**call(settings, chosen), task_manager=_manager(chosen))
    measured = {key: found[key] for key in ("results", "n-samples", "versions")}
    return measured | {"lm_eval": version("lm-eval")}


def call(settings: EngineSettings, chosen: Chosen) -> dict[str, Any]:
    """Arguments of lm_eval.simple_evaluate, all but the task manager."""
    arguments = engine.arguments(settings)
    arguments["pretrained"] = arguments.pop("model")  # lm-eval's name for it
    return {
        "model": "vllm",
        "model_args": arguments,
        "tasks": list(chosen.tasks),
        "num_fewshot": chosen.num_fewshot,
        "limit": chosen.limit,
        "batch_size": "auto",
        "log_samples": False,
        "random_seed": settings.seed,
        "numpy_random_seed": settings.seed,
        "torch_random_seed": settings.seed,
        "fewshot_random_seed": settings.seed,
    }


def _manager(chosen: Chosen) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(chosen.include_path) if chosen.include_path else None)


def compare(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The results of a record: a row for each task and metric.

    Each row holds the metric and its standard error (lm-eval's, None where it has none) for stock
    and for the preset, which answered the same examples.
    """
    rows = []
    for task, ours in stock["results"].items():
        theirs = other["results"][task]
        for key, value in ours.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = f"{metric}_stderr,{filtered}"
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "stock": value,
                    "preset": theirs[key],
                    "change": theirs[key] - value,
                    "stderr_stock": _number(ours.get(error)),
                    "stderr": _number(theirs.get(error)),
                    "examples": stock["n-samples"].get(task, {}).get("effective"),
                    "task_version": str(stock["versions"].get(task)),
                }
            )
    return {"rows": rows, "lm_eval": other["lm_eval"]}


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" where there is no standard error."""
    return float(value) if isinstance(value, int | float) else None


def _rows(record: Record) -> list[list[str]]:
    """A line for each task and metric."""
    results: Any = record.results
    return [
        [
            stored(record)[0],
            after_and_recent(record),
            f"{row['task']}: {row['metric']}",
            _with_error(row["stock"], row["stderr_stock"]),
            _with_error(row["preset"], row["stderr"]),
            f"{row['examples']}",
        ]
        for row in results["rows"]
    ]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


TABLES = {
    "tasks": Table(
        ["preset", THRESHOLDS_HEAD, "task", "stock", "preset", "examples"],
        _rows,
        "vllm-kvpca evaluate tasks",
    )
}
