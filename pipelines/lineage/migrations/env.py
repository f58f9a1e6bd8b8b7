"""Alembic's entry point: runs on the connection, and inside the transaction, that `catalog.open_catalog` holds."""

from alembic import context

from pipelines.lineage.catalog import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
