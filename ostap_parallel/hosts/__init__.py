"""Reaching other machines: one ssh connection and one server per host."""
