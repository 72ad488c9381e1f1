"""What children of a process inherit, lent to workers, which are none."""
