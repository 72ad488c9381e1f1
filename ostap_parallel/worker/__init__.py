"""The far side: what runs in worker processes and in servers, here and on hosts.

Standard library, cloudpickle, dill and ppft only, so that it can be sent to a host that has
nothing but a Python.
"""

import sys

if "dill" not in sys.modules:
    # ppft and pathos import it, and it has pickle itself do what dill does: not for the user.
    import dill

    dill.extend(False)
