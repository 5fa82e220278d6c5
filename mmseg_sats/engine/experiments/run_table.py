# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A table of the paper: which of its runs are missing, their training, and the results beside the published."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mmseg_sats.engine.experiments.own_configs import find_configs, own_cells, write_runs
from mmseg_sats.engine.experiments.plan import (
    Plan,
    check_options,
    find_systems,
    make_plan,
    memory_sizes,
)
from mmseg_sats.engine.experiments.record import Record
from mmseg_sats.engine.experiments.report import make_lines, markdown, read_published, to_csv
from mmseg_sats.engine.experiments.scheduler import Scheduler
from mmseg_sats.engine.experiments.split import write_split
from mmseg_sats.engine.experiments.tables import TABLE_DATASETS, TABLES, Table
from mmseg_sats.engine.experiments.unchanged import measure, with_unchanged
from mmseg_sats.utils.checkpoint import write_text
from mmseg_sats.utils.config_keys import IDENTITY
from mmseg_sats.utils.installed import CONFIGS, TOOLS
from mmseg_sats.utils.spelling import check_choice

PUBLISHED = Path(__file__).parent / 'published.csv'  # by the paper
PUBLISHED_NEWER = Path(__file__).parent / 'published_newer.csv'
# The table of --configs, in the names of its files.
OWN = 'configs'


def check_args(args: argparse.Namespace) -> None:
    """Checks what argparse cannot, and fills in what the table says.

    Raises:
        ValueError: an unknown name, or options that do not go together.
    """
    if (args.table is None) == (args.configs is None):
        raise ValueError(f'expected a table ({", ".join(TABLES)}), or --configs DIR with configs of your own')
    if args.table is not None:
        check_choice('table', args.table, TABLES)
        args.dataset = args.dataset or TABLES[args.table].dataset
        args.recipe = Path(args.dataset) if args.dataset.endswith('.py') else None
        if args.recipe:
            args.dataset = args.recipe.stem
        else:
            check_choice('--dataset', args.dataset, TABLE_DATASETS)
    table = table_of(args)
    own = {row.method for part in table.parts for row in part.rows}
    if args.methods and len(own) == 1:
        raise ValueError(
            f'--methods {",".join(args.methods)}: the rows of {args.table} are variants of SATS; '
            'expected table1 or table2'
        )
    if args.variants and not table.parts:
        raise ValueError(
            f'--variants {",".join(args.variants)}: the rows of {args.table or OWN} are systems, named by --methods'
        )
    given = {option.split('=')[0] for option in args.cfg_options}
    for key in IDENTITY:
        for option in {key, f'{key}s'} & vars(args).keys():
            if key in given:
                raise ValueError(f'--cfg-options {key}=...: it names the runs; give it by --{option}')
    for option in ('jobs', 'threads'):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f'--{option} {value}: expected 1 or more')


def table_of(args: argparse.Namespace) -> Table:
    """The table that is asked for. Beside a user's own configs stand the systems of Table 1 or Table 2."""
    if args.table is not None:
        return TABLES[args.table]
    return replace(TABLES[_systems(args.dataset)], title=f'The configs in {args.configs}', memory='none')


def _systems(dataset: str) -> str:
    """The table that has the systems on a data set."""
    return 'table2' if dataset == 'ade20k' else 'table1'


def read_plan(args: argparse.Namespace) -> Plan:
    """The table's runs. Of configs of the user's own, ``dataset`` and ``out`` are filled in.

    Raises:
        FileNotFoundError: the folder of configs does not exist.
        ValueError: an unknown method, an impossible size of the memory, an option that no config has, or configs that
            cannot stand in one table.
    """
    if args.configs is not None:
        plan = _plan_of_own(args)
    elif args.recipe is not None:
        plan = _plan_on_own_data(args)
    else:
        plan = _plan_of_ours(args, args.protocols, args.methods)
    check_options(plan.runs, args.cfg_options)
    args.out = args.out or Path('work_dirs') / args.dataset
    return plan


def _plan_of_ours(args: argparse.Namespace, protocols: Sequence[str], systems: Sequence[str]) -> Plan:
    table = table_of(args)
    return make_plan(
        table,
        args.dataset,
        CONFIGS,
        systems=systems,
        variants=args.variants,
        protocols=protocols,
        memories=memory_sizes(args.memory or table.memory, args.dataset),
        seeds=args.seeds,
        options=args.cfg_options,
    )


def _plan_on_own_data(args: argparse.Namespace) -> Plan:
    table, folder = table_of(args), (args.out or Path('work_dirs') / args.dataset) / 'configs'
    data, lacking = write_runs(args.recipe, folder, args.protocols, args.cfg_options)
    asked = args.methods or find_systems(folder)
    systems = [method for method in asked if method not in lacking]
    notes = [lacking[method] for method in asked if method in lacking and not table.parts]
    if not systems:
        return Plan([], notes)
    memory = args.memory or (table.memory if data.memory else 'none')
    plan = make_plan(
        table,
        args.dataset,
        folder,
        systems=systems,
        variants=args.variants,
        protocols=data.protocols,
        memories=memory_sizes(memory, args.dataset, data),
        seeds=args.seeds,
        options=args.cfg_options,
        data=data,
    )
    return Plan(plan.cells, [*notes, *plan.missing])


def _plan_of_own(args: argparse.Namespace) -> Plan:
    configs, notes = find_configs(args.configs)
    datasets = list(dict.fromkeys(config.dataset for config in configs))
    if args.dataset is None and len(datasets) > 1:
        raise ValueError(f'--configs {args.configs} has several data sets: expected one of {datasets} by --dataset')
    args.dataset = args.dataset or datasets[0]
    check_choice('--dataset', args.dataset, datasets)
    known = list(dict.fromkeys(config.protocol for config in configs if config.dataset == args.dataset))
    for protocol in args.protocols or ():
        check_choice('--protocols', protocol, known)
    protocols = args.protocols or known
    configs = [one for one in configs if one.dataset == args.dataset and one.protocol in protocols]
    memories = None if args.memory is None else memory_sizes(args.memory, args.dataset)
    plan = Plan(own_cells(configs, memories, args.seeds, args.cfg_options), notes)
    if args.methods:
        if args.dataset not in TABLE_DATASETS:
            raise ValueError(
                f'--methods {",".join(args.methods)}: the package has no configs for the data set {args.dataset!r}, '
                f'only for {", ".join(TABLE_DATASETS)}'
            )
        ours = _plan_of_ours(args, protocols, args.methods)
        plan = Plan([*plan.cells, *ours.cells], [*notes, *ours.missing])
    plan.cells.sort(key=lambda cell: protocols.index(cell.protocol))  # a table for each protocol
    files: dict[str, Path] = {}
    for run in (run for cell in plan.cells for run in cell.runs):
        if files.setdefault(run.name, run.config) != run.config:
            raise ValueError(f'{files[run.name]} and {run.config} would both be trained in {run.name}: rename one')
    return plan


def check_records(plan: Plan, args: argparse.Namespace) -> dict[str, Record]:
    """The runs' records, by name; a config that cannot be run is found before any is.

    Raises:
        ValueError: a config, or an option for it, is wrong.
    """
    records = {
        run.name: Record(args.out, run, args.stage_0_per_seed, args.accept) for run in plan.runs
    }
    for name, record in records.items():
        try:
            record.asked  # noqa: B018  reads and resolves the config
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{name} ({record.run.config}): {error}') from error
    return records


def split_training_images(plan: Plan, folder: Path) -> str:
    """Writes the split of the first run's training images; returns what to say."""
    if not plan.runs:
        raise ValueError('--write-split: there is no config to take the training images from')
    cfg = plan.runs[0].load()
    if not cfg.get('train_list'):
        raise ValueError(f'--write-split: {plan.runs[0].config} has no train_list')
    fit, held = write_split(Path(cfg.data_root) / cfg.train_list, folder)
    return f'{folder}/fit.txt: {fit} images, {folder}/held.txt: {held} images'


def run_table(args: argparse.Namespace, console: Console) -> int:
    """Trains and reports; returns the exit status."""
    check_args(args)
    plan = read_plan(args)
    if args.write_split:
        print(split_training_images(plan, args.write_split))
        return 0
    records = check_records(plan, args)
    conflicts = {name: text for name, record in records.items() if (text := record.conflict())}
    todo = [
        record
        for name, record in records.items()
        if name not in conflicts and record.results() is None
    ]
    notes = [f'left out: {text}' for text in plan.missing]
    notes += [
        f'{args.out / name} holds another run ({text}): choose another --out, or remove it'
        for name, text in conflicts.items()
    ]
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if not plan.runs:
        console.print('no config for anything that was asked for: no table is written', soft_wrap=True)
        return 1
    failed: list[str] = []
    if todo and not args.report:
        scheduler = Scheduler(
            todo, TOOLS / 'train_incremental.py', console, jobs=args.jobs, threads=args.threads
        )
        failed = scheduler.run()
    if not args.report:
        for text in measure(records.values(), args.threads):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    report(args, plan, records, notes)
    if failed:
        console.print(f'failed: {", ".join(failed)}', markup=False, highlight=False, soft_wrap=True)
    return 1 if failed or conflicts else 0


def report(
    args: argparse.Namespace, plan: Plan, records: dict[str, Record], notes: Sequence[str]
) -> None:
    """Prints the table, and writes it beside the runs as markdown and CSV."""
    table = table_of(args)
    name = args.table or OWN
    on_own_data = args.table is not None and args.recipe is not None
    published = {} if on_own_data else read_published(PUBLISHED, PUBLISHED_NEWER)  # of other images
    lines = make_lines(args.table or _systems(args.dataset), plan.cells, records, published)
    lines = with_unchanged(lines, records)
    if any(line.published for line in lines):
        notes = [
            f'Published: {table.dataset}, centre crops. {args.dataset} is measured as its config says; '
            'figures compare only where data, weights, schedule and crop are the same.',
            *notes,
        ]
    if args.accept:
        notes = [f'Differences accepted in: {", ".join(args.accept)}.', *notes]
    title = f'Rows of {args.table}' if on_own_data else table.title
    text = f'## {title}, on {args.dataset}\n\nIoU means in percent.\n\n{markdown(lines)}'
    text += ''.join(f'\n- {note}' for note in notes) + ('\n' if notes else '')
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / f'{name}.md', text)
    write_text(args.out / f'{name}.csv', to_csv(name, lines))
    print(f'written: {args.out / name}.md and .csv')
