"""Batch systems as text: what to submit, what became of it. Keeps no state and never waits."""
