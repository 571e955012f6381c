"""Write README.md from nbs/index.ipynb, stored outputs included; `--check` writes nothing and exits 1 where README.md is not current.

A cell marked `#| hide` stays out, `#| echo: false` keeps its outputs alone. Links are relative to nbs/ in the notebook, to the root
in README.md. Figures among the outputs become files in nbs/images/."""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]  # which form of an output to take
FENCE, LINK, DIRECTIVE = re.compile(r"(```.*?```)", re.S), re.compile(r"(?<=\]\()(?!\w+:|[#/])[^)\s]+"), re.compile(r"^#\|\s*(.*?)\s*\n", re.M)


def rooted(text: str) -> str:
    "Markdown whose relative links start in nbs/, with links that start at the root. Fenced code is left alone. A dead link ends the program."
    def link(match):
        path = posixpath.normpath("nbs/" + match[0])
        if not (ROOT / path.partition("#")[0]).exists(): sys.exit(f"nbs/index.ipynb links to {match[0]}: there is no {path}")
        return path
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in FENCE.split(text))


def render() -> dict:
    "The files that make the README: path from the root -> bytes."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if "hide" not in DIRECTIVE.findall(c.source + "\n")]
    nb.metadata.language_info = {"name": "python"}
    for c in nb.cells:
        if c.cell_type == "markdown": c.source = rooted(c.source)
        c.metadata.transient = {"remove_source": "echo: false" in DIRECTIVE.findall(c.source)}
        c.source = DIRECTIVE.sub("", c.source)
    exporter = MarkdownExporter(config=Config(NbConvertBase={"display_data_priority": ORDER}))
    text, extra = exporter.from_notebook_node(nb, {"unique_key": "readme", "output_files_dir": "nbs/images"})
    text = "<!-- Written by tools/readme.py from nbs/index.ipynb: change it there. -->\n\n" + text.strip() + "\n"
    return {"README.md": re.sub(r"(\n[ \t]*){3,}", "\n\n", text).encode(), **extra["outputs"]}


if __name__ == "__main__":
    stale = {ROOT / p: b for p, b in render().items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != b}
    if "--check" in sys.argv[1:] and stale:
        sys.exit(f"{', '.join(p.name for p in stale)}: not what nbs/index.ipynb gives, run `python tools/readme.py`")
    for path, content in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
