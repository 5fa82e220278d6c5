# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The text of a config, which is formatted only once for all files and logs that it is written to."""

from functools import lru_cache

from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

# The style of mmengine's Config.pretty_text.
_STYLE = dict(
    based_on_style='pep8',
    blank_line_before_nested_class_or_def=True,
    split_before_expression_after_opening_paren=True,
)
# The text of the config that was formatted last, by its content.
_LAST: dict[str, str] = {}


class StageConfig(Config):
    """mmengine's ``Config``, with a faster ``pretty_text`` that returns the same text.

    mmengine's Runner asks for a config's text about seven times, and yapf takes a third of a second
    for each. Here the top-level values are formatted one by one and cached, so that for the next stage
    only those that differ are formatted.
    """

    @property
    def pretty_text(self) -> str:
        """The config as Python code."""
        return config_text(self)


def config_text(cfg: Config) -> str:
    """The same text as mmengine's ``cfg.pretty_text``."""
    content = cfg._cfg_dict.to_dict()
    key = repr(content)
    if key not in _LAST:
        plain = [Config({k: content[k]}, format_python_code=False) for k in sorted(content)]
        _LAST.clear()
        _LAST[key] = ''.join(_laid_out(config.pretty_text) for config in plain)
    return _LAST[key]


@lru_cache(maxsize=256)
def _laid_out(text: str) -> str:
    return FormatCode(text, style_config=_STYLE)[0]
