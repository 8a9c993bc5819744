"""The manual's settings: MyST pages, the Furo theme, and nothing that is loaded from outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from aisle.extras import distribution

ROOT = Path(__file__).parent.parent
# Where DESCRIPTIONS is; the server's file imports only inside Triton.
METRICS = {
    "server": ROOT / "deploy" / "serving" / "metrics.py",
    "stream": ROOT / "deploy" / "stream" / "figures.py",
}
COMMANDS = """# Commands

This page is generated from the command line itself.
Every command except `serve`, `rest` and `desk` takes `--json`: one JSON object on stdout, all else on stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the server failed or could not be reached, or Aisle has a bug |
| 2 | the input is wrong; one line on stderr says what to change |
| 3 | an engine failed its accuracy gate |
| 130 | stopped with Ctrl-C; the last line says whether the same command resumes |
| 129, 143 | a closed terminal (SIGHUP) or `kill` (SIGTERM) stopped the command; as for 130, no temporary file is left |
| 141 | the program that read the output, such as `head`, has ended |

"""

project = "Aisle"
author = "The Aisle developers"
project_copyright = "The Aisle developers, Apache-2.0"
release = version = installed_version(distribution())

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Aisle {release}"
html_static_path = ["_static"]
html_copy_source = False
html_show_sphinx = False

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


class Mermaid(SphinxDirective):
    """Keep a diagram's text in the page; mermaid, which ships with the manual, draws it in the browser."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        text = escape("\n".join(self.content))
        return [nodes.raw("", f'<pre class="mermaid">{text}</pre>', format="html")]


class Metrics(SphinxDirective):
    """The table of our own metrics, the server's or the stream's, from the code that reports them."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        file = METRICS[self.arguments[0] if self.arguments else "server"]
        self.env.note_dependency(str(file))
        (value,) = (
            node.value
            for node in ast.parse(file.read_text("utf-8")).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DESCRIPTIONS"
        )
        rows = [f"| `{name}` | {text} |" for name, text in ast.literal_eval(value).items()]
        return self.parse_text_to_nodes("\n".join(["| metric | what it counts |", "|---|---|", *rows]))


class Rest(SphinxDirective):
    """The tables of the REST front's routes and errors, from its own description."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from aisle.deploy.rest.openapi import ERRORS

        if self.arguments[0] == "errors":
            rows = ["| status | meaning |", "|---|---|", *(f"| {status} | {text} |" for status, text in ERRORS.items())]
        else:
            rows = ["| route | what it does |", "|---|---|", *_routes()]
        return self.parse_text_to_nodes("\n".join(rows))


def _routes() -> Iterator[str]:
    from aisle.deploy.rest.app import create_app
    from aisle.deploy.rest.front import Upstream

    for path, methods in create_app(Upstream("localhost:8001")).openapi()["paths"].items():
        for method, about in methods.items():
            yield f"| `{method.upper()} {path}` | {about['description'].splitlines()[0]} |"


def write_commands(app: Sphinx) -> None:
    """Write the page of commands; left alone where it is up to date, so that nothing is built twice."""
    command = [sys.executable, "-m", "typer", "aisle.commands.app", "utils", "docs", "--name", "aisle"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = Path(app.srcdir, "reference", "cli.md")
    text = COMMANDS + text[text.index("## `aisle ") :]
    if not page.exists() or page.read_text("utf-8") != text:
        page.write_text(text, "utf-8")


def load_mermaid(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document | None) -> None:
    """Load mermaid on the pages with a diagram; a plain script, so that it also runs from a folder."""
    if tree and any('class="mermaid"' in each.astext() for each in tree.findall(nodes.raw)):
        app.add_js_file("mermaid.min.js")
        app.add_js_file(None, body="mermaid.initialize({startOnLoad: true, theme: 'neutral'});")


def setup(app: Sphinx) -> None:
    app.add_directive("mermaid", Mermaid)
    app.add_directive("aisle-metrics", Metrics)
    app.add_directive("aisle-rest", Rest)
    app.connect("builder-inited", write_commands)
    app.connect("html-page-context", load_mermaid)
