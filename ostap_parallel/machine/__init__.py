"""One machine: its queue of jobs, the workers that do them, and the ppserver that lends them.

The caller has one for its own machine; hosts are sent it with the workers' side, so it needs no
more than that does.
"""

from ostap_parallel import worker as worker  # first, for what it does about dill
