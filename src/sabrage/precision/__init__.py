"""Number formats of a run."""
