"""`vllm-kvpca`: the commands, and how their errors reach the terminal.

Each command lives in a module of its own beside this one. Those modules import at their top only
what `--help` can afford (the standard library, typer, rich); torch, transformers and vLLM are
imported inside the functions that need them.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import vllm_kvpca
from vllm_kvpca.cli import (
    api_docs,
    bench,
    calibrate,
    dashboards,
    demo_model,
    doctor,
    evaluate,
    evaluate_answers,
    evaluate_benchmarks,
    metrics_docs,
    plot,
    presets,
    tables,
    tune,
)
from vllm_kvpca.errors import KvpcaError


class _Commands(TyperGroup):
    """Shows an error of ours as its message alone: a traceback would bury what to do."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvpcaError as error:
            _show(str(error))
            raise typer.Exit(code=1) from error
        except OSError as error:
            from vllm_kvpca.whole_files import NO_ROOM, not_written

            # From wherever it comes (the Hub's cache, a temporary file): no fault of the program.
            if error.errno not in NO_ROOM:
                raise
            _show(not_written(error.filename or "the disk", error.errno))
            raise typer.Exit(code=1) from error


def _show(error: str) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(error, markup=False, highlight=False)


app = typer.Typer(
    cls=_Commands,
    name="vllm-kvpca",
    help="Tools around the compressed KV cache for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-kvpca {vllm_kvpca.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


app.command("api-docs")(api_docs.api_docs)
app.add_typer(bench.app, name="bench")
app.command("calibrate")(calibrate.calibrate)
app.command("dashboards")(dashboards.dashboards)
app.command("demo-model")(demo_model.demo_model)
app.command("doctor")(doctor.doctor)
app.add_typer(evaluate.app, name="evaluate")
evaluate.app.command("needle")(evaluate_answers.needle)
evaluate.app.command("recall")(evaluate_answers.recall)
evaluate.app.command("divergence")(evaluate_answers.divergence)
evaluate.app.command("tasks")(evaluate_answers.tasks)
evaluate.app.command("humaneval")(evaluate_benchmarks.humaneval)
evaluate.app.command("bfcl")(evaluate_benchmarks.bfcl)
evaluate.app.command("bfcl-multi-turn")(evaluate_benchmarks.bfcl_multi_turn)
app.command("metrics-docs")(metrics_docs.metrics_docs)
app.command("plot")(plot.plot)
app.command("presets")(presets.presets)
app.command("tables")(tables.tables)
app.command("tune")(tune.tune)

if __name__ == "__main__":
    app()
