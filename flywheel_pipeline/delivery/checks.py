"""Dagster checks of the delivery room."""

from flywheel_pipeline.checks import Check, at_batch, check_step, reading
from flywheel_pipeline.delivery import quality
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
            "deployments",
            "promoted_rules_are_executed",
            "Every promoted rule in service for 3 days was executed; else the furthest stage of its delivery is named.",
            at_batch(quality.promoted_rules_are_executed),
            warn=True,
        ),
    ],
)
