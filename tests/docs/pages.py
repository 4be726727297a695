"""The pages that a person reads, and the commands and links on them."""

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HISTORY = {"log.md"}  # says what was done then, with the commands of then
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("**/*.md"))]
STARTS = ("plumbline", "accelerate launch", "torchrun", "python", "make", "pip install")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_STARTS_A_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(STARTS)})(?: |$)")


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """(command on one line without its comment, the text around it) of every command of a page.

    From shell blocks, fenced or indented, and from inline code that begins as a command does.
    """
    text = page.read_text(encoding="utf-8")
    for language, block in _FENCE.findall(text):
        if language in ("", "sh"):
            yield from ((line, block) for line in _lines(block))
    prose = _FENCE.sub("", text)
    for part in re.split(r"\n(?=#+ )", prose):
        indented = "\n".join(line[4:] if line.startswith("    ") else "" for line in part.splitlines())
        yield from ((line, part) for line in _lines(indented))
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^    .*$", "", part, flags=re.MULTILINE)):
            span = " ".join(span.split())
            if _STARTS_A_COMMAND.match(span):
                yield span, part


def _lines(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s#\s.*$", "", line).strip()
        if _STARTS_A_COMMAND.match(line):
            yield " ".join(line.split())


def anchors(page: Path) -> set[str]:
    """The names by which a link can point into a page, as GitHub and the site make them of headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).strip()
        found.add(plain.replace(" ", "-"))
    return found


def links(page: Path) -> Iterator[str]:
    """Targets of all links and pictures of a page that lead into the repository."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target
