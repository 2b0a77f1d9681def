"""All pages of the site that are made of the code and of the notebooks, by their path in docs."""

from __future__ import annotations

import api_pages
import configuration_pages
import recipes_page
import tutorials


def pages() -> dict[str, str]:
    recipes = {"reference/recipes.md": recipes_page.page()}
    return {**recipes, **configuration_pages.pages(), **api_pages.pages(), **tutorials.pages()}
