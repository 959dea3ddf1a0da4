"""Formulas of the site: a ```` ```math ```` block as MathML, which browsers draw without a script; GitHub draws the block itself."""

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """Returns a block's MathML; the arguments are those of a custom fence of pymdownx.superfences."""
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
