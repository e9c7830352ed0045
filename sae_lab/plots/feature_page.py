"""The feature page: one self-contained HTML file that opens without a server or a network."""

import json
from pathlib import Path
from typing import Any

from sae_lab.runtime.files import write_atomically

PAGE = Path(__file__).with_suffix(".html")


def write_page(description: dict[str, Any], folder: Path) -> list[Path]:
    """Write features.json, and index.html with the same data inside."""
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":"))
    page = PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", text.replace("<", "\\u003c"))
    written = []
    for name, content in (("index.html", page), ("features.json", text + "\n")):
        write_atomically(folder / name, content.encode())
        written.append(folder / name)
    return written
