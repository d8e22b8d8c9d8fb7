"""One idea against forgetting a file; each imports the engine only."""
