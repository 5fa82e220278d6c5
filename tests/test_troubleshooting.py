# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/troubleshooting.md: the messages in its headings are those that the package raises."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/troubleshooting.md').read_text(encoding='utf-8')
HEADINGS = re.findall(r'^### (.*)$', PAGE, re.M)
# Of torch, mmengine and Python.
FOREIGN = {
    'IncrementalEncoderDecoder is not in the mmseg::model registry',
    'is not in the ... registry',
    "unexpected keyword argument 'iters'",
    'unexpected keyword argument',
    'weight tensor should be defined either for all or no classes',
    'Expected more than 1 value per channel when training',
    'Given groups=1, weight of size',
}


def texts() -> list[str]:
    """The texts in the package's code, without what f-strings put into them."""
    nodes = (node for path in (ROOT / 'mmseg_sats').rglob('*.py') for node in ast.walk(ast.parse(path.read_bytes())))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def quoted() -> list[str]:
    """The messages that headings quote."""
    return [message for heading in HEADINGS for message in re.findall(r'"([^"]+)"', heading)]


def test_our_messages_are_raised() -> None:
    known = texts()
    ours = [message for message in quoted() if message not in FOREIGN]
    missing = [
        message
        for message in ours
        for part in re.split(r'\.\.\.|exemplars\.json', message)
        if not any(part.strip() in text for text in known)
    ]
    assert missing == []
    assert len(ours) > 30


def test_foreign_messages_are_on_the_page() -> None:
    assert set(quoted()) >= FOREIGN


@pytest.mark.parametrize('section', re.split(r'^### ', PAGE, flags=re.M)[1:], ids=HEADINGS)
def test_every_message_has_a_way_out_in_a_few_sentences(section: str) -> None:
    text = re.split(r'^## ', section.split('\n', 1)[1], flags=re.M)[0]
    assert 1 <= len(re.findall(r'[.:;](?:\s|$)', text)) <= 8
    assert '\n    ' not in text
