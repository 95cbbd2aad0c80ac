from importlib.metadata import version as installed_version
from typing import Any

project = "chanpatch"
author = "chanpatch contributors"
copyright = author
version = release = installed_version("chanpatch")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"  # fields are documented once, under their own names
add_module_names = False
myst_heading_anchors = 2  # pages link to sections of other pages
myst_enable_extensions = ["colon_fence"]  # pairs of code blocks stand side by side
default_role = "code"  # single backticks in docstrings hold code
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # numpy.bool_ would be read as a link

html_theme = "furo"
html_title = "chanpatch"
html_static_path = ["_static"]
html_css_files = ["chanpatch.css"]
exclude_patterns = ["_build", "performance_table.md", "agents_table.md"]  # other pages include the tables


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", without_introductions_of_modules)


def without_introductions_of_modules(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Leave out module docstrings, because each page has an introduction."""
    if what == "module":
        lines.clear()
