"""What the build of the site does beside mkdocs: pages from the code, pictures of recipes, and fences of the tests."""

from __future__ import annotations

import re
from typing import Any

import generated
import recipes_page
import tutorials
from mkdocs.config.defaults import MkDocsConfig  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]
from mkdocs.structure.pages import Page  # pyright: ignore[reportMissingImports]

_TAGGED = re.compile(r"^(```python) (\w+)$", re.MULTILINE)
"""A block of another library: the tests run it where that is installed."""

_PAIR = re.compile(r'^(```python title="\w+"\n(?:(?!```).*\n)*```\n\s*```python)$', re.MULTILINE)
"""A block of another library, and the one of itrain that does the same."""

_PICTURE = re.compile(r'<img (?![^>]*class="thumbnail")[^>]*src="([^"]+\.png)"[^>]*>')
"""A picture of a run, which is wider than a page's column. Thumbnails lead to their pages."""

_NOTEBOOK = re.compile(r"\]\(\.\./((?:\.\./)*)examples/(\w+)\.ipynb")
"""A link from a file of docs/ to a notebook, which the site has beside its pages."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the tutorials below their index."""
    (section,) = [each["Tutorials"] for each in config.nav or () if "Tutorials" in each]
    section.extend(tutorials.pages())
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made of the code, and the pictures of recipes and of notebooks."""
    for path, text in generated.pages().items():
        files.append(File.generated(config, path, content=text))
    for picture in recipes_page.pictures():
        files.append(File.generated(config, f"assets/recipes/{picture.name}", abs_src_path=str(picture)))
    for path, data in tutorials.pictures().items():
        files.append(File.generated(config, path, content=data))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Show whose code a block is as its title, lead links to notebooks to their pages, and illustrate their index."""
    tagged = _PAIR.sub(r'\1 title="itrain"', _TAGGED.sub(r'\1 title="\2"', markdown))
    linked = _NOTEBOOK.sub(r"](\1examples/\2.md", tagged)
    return tutorials.with_thumbnails(linked) if page.file.src_uri == "tutorials.md" else linked


def on_page_content(html: str, **_: Any) -> str:
    """Open a picture of a run in its full size where it is clicked."""
    return _PICTURE.sub(r'<a href="\1">\g<0></a>', html)
