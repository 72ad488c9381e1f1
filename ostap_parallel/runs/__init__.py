"""One way to run many items, and what is told of it."""
