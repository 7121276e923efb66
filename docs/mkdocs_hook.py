"""A hook of mkdocs: README.md becomes the first page, and links to files outside of docs/ become their names."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace `[text](../path)`, in README.md `[text](path)`, by the text. Raises PluginError for a missing file."""
    is_readme = page.file.src_uri == "index.md"

    def name_of(link: re.Match) -> str:
        text, target = link.groups()
        if files.get_file_from_path(target):
            return link[0]
        if not (ROOT / ("." if is_readme else "docs") / target).exists():
            raise PluginError(f"{page.file.src_uri}: links to {target}, which does not exist")
        return text

    outside = r"(?!https?:)[^)#\s]+" if is_readme else r"\.\./[^)#\s]+"
    return re.sub(rf"(?<!!)\[([^]]+)\]\(({outside})\)", name_of, markdown)
