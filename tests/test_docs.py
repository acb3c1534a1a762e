"""The documents name only what exists: relative links, and paths of this repository in backticks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./-])(?:megavlm|tools|tests|docs|slurm)/[\w./-]+")
"""A path as text and code blocks write it; a folder ends with a slash or a name."""
FETCHED = re.compile(r"""<(?:script|img|iframe|link[^>]*stylesheet)[^>]*?(?:src|href)=["']?([^"'\s>]+)""")
"""What a browser fetches by itself to show a page."""
CODE = re.compile(r"```[\s\S]*?```|`[^`\n]+`|^ {4}.*$", re.MULTILINE)


def links_of(text: str) -> list[tuple[str, str]]:
    """Relative links as ``(file, heading)``; either may be empty."""
    targets = [target for target in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]
    return [(file, heading) for file, _, heading in (target.partition("#") for target in targets)]


def anchors_of(text: str) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    for file, heading in links_of(document.read_text()):
        target = document.parent / file if file else document
        if not target.exists() or (heading and heading not in anchors_of(target.read_text())):
            broken.append(f"{file}#{heading}" if heading else file)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths of the repository in code that do not exist. What a run writes (``runs/``, ``data/``) is none of them."""
    named = {path.rstrip(".") for code in CODE.findall(text) for path in PATH.findall(code)}
    return sorted(path for path in named if not (REPOSITORY / path).exists())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_and_paths_of_a_document_exist(document):
    assert broken_links(document) == []
    assert missing_paths(document.read_text()) == []


def test_every_document_has_a_place_in_the_site():
    nav = (REPOSITORY / ".mkdocs.yml").read_text().split("\nnav:\n")[1]
    missing = [path.name for path in sorted((REPOSITORY / "docs").glob("*.md")) if f": {path.name}\n" not in nav + "\n"]
    assert missing == [], "add a line to `nav` in .mkdocs.yml"


def test_the_site_has_no_broken_link_needs_no_network_and_searches_from_the_disk(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed (extra `docs`)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (extra `docs`)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ".mkdocs.yml", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    fetched = {address for page in pages for address in FETCHED.findall(page.read_text())}
    assert not {address for address in fetched if "//" in address}
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        look = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'browser'}",
            "--virtual-time-budget=20000",
        ]
        done = subprocess.run([*look, "--dump-dom", f"{(tmp_path / 'index.html').as_uri()}?q=watchdog"], capture_output=True, text=True)
        assert "matching document" in done.stdout


def test_what_is_broken_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, twice\n[a](gone.md) [b](#a-title-twice) [c](#no-title) [d](https://example.org/x)\n`tools/gone.sh`\n")
    assert broken_links(page) == ["gone.md", "#no-title"]
    assert missing_paths(page.read_text()) == ["tools/gone.sh"]
    assert missing_paths("    bash tools/gone.sh\n\nand `tests/test_docs.py`, tools/prose.sh") == ["tools/gone.sh"]
