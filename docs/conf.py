"""The site of the documentation: Sphinx reads the pages of this folder and the docstrings of the library.

``make docs`` builds it into ``docs/_build``. Building runs no code of the pages; the tests do.
"""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import pyro_elbo  # noqa: E402  (found through the path above, also where it is not installed)

project = "pyro_elbo"
author = "the authors of pyro_elbo"
release = pyro_elbo.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
highlight_language = "none"

nb_execution_mode = "off"
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # one line may describe several attributes
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "pyro_elbo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "pyro_elbo"},
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "objectives": []},  # its table takes the whole width
    "navigation_with_keys": False,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
}
html_sidebars = {"index": []}
project_copyright = f"{author}, Apache-2.0"

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_selector = "div.highlight-python pre"


def check_reference(app: Sphinx) -> None:
    """Raise ExtensionError if the reference leaves out a public name."""
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    if missing := set(pyro_elbo.__all__) - documented:
        raise ExtensionError(f"docs/api.md lacks the public names {', '.join(sorted(missing))}.")


def keep_first_line(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking the start of a property's docstring, up to a colon, for its type."""
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment, which has no colon


def setup(app: Sphinx) -> None:
    """Check the reference before anything is built, and mend docstrings before napoleon (priority 500) reads them."""
    app.connect("builder-inited", check_reference)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
