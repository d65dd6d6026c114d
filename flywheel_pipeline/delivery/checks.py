"""Dagster checks of the delivery room."""

from flywheel_pipeline.checks import Check, at_batch, check_step, reading
from flywheel_pipeline.delivery import quality, service_levels
from flywheel_pipeline.delivery.scopes import no_manifest_serves_a_quarantined_scope

delivery_checks = check_step(
    "delivery_checks",
    [
        Check(
            "rule_manifests",
            "manifests_match_registry",
            "No manifest serves a rule that is out of service, and none forgets one that is in service everywhere.",
            reading(quality.manifests_match_registry),
        ),
        Check(
            "rule_manifests",
            "no_manifest_serves_a_quarantined_scope",
            "No manifest serves a rule at a site, or to a release of the agent, where it is quarantined.",
            reading(no_manifest_serves_a_quarantined_scope),
        ),
        Check(
            "deployments",
            "promoted_rules_are_received",
            "Every promoted rule in service was acknowledged or executed by some appliance.",
            reading(quality.promoted_rules_are_received),
            warn=True,
        ),
        Check(
            "capability_findings",
            "agents_run_what_they_claim",
            "No appliance answers `Unknown action` to a form that its report or its release says it can run.",
            reading(quality.agents_run_what_they_claim),
            warn=True,
        ),
        Check(
            "rule_manifests",
            "no_rule_is_shadowed",
            "No rule in a manifest stands behind another that matches all that it matches.",
            reading(quality.no_rule_is_shadowed),
            warn=True,
        ),
        Check(
            "appliance_commands",
            "commands_are_settled_in_time",
            "No command is open for longer than its service level, and no appliance refused to drop a withdrawn rule.",
            reading(service_levels.commands_are_settled_in_time),
            warn=True,
        ),
        Check(
            "overdue_deployments",
            "promoted_rules_are_delivered_in_time",
            "No live appliance waits longer than the service level for a promoted rule; half and 95 % within how many hours.",
            reading(service_levels.promoted_rules_are_delivered_in_time),
            warn=True,
        ),
        Check(
            "overdue_deployments",
            "delivered_rules_are_executed_in_time",
            "Every rule delivered longer ago than the service level was executed somewhere since.",
            reading(service_levels.delivered_rules_are_executed_in_time),
            warn=True,
        ),
        Check(
            "appliance_drift",
            "appliances_run_what_they_should",
            "Every live appliance reports the rule set of its manifest within the service level.",
            reading(service_levels.appliances_run_what_they_should),
            warn=True,
        ),
        Check(
            "deployments",
            "promoted_rules_are_executed",
            "Every promoted rule in service for 3 days was executed; else the furthest stage of its delivery is named.",
            at_batch(quality.promoted_rules_are_executed),
            warn=True,
        ),
    ],
)
