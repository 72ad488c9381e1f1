"""What computes."""

from ostap_parallel import worker as worker  # first, for what it does about dill
