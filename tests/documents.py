"""What the documentation says, taken apart: fenced blocks with the marks before them, links, names of options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import REPOSITORY

DOCUMENTS = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")])

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>needs|file): (?P<value>[^\n]+?) -->\n)?(?P<fence>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str
    line: int
    language: str
    text: str
    needs: str | None
    """What a command cannot do without here (``<!-- needs: … -->``): it is not run."""
    file: str | None
    """Name of the file that the block shows (``<!-- file: … -->``): it is written where the commands run."""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = document.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        marks = {match["mark"]: match["value"]}
        name = document.relative_to(REPOSITORY).as_posix()
        found.append(Block(name, line, match["language"], match["text"], marks.get("needs"), marks.get("file")))
    return found


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", document.read_text())
