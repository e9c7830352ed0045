"""What `make docs` does to pages besides Markdown: numbers stay on one line with their units and spreads."""

import re
from typing import Any

NOT_TEXT = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<[^>]+>)", re.DOTALL)
JOINT = re.compile(r"(?<=\d) (?=[%×±]|(?:ms|GB|MB|M|s)\b)|(?<=[±×]) (?=\d)")


def on_page_content(html: str, **_: Any) -> str:
    """Replace spaces such as those of `0.098 ± 0.001` and `5 %`, outside code, by spaces that no line breaks at."""
    parts = NOT_TEXT.split(html)
    return "".join(part if i % 2 else JOINT.sub("\N{NO-BREAK SPACE}", part) for i, part in enumerate(parts))
