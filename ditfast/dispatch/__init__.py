"""Backend selection, beneath the ops: an override, else the tuning cache, else the default table."""
