"""From batches to a run on disk."""
