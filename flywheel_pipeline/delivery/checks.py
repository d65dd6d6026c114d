"""Dagster checks of the delivery room."""

from flywheel_pipeline.checks import Check, at_batch, check_step, reading
from flywheel_pipeline.delivery import quality

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
