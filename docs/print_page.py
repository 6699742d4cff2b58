"""Makes docs/one_page.pdf of one_page.py: one sheet of A4, in two columns.

    python docs/print_page.py

Needs Chromium (or Chrome) on the path, and pygments. A test compares the sheet's title with the source.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[1]
STYLE = """
@page { size: A4 landscape; margin: 9mm 9mm 7mm 9mm; }
body { margin: 0; display: flex; justify-content: space-between; }
pre { margin: 0; font: 6.3pt/7.25pt "DejaVu Sans Mono", monospace; }
.k, .kn, .ow { font-weight: bold; color: #0b3d91; } .nf, .nd { font-weight: bold; }
.s1, .s2, .sd, .si, .sa { color: #7a3b00; } .c1 { color: #1e6b2e; font-style: italic; } .mi, .mf { color: #5b2b82; }
"""


def title(source: str) -> str:
    """Of the sheet; it changes with the source."""
    return f"GRPO on one page, {hashlib.sha256(source.encode()).hexdigest()[:12]}"


def columns(source: str) -> tuple[str, str]:
    """The source in two parts, cut between two definitions where the longer part is shortest."""
    cuts = [i for i in range(len(source)) if source.startswith("\n\n\n", i)]
    cut = min(cuts, key=lambda i: max(source.count("\n", 0, i), source.count("\n", i)))
    return source[:cut], source[cut:].strip("\n")


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if not chromium:
        sys.exit("there is no Chromium on the path, which makes the PDF")
    source = (ROOT / "one_page.py").read_text()
    code = (highlight(part, PythonLexer(), HtmlFormatter(nowrap=True)) for part in columns(source))
    page = f"<!doctype html><meta charset=utf-8><title>{title(source)}</title><style>{STYLE}</style>"
    page += "".join(f"<pre>{part}</pre>" for part in code)
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "page.html"
        html.write_text(page)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={folder}"]
        pdf = ROOT / "docs" / "one_page.pdf"
        subprocess.run([chromium, *options, f"--print-to-pdf={pdf}", html.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
