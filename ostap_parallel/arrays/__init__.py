"""Runs whose items are done by arrays of batch jobs, over a directory that all hosts share."""
