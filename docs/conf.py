"""Sphinx builds the guide and the reference from the checkout's top: see scripts/docs."""

from ostap_parallel import __version__

project = "ostap_parallel"
author = "the authors of ostap_parallel"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["PARALELL.md", "SECURITY.md", "CHANGES.md", "CONTRIBUTING.md", "docs/*.md"]

# Links are those that work in the sources: files and GitHub's anchors.
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"ostap_parallel {version}"
