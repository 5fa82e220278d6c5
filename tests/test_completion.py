# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The line of docs/usage.md that switches completion on, in a real bash."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('argcomplete', reason='argcomplete is not installed (requirements/tests.txt)')
ROOT = Path(__file__).parents[1]
# What bash does when the tab key is pressed: the function that was registered fills COMPREPLY.
TAB = """
{line}
COMP_LINE={words!r} COMP_TYPE=9
COMP_POINT=${{#COMP_LINE}}
_python_argcomplete mmseg-sats
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the commands `mmseg-sats` and `register-python-argcomplete` of this Python."""
    if shutil.which('bash') is None:
        pytest.skip('bash is not installed')
    register = 'register-python-argcomplete'
    modules = {'mmseg-sats': 'mmseg_sats.commands', register: f'argcomplete.scripts.{register.replace("-", "_")}'}
    for name, module in modules.items():
        script = tmp_path / name
        script.write_text(f'#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n')
        script.chmod(0o755)
    return f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        ('mmseg-sats tr', ['train ']),
        ('mmseg-sats table --conf', ['--configs ']),
        ('mmseg-sats prepare ', ['voc', 'ade20k']),
        ('mmseg-sats train --launcher p', ['pytorch ']),
        ('mmseg-sats report photogr', ['photographs']),
    ],
)
def test_the_shell_completes(path: str, tmp_path: Path, words: str, expected: list[str]) -> None:
    (tmp_path / 'photographs').touch()
    (line,) = re.findall(r'^    (eval "\$\(register-python-argcomplete mmseg-sats\)")',
                         (ROOT / 'docs/usage.md').read_text(encoding='utf-8'), re.M)  # fmt: skip
    done = subprocess.run(
        ['bash', '-c', TAB.format(line=line, words=words)], cwd=tmp_path, text=True, capture_output=True, check=False,
        env={**os.environ, 'PATH': path, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    found = [word for word in done.stdout.splitlines() if not word.startswith('-h') and word != '--help']
    assert [word.rstrip() for word in found] == [word.rstrip() for word in expected], done.stderr
