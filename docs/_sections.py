"""A MkDocs hook: every "§4" on a page becomes a link to that section of the theory page."""

import re
from typing import Any

from mkdocs.utils import get_relative_url

_TAGS = re.compile(r"(<a\b.*?</a>|<[^>]+>)", re.S)
_SECTION = re.compile(r"§(\d+)")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The page's HTML with its citations linked; links and tags themselves are left alone."""
    theory = get_relative_url("theory.html", page.url)
    link = rf'<a class="section" href="{theory}#s\1">§\1</a>'
    parts = _TAGS.split(html)
    return "".join(part if part.startswith("<") else _SECTION.sub(link, part) for part in parts)
