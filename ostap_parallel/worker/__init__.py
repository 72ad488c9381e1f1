"""The far side: what runs in workers and on hosts.

Standard library, dill and ppft only, so that it can be sent to a host that has nothing but a
Python interpreter of the same minor version.
"""
