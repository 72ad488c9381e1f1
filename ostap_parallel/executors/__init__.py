"""What computes: executors as PEP 3148 defines them."""
