"""Text that cannot inject into a terminal, a page or Markdown, and numbers for people.

Names of models and what models write are not trusted. Templates escape HTML; control characters and
marks that turn the direction of writing are replaced here.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029\ufff9-\ufffb\ufeff"  # separators that break lines, annotations
    "\ud800-\udfff\ufffe\uffff"  # no characters at all, which UTF-8 and XML refuse
    "\U000e0000-\U000e007f]"  # tags, which do not show
)
_MARKDOWN = re.compile(r"([\\`*{}\[\]<>#|~$&!@^=]|:(?=//)|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))")


_JOINERS = "\u200c\u200d"


def clean(text: str, keep: str = "\n") -> str:
    """Return text for a terminal: what does not print is replaced, but for ``keep`` and joiners."""
    return "".join(
        c if c.isprintable() or c in keep or c in _JOINERS else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def at_home(text: str) -> str:
    """Return text with ``~`` for the home folder where a path, also one of a list, begins."""
    return re.sub(rf"(^|[,=]\s*){home_pattern()}(?=[\\/]|\s*,|$)", r"\1~", text)


def home_pattern() -> str:
    """Return a regular expression of the home folder, as the system lets it be written."""
    home = Path.home()
    pattern = r"[\\/]".join(map(re.escape, re.split(r"[\\/]", str(home))))
    return f"(?i:{pattern})" if isinstance(home, PureWindowsPath) else pattern


def visible(text: object) -> str:
    """Return text for a page or a file: controls, but tabs, and marks of direction are replaced."""
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", str(text))


def markdown(text: object) -> str:
    """Return text that Markdown shows as it is, in one line: no tags, links, images or tables."""
    line = " ".join(visible(text).split())
    line = re.sub(r"(?i)\bwww\.", r"www\\.", _MARKDOWN.sub(r"\\\1", line))
    # At the beginning of a line these would make a list or a rule.
    return re.sub(r"^([-+](?=\s|[-+])|\d+(?=[.)]\s))", _mark, line)


def _mark(found: re.Match[str]) -> str:
    return f"\\{found[0]}" if found[0] in "-+" else f"&#{ord(found[0][0])};{found[0][1:]}"


def fenced(text: object) -> str:
    """Return text as a block of code; its fence is longer than any in the text."""
    shown = visible(text).strip("\n")
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"


def count(value: float) -> str:
    """Return a number of parameters or operations as people say it: 134.5M, 6.74B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            digits = 2 if suffix in "BT" else 1
            return f"{value / limit:.{digits}f}{suffix}"
    return str(value)


def megabytes(value: float) -> str:
    """Return bytes as megabytes of a million."""
    return f"{value / 1e6:,.1f} MB"


def percent(share: float) -> str:
    """Return a share as percent with one digit."""
    return f"{100 * share:.1f}%"


def number(value: float) -> str:
    """Return a measured number with as many digits as mean something."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return format(value, _form(value))


def _form(value: float) -> str:
    steps = ((1000, ",.0f"), (100, ".1f"), (1, ".2f"), (0.001, ".4f"))
    return next((form for limit, form in steps if abs(value) >= limit), ".2e")


def measured(value: float, stderr: float | None, form: str = "") -> str:
    """Return a value with its standard error, where there is one, to as many digits."""
    form = form or _form(value)
    shown = format(value, form)
    return shown if stderr is None else f"{shown} ± {format(stderr, form)}"


def in_percent(share: float, stderr: float | None) -> str:
    """Return a share in percent with its standard error, where there is one."""
    return measured(100 * share, None if stderr is None else 100 * stderr, ".1f")


def points(difference: float) -> tuple[str, bool | None]:
    """Return a difference of shares in points of percent, and whether it is for the better."""
    text = f"{100 * difference:+.1f} points".replace("-", "−")
    return text, None if difference == 0 else difference > 0


def said(value: Any) -> str:
    """Return a setting as people say it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(said, value)) or "none"
    if isinstance(value, dict):
        known = (f"{key}: {said(item)}" for key, item in value.items() if item is not None)
        return ", ".join(known) or "none"
    return str(value)
