"""Write the repository's address into the files that PyPI shows, before the package is built.

python .ci/prepare_release.py https://github.com/ACCOUNT/mnistsum_ray

The checkout knows no address, so that a fork needs no edit. The release workflow knows its own.
PyPI shows README alone: its relative links and pictures become links into the repository.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def with_absolute_links(text: str, url: str) -> str:
    """Return a page of the top folder with links to `url` in place of relative ones."""
    files, pictures = f"{url}/blob/main/", f"{url}/raw/main/"
    text = re.sub(r"\]\((?!#|https?:)", f"]({files}", text)
    text = re.sub(r'\b(src|srcset)="(?!https?:)', rf'\1="{pictures}', text)
    text = re.sub(rf"!\[([^]]*)\]\({re.escape(files)}", rf"![\1]({pictures}", text)
    text = re.sub(r" +# OWNER is .*", "", text)
    return text.replace("https://github.com/OWNER/mnistsum_ray", url)


def urls_table(url: str) -> str:
    """Return the table of links that PyPI shows beside the page."""
    links = {
        "Documentation": f"{url}/blob/main/docs/task.md",
        "Repository": url,
        "Issues": f"{url}/issues",
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
    }
    lines = [f'{name} = "{link}"\n' for name, link in links.items()]
    return "\n[project.urls]\n" + "".join(lines)


def main(url: str) -> None:
    """Edit README.md and pyproject.toml in place."""
    url = url.rstrip("/")
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(with_absolute_links(readme.read_text(), url))
    project.write_text(project.read_text() + urls_table(url))


if __name__ == "__main__":
    main(*sys.argv[1:])
