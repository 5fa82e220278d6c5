# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Fills in the pages' templates."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment() -> Environment:
    """The environment of the templates beside this file: text is escaped, and what is missing is an error."""
    return Environment(
        loader=PackageLoader('mmseg_sats.visualization.report'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, page: Mapping[str, Any]) -> str:
    """A page that needs nothing but its values."""
    return page_environment().get_template(template).render(page)
