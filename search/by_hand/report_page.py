"""Makes a page of a report for a browser. What a model wrote stays text: no HTML of it is let through."""

from __future__ import annotations

import html

from markdown_it import MarkdownIt

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}th,td{border:1px solid #ccc;padding:.25em .6em;"
    "vertical-align:top}th{background:#f3f3f3;text-align:left}code,pre{background:#f3f3f3;white-space:pre-wrap}"
    "img{max-width:100%}"
)
POLICY = "default-src 'none'; img-src 'self' data: file:; style-src 'unsafe-inline'"  # it needs nothing from elsewhere


def page(markdown: str, title: str) -> str:
    """Return the report as HTML that needs no other file but its pictures.

    Args:
        markdown: The report in Markdown.
        title: The title of the page.
    """
    rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = rendered.replace("&lt;br&gt;", "<br>")  # the report's own, in cells of tables
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
