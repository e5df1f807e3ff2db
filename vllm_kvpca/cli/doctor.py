"""`vllm-kvpca doctor`: is this installation able to serve compressed?"""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape


def doctor() -> None:
    """Check entry points, versions, presets and a small archive-and-attend; say what is wrong."""
    from vllm_kvpca.serving.doctor import diagnose

    console = Console()
    failed = 0
    for finding in diagnose():
        mark = "[green]ok[/]  " if finding.ok else "[red]FAIL[/]"
        console.print(f"{mark} [bold]{finding.check}[/]: {escape(finding.detail)}")
        failed += not finding.ok
    if failed:
        console.print(f"[red]{failed} of the checks failed.[/]")
        raise typer.Exit(1)
    console.print("All checks passed.")
