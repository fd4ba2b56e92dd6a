"""One self-contained HTML page: nothing is loaded from anywhere, in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from .table import Table

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2430; --quiet: #596172; --muted: #dfe3ea; --surface: #ffffff; --raised: #f6f7f9;
  --series-0: #6b7280; --series-1: #2563eb; --series-2: #c2570c;
  --series-3: #0d8a6a; --series-4: #9333b8; --series-5: #b4233a; --series-6: #8a6500;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7eaf0; --quiet: #a4acbb; --muted: #343b48; --surface: #14171d; --raised: #1c2028;
    --series-0: #9aa3b2; --series-1: #6ea8ff; --series-2: #f29b54;
    --series-3: #3ecf9f; --series-4: #cf8af0; --series-5: #ff7d8f; --series-6: #e0bf4a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--surface); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 56rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
pre { margin: .75rem 0; padding: .7rem .9rem; background: var(--raised); border-radius: .6rem;
  overflow-x: auto; font-size: .88rem; }
.lead { color: var(--quiet); font-size: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  margin: 1.75rem 0; padding: 0; list-style: none; }
.tiles li { background: var(--raised); border-radius: .6rem; padding: 1rem 1.2rem; }
.tiles b { display: block; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
.tiles span { color: var(--quiet); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; }
caption, figcaption { color: var(--quiet); font-size: .9rem; padding-top: .6rem; }
th, td { text-align: right; padding: .5rem .6rem; border-bottom: 1px solid var(--muted);
  white-space: nowrap; font-weight: 400; }
th[scope=row], th:first-child { text-align: left; padding-left: 0; }
th[scope=row] { font-weight: 600; }
thead th { color: var(--quiet); font-size: .85rem; vertical-align: bottom; white-space: normal; }
figure { margin: 1rem 0 0; }
svg { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 1rem 0 0;
  font-size: .92rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


class Page:
    """A page that is built from top to bottom. All text is escaped.

    Args:
        title: its heading, and the name of its tab.
        lead: a sentence or two under the heading.
    """

    def __init__(self, title: str, lead: str):
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add lines of code."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def tiles(self, figures: Mapping[str, str]) -> None:
        """Add figures to remember: what each is -> its value, written large."""
        items = "\n".join(
            f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>"
            for what, value in figures.items()
        )
        self._parts.append(f'<ul class="tiles">\n{items}\n</ul>')

    def table(self, table: Table, caption: str) -> None:
        """Add a table."""
        self._parts.append(table.html(caption))

    def figure(self, svg: str, caption: str) -> None:
        """Add a plot from :mod:`memtl.report.plots`; ``svg`` is the one thing put in as it is."""
        self._parts.append(
            f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
        )

    def definitions(self, terms: Mapping[str, object]) -> None:
        """Add terms beside their values."""
        items = "\n".join(
            f"<dt>{escape(term)}</dt><dd>{escape(str(value))}</dd>" for term, value in terms.items()
        )
        self._parts.append(f"<dl>\n{items}\n</dl>")

    def __str__(self) -> str:
        body = "\n".join(self._parts)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page and return where it is, as an absolute path."""
        path = Path(path).resolve()
        path.write_text(str(self), encoding="utf-8")
        return path
