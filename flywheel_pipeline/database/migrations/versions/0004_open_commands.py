"""An index of the commands that are open, read at every sync of an appliance."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "appliance_commands_open_idx",
        "appliance_commands",
        ["appliance_id"],
        unique=False,
        postgresql_where=sa.text("status IN ('pending', 'delivered')"),
    )
