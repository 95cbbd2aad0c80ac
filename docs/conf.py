from importlib.metadata import version as installed_version

project = "chanpatch"
author = "chanpatch contributors"
copyright = author
version = release = installed_version("chanpatch")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"  # fields are documented once, under their own names
myst_heading_anchors = 2  # pages link to sections of other pages
default_role = "code"  # single backticks in docstrings hold code
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # numpy.bool_ would be read as a link

html_theme = "furo"
html_title = "chanpatch"
exclude_patterns = ["_build", "performance_table.md", "agents_table.md"]  # the tables are included in other pages
