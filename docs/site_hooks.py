"""Hooks of mkdocs: README.md becomes the first page, files outside docs/ that a page links to come along, and each
package gets a page of its public names, read from its `__init__.py` without importing it.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("align", "reward", "safety", "policy_models", "eval", "apps")
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_README: dict[str, Any] = {"page": "index.md"}


def public_names(package: str) -> dict[str, str]:
    """name -> module below the package, from the `exports(__name__, {...})` of its `__init__.py`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "exports":
            return ast.literal_eval(node.args[1])
    raise ValueError(f"{package}/__init__.py: no exports(__name__, {{...}})")


def api_page(package: str) -> str:
    """Markdown that mkdocstrings fills."""
    doc = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    names = "\n\n".join(
        f"::: plumbline.{package}.{module}.{name}" for name, module in sorted(public_names(package).items())
    )
    return f"# plumbline.{package}\n\n{doc}\n\n{names}\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that do not lie in docs/."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    todo = [(file.src_uri, file.content_string) for file in list(files) if file.src_uri.endswith(".md")]
    while todo:  # a page that comes along may link to further files
        uri, text = todo.pop()
        for _, target, _ in _LINK.findall(text):
            outside = outside_docs(uri, target)
            if not outside or outside == "README.md" or files.get_file_from_path(f"source/{outside}"):
                continue
            files.append(File.generated(config, f"source/{outside}", abs_src_path=str(ROOT / outside)))
            if outside.endswith(".md"):
                todo.append((f"source/{outside}", (ROOT / outside).read_text(encoding="utf-8")))
    return files


def outside_docs(page: str, target: str) -> str:
    """The path in the repository that a link of a page leads to, if it is a file outside docs/; else ""."""
    if re.match(r"[a-z]+:", target):
        return ""
    base = posixpath.dirname(source_of(page))
    path = posixpath.normpath(posixpath.join(base, target))
    return path if not path.startswith(("docs/", "..")) and (ROOT / path).is_file() else ""


def source_of(page: str) -> str:
    """Where a page of the site lies in the repository."""
    if page == _README["page"]:
        return "README.md"
    return page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site: to docs/ without it, to the rest of the repository below source/."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri)

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target) or uri.startswith("api/"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(uri)), target))
        if path == "README.md":
            on_site = "index.md"
        elif path.startswith("docs/"):
            on_site = path.removeprefix("docs/")
        else:
            on_site = f"source/{path}"
        return f"{match[1]}{posixpath.relpath(on_site, here or '.')}{match[3]}"

    return _LINK.sub(moved, markdown)
