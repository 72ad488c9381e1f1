"""What a run looks like: when which worker did what, as a trace, a page, a plot, and live."""
