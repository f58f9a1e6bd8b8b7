"""Runs with their attempts, artifacts, and the edges between them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

json = sa.JSON().with_variant(JSONB(), "postgresql")
big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
time = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("started", time, nullable=False),
        sa.Column("finished", time),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("code_version", sa.Text, nullable=False),
        sa.Column("config", json, nullable=False),
        sa.Column("config_digest", sa.String(64), nullable=False),
        sa.Column("seeds", json, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_index("runs_by_name", "runs", ["name"])
    op.create_table(
        "attempts",
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("started", time, nullable=False),
        sa.Column("finished", time),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("process", sa.Integer, nullable=False),
        sa.Column("code_version", sa.Text, nullable=False),
        sa.Column("config_digest", sa.String(64), nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", big_id, primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("facts", json, nullable=False),
        sa.Column("first_seen", time, nullable=False),
        sa.UniqueConstraint("kind", "digest", name="artifacts_identity"),
    )
    op.create_index("artifacts_by_digest", "artifacts", ["digest"])
    op.create_index("artifacts_by_name", "artifacts", ["name"])
    op.create_table(
        "edges",
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("role", sa.String(8), primary_key=True),
        sa.Column("artifact_id", big_id, sa.ForeignKey("artifacts.id"), primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
    )
    op.create_index("edges_by_artifact", "edges", ["artifact_id", "role"])
