"""A start as one page: a file that needs no network and no framework, and that shows its tables without JavaScript too.

Every text that comes from the record is escaped: by the template for its tables, by `tojson` for what the script reads.
The policy in the page's head allows the page's own script, by its digest, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vllm_compile_ext import __version__
from vllm_compile_ext.record.phases import PHASES
from vllm_compile_ext.report import formats
from vllm_compile_ext.report.facts import comparison, death, grouped, longest, outcome


def render(facts: dict[str, Any]) -> str:
    """The whole file, from `facts.facts`."""
    script, style = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("page.js", "page.css"))
    environment = Environment(
        loader=PackageLoader("vllm_compile_ext.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = (formats.duration, formats.cell, formats.change, formats.verdict, formats.percent, formats.date)
    words = (comparison, death, grouped, longest, outcome, _value, _slug)
    environment.filters |= {function.__name__.lstrip("_"): function for function in (*written, *words)}
    return environment.get_template("page.html").render(
        start=facts,
        script=Markup(script),
        style=Markup(style),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours=PHASES,
        data={name: facts[name] for name in ("processes", "path", "marks", "wall")},
        plugin=__version__,
    )


def _slug(text: str) -> str:
    return re.sub("[^a-z]+", "-", text.lower())


def _value(value: Any, name: str) -> str:
    """An option, a version or a fact about the machine."""
    if name == "memory" and isinstance(value, int):
        return formats.size(value)
    return value if isinstance(value, str) else json.dumps(value)
