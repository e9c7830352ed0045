"""The feature page: one self-contained HTML file that opens without a server or a network, and features.json."""

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_lab.plots.page_blocks import page_blocks
from sae_lab.runtime.files import atomic_file

SOURCES = Path(__file__).parent / "page"
SCRIPTS = ("data", "dom", "context", "card", "search", "map", "own", "page")
"""The files of page/ that are joined to the script, in this order."""


def write_page(description: dict[str, Any], folder: Path) -> list[Path]:
    """Write index.html, and the same data for programs as features.json.

    Args:
        description: what `describe_latents` returns, with `run`, the name of the run; `own`, what `describe_text`
            returns, if there is a text of one's own; `served`, whether a server answers the page.
    """
    page, table = folder / "index.html", folder / "features.json"
    with atomic_file(page) as f:
        for part in page_parts(description):
            f.write(part.encode())
    with atomic_file(table) as f:
        for part in json_parts(description):
            f.write(part.encode())
    return [page, table]


def page_parts(description: dict[str, Any]) -> Iterator[str]:
    """Yield the text of the page in parts.

    The data are blocks, compressed and in base64, of which a browser decodes those that it shows. Base64 has no
    character that means something in HTML, so no token or name can end a block.
    """
    source = (SOURCES / "page.html").read_text(encoding="utf-8")
    script = "\n".join((SOURCES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    source = source.replace("<!--CSS-->", (SOURCES / "page.css").read_text(encoding="utf-8").strip())
    before, after = source.split("<!--BLOCKS-->")
    yield before
    for name, content in page_blocks(description):
        packed = base64.b64encode(zlib.compress(content)).decode()
        yield f'<script type="text/plain" id="block-{name}">{packed}</script>\n'
    yield after.replace("<!--JS-->", script.strip())


def json_parts(description: dict[str, Any]) -> Iterator[str]:
    """Yield the text of features.json in parts, one for each latent: the list of all may not fit into memory."""
    head = {name: value for name, value in description.items() if name not in ("latents", "served")}
    yield to_json(head)[:-1] + ',"latents":['
    for i, latent in enumerate(description["latents"]):
        yield ("," if i else "") + to_json(latent)
    yield "]}\n"


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
