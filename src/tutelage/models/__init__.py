"""Model sources: loading, depth pruning and the bundled catalog."""
