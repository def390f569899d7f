"""What the site of `make docs` has besides the pages of docs/: README.md as its first page, CONTRIBUTING.md and CHANGELOG.md,
and the scripts and pictures that pages refer to. Links out of docs/ lead to these; other links out of it become plain text."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in (*ROOT.glob("examples/*.py"), *ROOT.glob("bench/results/*/*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"

    def lead(link: re.Match) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = (folder / target).resolve()
        if "://" in target or not path.exists() or not path.is_relative_to(ROOT):
            return link[0]  # mkdocs judges it
        place = path.relative_to(ROOT).as_posix()
        place = PAGES.get(place, place.removeprefix("docs/"))
        return f"[{text}]({place}{anchor})" if files.get_file_from_path(place) else text

    return LINK.sub(lead, markdown)


class Examples(griffe.Extension):
    """Docstrings say "Example:" where there is one; the reader of docstrings knows the section as "Examples:"."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
