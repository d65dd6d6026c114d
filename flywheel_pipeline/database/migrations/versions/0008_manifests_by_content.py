"""What an appliance should run is named by its content, and a content names its entries: each stands once."""

from __future__ import annotations

import hashlib
import json

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    _name_contents(connection)
    # Those of this release are made anew by the upgrade; a view of somebody else's stops it, and its name is told.
    if readers := _our_readers(connection):
        op.execute(f"DROP VIEW {', '.join(readers)}")
    op.rename_table("rule_manifests", "appliance_manifests")
    op.execute("ALTER TABLE appliance_manifests RENAME CONSTRAINT rule_manifests_pkey TO appliance_manifests_pkey")
    for column in ("manifest_hash", "rules", "withheld", "rule_count"):
        op.drop_column("appliance_manifests", column)
    op.alter_column(
        "appliance_manifests",
        "content_hash",
        nullable=False,
        comment="its row of manifest_contents",
        existing_type=sa.String(64),
    )
    op.create_foreign_key(
        op.f("appliance_manifests_content_hash_fkey"),
        "appliance_manifests",
        "manifest_contents",
        ["content_hash"],
        ["content_hash"],
    )
    op.create_index("appliance_manifests_content_idx", "appliance_manifests", ["content_hash"])
    op.create_table_comment(
        "appliance_manifests", "Desired state: one row per appliance; its rules are those of its content."
    )
    _name_entries(connection)
    op.drop_index("appliance_commands_open_idx", table_name="appliance_commands", if_exists=True)


def _our_readers(connection: sa.Connection) -> list[str]:
    return list(
        connection.exec_driver_sql(
            """
            WITH RECURSIVE reads AS (
              SELECT r.ev_class AS reader, d.refobjid AS read
              FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
              WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND r.ev_class <> d.refobjid
            ), found AS (
              SELECT reader FROM reads WHERE read IN ('rule_manifests'::regclass, 'manifest_contents'::regclass)
              UNION SELECT reads.reader FROM found JOIN reads ON reads.read = found.reader
            )
            SELECT DISTINCT quote_ident(v.relname)
            FROM found f JOIN pg_class v ON v.oid = f.reader JOIN schema_objects s ON s.kind = 'model' AND s.name = v.relname
            WHERE v.relkind = 'v' ORDER BY 1
            """
        ).scalars()
    )


def _name_contents(connection: sa.Connection) -> None:
    """Give a content to the manifests that name none, or one that is gone, as the delivery room names it."""
    unnamed = connection.exec_driver_sql(
        "SELECT m.appliance_id, m.manifest_hash, m.rules, m.withheld FROM rule_manifests m "
        "WHERE NOT EXISTS (SELECT FROM manifest_contents c WHERE c.content_hash = m.content_hash "
        "AND c.manifest_hash = m.manifest_hash AND c.rules = m.rules AND c.withheld = m.withheld)"
    ).all()
    for row in unnamed:
        promoted = sorted((r["id"], r["version"]) for r in row.rules if r.get("source") != "builtin")
        content = _content_hash(row.manifest_hash, row.withheld)
        connection.execute(
            sa.text(
                """
                INSERT INTO manifest_contents (content_hash, manifest_hash, rules, withheld, rule_count, rule_ids, rule_versions)
                VALUES (:content, :hash, CAST(:rules AS jsonb), CAST(:withheld AS jsonb), :count, :ids, :versions)
                ON CONFLICT DO NOTHING
                """
            ),
            {
                "content": content,
                "hash": row.manifest_hash,
                "rules": _canonical(row.rules),
                "withheld": json.dumps(row.withheld),
                "count": len(row.rules),
                "ids": [rule_id for rule_id, _ in promoted],
                "versions": [version for _, version in promoted],
            },
        )
        connection.execute(
            sa.text("UPDATE rule_manifests SET content_hash = :content WHERE appliance_id = :appliance"),
            {"content": content, "appliance": row.appliance_id},
        )


def _name_entries(connection: sa.Connection) -> None:
    """Store each entry once, and let the contents name them in their order."""
    op.create_table(
        "manifest_entries",
        sa.Column("entry_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("entry_hash", sa.String(length=64), nullable=False, comment="SHA-256 of the entry as canonical JSON"),
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column(
            "entry", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="the rule as the agent gets it"
        ),
        sa.PrimaryKeyConstraint("entry_id", name=op.f("manifest_entries_pkey")),
        sa.UniqueConstraint("entry_hash", name=op.f("manifest_entries_entry_hash_key")),
        comment="Each rule once in each form in which an agent gets it; contents of manifests name their entries.",
    )
    op.create_index("manifest_entries_rule_id_idx", "manifest_entries", ["rule_id"])
    op.add_column(
        "manifest_contents",
        sa.Column(
            "entry_ids",
            sa.ARRAY(sa.BigInteger()),
            nullable=True,
            comment="its rules in their order: rows of manifest_entries",
        ),
    )
    known: dict[str, int] = {}
    for row in connection.exec_driver_sql("SELECT content_hash, rules FROM manifest_contents").all():
        ids = []
        for rule in row.rules:
            text = _canonical(rule)
            hashed = hashlib.sha256(text.encode()).hexdigest()
            if hashed not in known:
                known[hashed] = connection.execute(
                    sa.text(
                        "INSERT INTO manifest_entries (entry_hash, rule_id, rule_version, entry) "
                        "VALUES (:hash, :rule, :version, CAST(:entry AS jsonb)) RETURNING entry_id"
                    ),
                    {"hash": hashed, "rule": rule["id"], "version": rule["version"], "entry": text},
                ).scalar_one()
            ids.append(known[hashed])
        connection.execute(
            sa.text("UPDATE manifest_contents SET entry_ids = :ids WHERE content_hash = :content"),
            {"ids": ids, "content": row.content_hash},
        )
    op.alter_column("manifest_contents", "entry_ids", nullable=False, existing_type=sa.ARRAY(sa.BigInteger()))
    op.drop_column("manifest_contents", "rules")


def _content_hash(manifest_hash: str, withheld: object) -> str:
    # As the delivery room names a content at this revision; a migration does not import what may change later.
    return hashlib.sha256(f"{manifest_hash}{_canonical(withheld)}".encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
