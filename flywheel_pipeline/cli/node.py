"""`flywheel node`: one part of a deployment in the foreground, for a container, a unit of systemd, or another host."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command("node")(node)


def node(
    part: str = typer.Argument(..., help="code (the code location as a server), ui, daemon, or worker (Celery)."),
    concurrency: int = typer.Option(1, "--concurrency", min=1, max=64, help="Runs at once on this host (worker)."),
    name: str = typer.Option("flywheel", "--name", help="Name of this worker, unique on its host (worker)."),
) -> None:
    """Become one part of a deployment: code, ui, daemon (one in all) or worker. `flywheel up` is all of them on one host."""
    from flywheel_pipeline.cli.terminal import open_database
    from flywheel_pipeline.database.settings import get_settings
    from flywheel_pipeline.orchestration.nodes import become_node

    engine = open_database()
    url = engine.url
    engine.dispose()
    become_node(get_settings(), url, part, concurrency=concurrency, name=name)
