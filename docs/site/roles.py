"""Docstrings on the site: what a role of Sphinx names, such as ``:func:`run` ``, as code."""

import re
from typing import Any

from griffe import Extension, Object


class Roles(Extension):
    """Takes the roles out of every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":[a-z]+:(?=`)", "", obj.docstring.value)
