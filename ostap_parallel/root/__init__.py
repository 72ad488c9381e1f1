"""ROOT: what its objects need to travel, and what workers need to use them.

`declare` is for users.
"""

from ostap_parallel.root.declared import declare as declare
