"""Row identity, batches, export."""
