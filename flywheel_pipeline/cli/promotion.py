"""Commands of the promotion room: explain, gate, backtest, certificate, policy."""

from __future__ import annotations

import datetime as dt
import json as json_module
import math
from pathlib import Path
from typing import Any

import typer
import typer.core
from rich.markup import escape

from flywheel_pipeline.cli.terminal import open_database, out, percent, print_json, print_table, progress
from flywheel_pipeline.errors import FlywheelError, UsageError


class _ExportByDefault(typer.core.TyperGroup):
    """`flywheel certificate RULE` is `flywheel certificate export RULE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `export` before a first word that is no command of the group."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["export", *args]
        return super().parse_args(ctx, args)


certificate = typer.Typer(
    help="What a promotion rests on, to be recomputed by anybody: `flywheel certificate RULE --out FILE` exports it.",
    no_args_is_help=True,
    cls=_ExportByDefault,
)
policy = typer.Typer(help="Promotion policies: versioned, hashed, one in force.", no_args_is_help=True)
JSON = typer.Option(False, "--json", help="Print one JSON document.")
MARKS = {"pass": "[green]✓[/]", "fail": "[red]✗[/]", "inconclusive": "[yellow]…[/]"}


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("explain")(explain)
    app.command("gate")(gate)
    app.command("backtest")(backtest)
    app.add_typer(certificate, name="certificate")
    app.add_typer(policy, name="policy")


def explain(
    subject: str = typer.Argument(..., help="A rule id, a pattern key or a pattern id."),
    json: bool = JSON,
) -> None:
    """Say why a rule or pattern is promoted, held or quarantined: each gate in order, observed and required."""
    from flywheel_pipeline.promotion.explain import explain as ask

    found = ask(open_database(), subject)
    if json:
        print_json(found)
        return
    out.print(f"[bold]{escape(found['subject_id'])}[/]  ({found['subject_kind']}, policy {found['policy']})")
    out.print(escape(found["summary"]), soft_wrap=True)
    if found["gates"]:
        out.print("\n[bold]Gates, on the evidence of now[/]")
        for line in found["gates"]:
            out.print(f"  {MARKS[line['verdict']]} {line['gate']:24} {escape(line['sentence'])}", soft_wrap=True)
            if line["verdict"] != "pass":
                out.print(
                    f"      observed {escape(line['observed'])}; required {escape(line['required'])}",
                    style="dim",
                    soft_wrap=True,
                )
    if found["ladder"]:
        out.print()
        print_table(
            "Ladder of the sequential test",
            found["ladder"],
            {
                "stage": "stage",
                "floor": "floor",
                "alpha": "alpha",
                "verdict": "verdict",
                "more_clean": "clean episodes still needed",
            },
        )
    if found["cusum"]:
        out.print()
        print_table(
            "CUSUM by scope: W, the evidence that it got worse there",
            [{**row, "w": f"{row['w']:.2f}"} for row in found["cusum"]],
            {"scope": "scope", "value": "where", "episodes": "episodes", "failures": "failed", "w": "W"},
        )
    if found["quarantined_scopes"]:
        out.print()
        print_table(
            "Quarantined in parts of the fleet",
            found["quarantined_scopes"],
            {"at": "when", "scope_kind": "scope", "scope_value": "where", "actor": "by", "reason": "because"},
        )
    if found["rollout"]:
        step, sites = found["rollout"]["step"], found["rollout"]["served_sites"]
        out.print(
            f"\nRollout: {found['state']}, step {step or '-'}, on {sites} site{'' if sites == 1 else 's'}"
            + (f", paused by {found['rollout']['paused_by']}" if found["rollout"]["paused_by"] else "")
            + ".",
            markup=False,
        )
    if found["events"]:
        out.print()
        print_table(
            "Ledger",
            found["events"],
            {
                "at": "when",
                "kind": "step",
                "to_state": "state",
                "rule_version": "version",
                "actor": "by",
                "reason": "because",
            },
        )
    if found["why"]:
        from flywheel_pipeline.cli.why import print_causes

        out.print(f"\n[bold]Causes[/]  (as of {found['why']['as_of'][:16]}; `flywheel why` says more)")
        if found["why"]["sentence"]:
            out.print(escape(found["why"]["sentence"]), soft_wrap=True)
        print_causes(found["why"])
    if found["failures"]:
        out.print()
        print_table(
            "Why it fails", found["failures"], {"count": "executions", "outcome_class": "class", "template": "error"}
        )


def gate(
    successes: int = typer.Argument(..., min=0, help="Episodes that held."),
    failures: int = typer.Argument(..., min=0, help="Episodes that did not."),
    floor: float = typer.Option(0.90, "--floor", help="Success rate to be above, a fraction."),
    alpha: float = typer.Option(0.05, "--alpha", help="Probability of ever promoting at the floor."),
    json: bool = JSON,
) -> None:
    """Evaluate bare counts: promote, reject or inconclusive, and how many clean episodes are still needed."""
    from flywheel_pipeline.promotion import evalue

    for name, value in (("--floor", floor), ("--alpha", alpha)):
        if not 0.0 < value < 1.0 or math.isnan(value):
            raise UsageError(f"{name} is a fraction strictly between 0 and 1, not {value}.", hint=f"Try {name} 0.9.")
    found = {
        "verdict": evalue.verdict(successes, failures, floor, alpha),
        "log_e": evalue.log_e(successes, failures, floor),
        "log_e_reject": evalue.log_e_reject(successes, failures, floor),
        "log_threshold": evalue.threshold(alpha),
        "needed_clean": evalue.needed_clean(successes, failures, floor, alpha),
    }
    if json:
        print_json(found)
    else:
        out.print(
            f"[bold]{found['verdict']}[/]: log E = {found['log_e']:.3f}, against {found['log_e_reject']:.3f}, "
            f"threshold {found['log_threshold']:.3f}."
        )
        if found["verdict"] != "promote":
            more = found["needed_clean"]
            out.print(
                "No number of clean episodes within reach promotes."
                if more is None
                else f"{more} more clean episodes in a row would promote."
            )


def backtest(
    policies: list[str] = typer.Option(["legacy", "standard"], "--policy", help="Name of a policy; may be repeated."),
    since: dt.datetime | None = typer.Option(
        None, "--from", formats=["%Y-%m-%d"], help="First day of history (UTC); default the first there is."
    ),
    until: dt.datetime | None = typer.Option(None, "--to", formats=["%Y-%m-%d"], help="Last day of history (UTC)."),
    runs: int = typer.Option(200, "--runs", min=1, max=10_000, help="Simulated fleets for each true rate."),
    seed: int = typer.Option(1, "--seed", min=0, help="Seed of the simulated fleets."),
    history: bool = typer.Option(True, "--history/--no-history", help="Replay the database, or simulate only."),
    plot_file: Path | None = typer.Option(None, "--plot", help="PNG to write: promotions by true success rate."),
    json: bool = JSON,
) -> None:
    """Replay history and fleets of known truth through policies: what each would have promoted, when, at what cost."""
    from flywheel_pipeline.promotion import backtest as backtests
    from flywheel_pipeline.promotion.explain import current_batch
    from flywheel_pipeline.promotion.history import backtest_history
    from flywheel_pipeline.promotion.policy import load_policy

    if since is not None and until is not None and since > until:
        raise UsageError("--from is after --to.", hint="Swap them.")
    if plot_file is not None and not plot_file.parent.is_dir():
        raise UsageError(f"There is no directory {plot_file.parent}.", hint="Create it, or name another file.")
    chosen = [load_policy(name) for name in dict.fromkeys(policies)]
    replayed: list[dict[str, Any]] = []
    if history:
        with progress("replaying history"), open_database().connect() as connection:
            replayed = backtest_history(
                connection,
                current_batch(connection),
                chosen,
                since=since.date() if since else None,
                until=until.date() if until else None,
            )
    plans = [backtests.even_fleet(rate) for rate in (0.70, 0.80, 0.85, 0.90, 0.95, 0.98)]
    uneven = [backtests.dead_sites(), backtests.giant_site()]
    with progress(f"simulating {runs} fleets for each rate"):
        simulated = backtests.compare_on_fleets(
            chosen, [*plans, *uneven], backtests.ideal_facts(), runs=runs, seed=seed
        )
        even = {plan.name for plan in plans}
        if plot_file is not None:
            plot_file.write_bytes(backtests.plot([row for row in simulated if row["fleet"] in even]))
    if json:
        print_json(
            {
                "policies": [{"name": p.name, "version": p.version, "hash": p.policy_hash} for p in chosen],
                "history": replayed,
                "simulation": simulated,
                "plot": None if plot_file is None else str(plot_file),
            }
        )
        return
    _print_backtest(replayed, simulated, history=history)
    if plot_file is not None:
        out.print(f"\nWrote {plot_file}.", markup=False)


def _print_backtest(replayed: list[dict[str, Any]], simulated: list[dict[str, Any]], *, history: bool) -> None:
    rows = [
        {
            **row,
            "promoted": f"{row['promoted']:.1%}",
            "false": "-" if row["false_promotion"] is None else f"{row['false_promotion']:.1%}",
            "median": None if row["median_episodes"] is None else round(row["median_episodes"]),
        }
        for row in simulated
    ]
    print_table(
        f"Fleets of 40 sites with planted truth, a look after each episode ({simulated[0]['runs']:,} runs)",
        rows,
        {
            "fleet": "true success",
            "policy": "policy",
            "promoted": "promoted",
            "false": "of these wrongly",
            "median": "median episodes",
        },
    )
    if not history:
        return
    served = [
        {
            **row,
            "later": f"{row['later_failures']} of {row['later_episodes']}",
            "rate": percent(row["later_success_rate"]),
        }
        for row in replayed
        if row["served_day"]
    ]
    out.print()
    if served:
        print_table(
            "History, a look a day: what each policy would have put on a machine",
            served,
            {
                "pattern": "pattern",
                "policy": "policy",
                "served_day": "served from",
                "fleet_day": "whole fleet",
                "episodes_before": "episodes before",
                "later": "failed later",
                "rate": "success later",
            },
        )
    names = {row["policy"]: 0 for row in replayed}
    for row in served:
        names[row["policy"]] += 1
    total = len({row["pattern"] for row in replayed})
    for name, count in names.items():
        out.print(f"{name}: {count} of {total} patterns served.", markup=False)
    if not replayed:
        out.print("The database holds no L2 execution in these days.")


@certificate.command("export")
def export(
    rule_id: str = typer.Argument(..., help="A promoted rule."),
    out_file: Path = typer.Option(..., "--out", help="File to write."),
) -> None:
    """Write the certificate of a rule's last promotion to a file."""
    import sqlalchemy as sa

    with open_database().connect() as connection:
        document = connection.execute(
            sa.text(
                "SELECT certificate FROM rule_events WHERE rule_id = :id AND certificate IS NOT NULL "
                "ORDER BY event_id DESC LIMIT 1"
            ),
            {"id": rule_id},
        ).scalar_one_or_none()
    if document is None:
        raise FlywheelError(
            f"Rule {rule_id} has no certificate: Flywheel did not promote it.",
            hint="Built-in and imported rules have none; `flywheel explain` shows where a rule comes from.",
        )
    out_file.write_text(json_module.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    out.print(f"Wrote {out_file}; `flywheel certificate verify {out_file}` recomputes it offline.", markup=False)


@certificate.command("verify")
def verify(file: Path = typer.Argument(..., help="A certificate."), json: bool = JSON) -> None:
    """Recompute a certificate offline, without a database. Exit 1 if anything does not fit."""
    from flywheel_pipeline.promotion.certificate import verify as recompute

    if not file.is_file():
        raise UsageError(f"There is no file {file}.", hint="Export one: flywheel certificate export RULE --out FILE.")
    problems = recompute(file.read_bytes())
    if json:
        print_json({"valid": not problems, "problems": problems})
    elif problems:
        out.print("[bold red]Not valid[/]")
        for problem in problems:
            out.print(f"  ✗ {problem}", markup=False)
    else:
        out.print("[green]Valid[/]: hashes, policy, definition, evidence and every gate recompute to the same verdict.")
    if problems:
        raise typer.Exit(1)


@policy.command("list")
def list_policies(json: bool = JSON) -> None:
    """List the policies and the one in force."""
    from flywheel_pipeline.aggregates.batches import policy_in_force
    from flywheel_pipeline.promotion.policy import load_policy, policy_names

    with open_database().connect() as connection:
        current = policy_in_force(connection)
    rows: list[dict[str, Any]] = []
    for name in policy_names():
        loaded = load_policy(name)
        rows.append(
            {
                "name": name,
                "version": loaded.version,
                "hash": loaded.policy_hash[:12],
                "in_force": name == current.policy_name,
                "description": loaded.description,
            }
        )
    if json:
        print_json(rows)
    else:
        for row in rows:
            row["mark"] = "in force" if row["in_force"] else ""
        print_table(
            "Policies",
            rows,
            {"name": "name", "version": "version", "hash": "hash", "mark": "", "description": "description"},
        )


@policy.command("activate")
def activate(
    name: str = typer.Argument(..., help="Name of a policy."),
    actor: str = typer.Option(..., "--actor", help="Who decides this, by name."),
    reason: str = typer.Option(..., "--reason", help="Why; auditors read it."),
) -> None:
    """Put a policy in force, in real time, from the next run on."""
    from flywheel_pipeline.aggregates.batches import activate_policy

    if not actor.strip() or not reason.strip():
        raise UsageError("To activate a policy needs an actor and a reason.")
    with open_database().begin() as connection:
        changed = activate_policy(connection, name, actor=actor, reason=reason)
    out.print(f"Policy {name} is in force." if changed else f"Policy {name} was in force already.")
