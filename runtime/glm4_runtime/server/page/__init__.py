"""The chat page: the files of this folder, joined to one document without external resources."""

import base64
import hashlib
import re
from importlib.resources import files

_FOLDER = files("glm4_runtime.server.page")
# A line of page.html that names a file, and the element that holds the file's text.
_LINKS = {
    "style": re.compile(r'<link rel="stylesheet" href="(\w+\.css)">'),
    "script": re.compile(r'<script src="(\w+\.js)"></script>'),
}


def whole_page() -> str:
    """The document: page.html with its style sheet and its scripts in place of the lines that name these files."""
    page = _text("page.html")
    for tag, link in _LINKS.items():
        for line in link.finditer(page):
            page = page.replace(line[0], f"<{tag}>\n{_text(line[1])}</{tag}>")
    return page


def headers_of(page: str) -> dict[str, str]:
    """Headers that allow only the page's own scripts and style, and requests to this server."""
    allowed = {
        tag: " ".join(map(_digest, re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))) for tag in _LINKS
    }
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {allowed['script']}; "
        f"style-src {allowed['style']}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _text(name: str) -> str:
    return _FOLDER.joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
