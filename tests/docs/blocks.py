"""Code blocks of Markdown pages."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
LANGUAGES = {"python", "bash", "yaml", "json"}


@dataclass(frozen=True)
class Block:
    """A code block: its page and line, language and text; `reason` if a comment says why it is not run."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["reason"])
        for found in FENCE.finditer(text)
    ]


def in_language(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def commands_of(code: str) -> list[str]:
    """The commands of a bash block, one by one, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    bare = [re.sub(r"(^|\s+)#.*$", "", line).strip() for line in lines]
    return [line for line in bare if line]
