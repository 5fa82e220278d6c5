# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What stands around the code: metafiles, the workflow, the hooks, the citation, the pages."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmseg_sats.version import __version__

ROOT = Path(__file__).parents[1]
METAFILES = sorted((ROOT / 'configs').glob('*/metafile.yml'))
TARGETS = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M))


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding='utf-8'))


def test_the_index_names_every_metafile() -> None:
    assert [ROOT / name for name in read('model-index.yml')['Import']] == METAFILES


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_a_metafile_holds_configs_that_exist_and_figures_that_were_reported(path: Path) -> None:
    meta = read(path)
    (collection,) = (entry['Name'] for entry in meta['Collections'])
    assert collection == path.parent.name
    reported = [
        # A mean's deviation stands behind it.
        [word.split(' ± ')[0].strip() for word in line.split('|')]
        for page in ('README.md', 'docs/results.md')
        for line in (ROOT / page).read_text().splitlines()
        if line.startswith('|')
    ]
    for model in meta['Models']:
        assert model['In Collection'] == collection
        assert (ROOT / model['Config']).is_file()
        assert Path(model['Config']).parent.name == collection
        for result in model['Results']:
            # All figures of one entry stand in one row of one table.
            figures = {f'{value:.2f}' for value in result['Metrics'].values()}
            rows = [row for row in reported if row[1].startswith(collection)]
            assert any(figures <= set(row) for row in rows), model['Name']


def test_the_workflow_and_the_hooks_call_make_targets() -> None:
    jobs = read('.github/workflows/ci.yml')['jobs']
    commands = [step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step]
    called = [command.split()[1] for command in commands if command.startswith('make ')]
    hooks = read('.pre-commit-config.yaml')['repos'][0]['hooks']
    called += [hook['entry'].removeprefix('make ') for hook in hooks]
    assert {'lint', 'test', 'docs'} <= set(called) <= TARGETS


def test_issue_templates_say_what_they_are_for() -> None:
    for path in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.md'):
        head = yaml.safe_load(path.read_text(encoding='utf-8').split('---')[1])
        assert head['name'], path
        assert head['about'], path


def test_the_citation_has_the_version() -> None:
    assert read('CITATION.cff')['version'] == __version__
    assert read('CITATION.cff')['license'] == 'Apache-2.0'


def test_contributing_keeps_its_order() -> None:
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    heads = re.findall(r'^## (.*)$', text, re.M)
    assert heads[:3] == ['Add a method', 'Add a backbone', 'Add a data set']


def anchors(page: Path) -> list[str]:
    """What the headings of a page are called in links, as GitHub and the site's parser do."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(encoding='utf-8'), re.M)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*(ROOT / 'docs').glob('*.md'), ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']:
        for link, anchor in re.findall(r'\]\(([^)#:\s]*)(?:#([^)\s]*))?\)', page.read_text(encoding='utf-8')):
            if not link.startswith('api/'):  # made by Sphinx
                target = page.parent / link if link else page
                assert target.exists(), f'{page.name}: {link}'
                assert not anchor or anchor in anchors(target), f'{page.name}: {link}#{anchor}'
