"""Human acts on the command line: each needs an actor and a reason, each subject is done or refused on its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import typer

from flywheel_pipeline.cli.terminal import open_database, out, print_json

ACTOR = typer.Option(..., "--actor", help="Who decides this, by name.")
REASON = typer.Option(..., "--reason", help="Why; auditors read it.")
JSON = typer.Option(False, "--json", help="Print one JSON document.")


def _do(
    what: str,
    subjects: list[str],
    actor: str,
    reason: str,
    json: bool,
    change: dict[str, Any] | None = None,
    site: str = "",
    agent_version: str = "",
) -> None:
    from flywheel_pipeline.promotion.acts import Act, act, scope_of

    scope = scope_of(site, agent_version)
    reports = act(open_database(), cast(Act, what), subjects, actor=actor, reason=reason, change=change, scope=scope)
    if json:
        print_json([asdict(report) for report in reports])
    else:
        for report in reports:
            out.print(f"{'✓' if report.done else '✗'} {report.subject}: {report.message}", markup=False)
    if not all(report.done for report in reports):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the acts as commands."""

    def subject_command(what: str, help_text: str, subject_help: str) -> None:
        @app.command(what, help=help_text)
        def command(
            subjects: list[str] = typer.Argument(..., help=subject_help),
            actor: str = ACTOR,
            reason: str = REASON,
            json: bool = JSON,
        ) -> None:
            _do(what, subjects, actor, reason, json)

    def plain_command(what: str, help_text: str) -> None:
        @app.command(what, help=help_text)
        def command(actor: str = ACTOR, reason: str = REASON, json: bool = JSON) -> None:
            _do(what, [], actor, reason, json)

    subject_command("approve", "Approve patterns by name; the next run's gates read it.", "Pattern keys or ids.")
    subject_command("reject", "Reject patterns.", "Pattern keys or ids.")

    def scoped_command(what: str, help_text: str) -> None:
        @app.command(what, help=help_text)
        def command(
            subjects: list[str] = typer.Argument(..., help="Rule ids."),
            site: str = typer.Option("", "--site", help="Only at this site."),
            agent_version: str = typer.Option("", "--agent-version", help="Only on agents of this release."),
            actor: str = ACTOR,
            reason: str = REASON,
            json: bool = JSON,
        ) -> None:
            _do(what, subjects, actor, reason, json, site=site, agent_version=agent_version)

    scoped_command(
        "quarantine", "Take rules out of service and out of every manifest, at once; or from one site or agent release."
    )
    scoped_command("lift", "End the quarantine of rules at a site or on an agent release.")
    subject_command("retire", "Retire rules for ever.", "Rule ids.")
    plain_command("freeze", "Stop promotion until a thaw; never stops demotion.")
    plain_command("thaw", "End a freeze.")

    @app.command("rollout")
    def rollout(
        rule_id: str = typer.Argument(..., help="A rule in shadow, canary or ring."),
        what: str = typer.Argument(..., help="pause, resume or abort.", metavar="pause|resume|abort"),
        actor: str = ACTOR,
        reason: str = REASON,
        json: bool = JSON,
    ) -> None:
        """Pause or resume a rollout at its step, or abort it: quarantined, and back as a new version only."""
        from flywheel_pipeline.errors import UsageError
        from flywheel_pipeline.promotion.acts import ROLLOUT_ACTS

        if what not in ROLLOUT_ACTS:
            raise UsageError(f"A rollout knows no {what}.", hint=f"flywheel rollout {rule_id} pause, resume or abort")
        _do(what, [rule_id], actor, reason, json)

    @app.command("readmit")
    def readmit(
        rule_id: str = typer.Argument(..., help="A quarantined rule."),
        runbook: str = typer.Option("", "--runbook", help="The runbook it is to run now."),
        incident_type: str = typer.Option("", "--incident-type", help="The incident type it is to match now."),
        platform: str = typer.Option("", "--platform", help="windows, linux or macos."),
        actor: str = ACTOR,
        reason: str = REASON,
        json: bool = JSON,
    ) -> None:
        """Re-admit a quarantined rule as a new version: it needs changed content and begins again as proposed."""
        change: dict[str, Any] = {}
        if runbook:
            change["runbook_id"] = runbook
        if incident_type:
            change["incident_pattern"] = {"incident_type": incident_type}
        if platform:
            change["platform"] = platform
        _do("readmit", [rule_id], actor, reason, json, change)
