"""What the pages need on the site: the README as the first of them, and no links to files that the site does not have."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    """The README is the overview; what it links to in `docs/` lies beside it there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    text = re.sub(r"\]\((?!http)(?=(?:src|training|spaces|pipelines|examples|benchmarks|LICENSE))", "](../", text)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to folders and out of `docs/` lead to the source tree, which the site does not hold: their text stays."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./(?!images|reference)[^)]*|results/\w+)\)", r"\1", markdown)
