# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Mutants of the package: one expression changed each, drawn by a seed."""

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Triton's kernels need a GPU; the others hold text.
EXCLUDED = {'__init__.py', 'triton_pooling.py', 'version.py', 'stock_messages.py', 'theme.py'}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NOT_SWAPPED = {'isinstance', 'issubclass', 'getattr', 'hasattr', 'super', 'min', 'max'}


@dataclass(frozen=True)
class Mutant:
    """One changed expression.

    Args:
        file: path in the package.
        line: where the expression begins.
        kind: what was done to it.
        old: its text.
        new: what stands there instead.
        place: its bytes in the file, from and to.
        function: first line of the function around it, 0 outside all.
    """

    file: str
    line: int
    kind: str
    old: str
    new: str
    place: tuple[int, int]
    function: int

    def __str__(self) -> str:
        old, new = (' '.join(text.split()) for text in (self.old, self.new))
        return f'{self.file}:{self.line} {self.kind}: {old} -> {new} @{self.place[0]}'


def changed(node: ast.expr, **fields: Any) -> ast.expr:
    """A copy of ``node`` with other fields."""
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, 'value', None), str)


def mutations(node: ast.AST) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Kind, expression, and what may stand there instead, for what begins at ``node``."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            if not is_text(left) and not is_text(right):
                yield 'sign', node, changed(node, op=ast.Sub() if isinstance(op, ast.Add) else ast.Add())
                yield 'dropped', node, left
        case ast.BinOp(left=left, op=ast.Mult() | ast.BitOr()):
            yield 'dropped', node, left
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield 'sign', node, operand
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield 'comparison', node, changed(node, ops=[COMPARISONS[type(op)]()])
        case ast.Call(func=function, args=[first, second, *rest]):
            starred = any(isinstance(word, ast.Starred) for word in (first, second))
            if not starred and ast.unparse(function) not in NOT_SWAPPED:
                yield 'swapped', node, changed(node, args=[second, first, *rest])
        case ast.BoolOp(op=op):
            yield 'and/or', node, changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.Constant(value=bool() | int() as value) if value in (0, 1):
            yield 'constant', node, changed(node, value=type(value)(1 - value))
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield 'negated', test, ast.UnaryOp(op=ast.Not(), operand=test)
        case ast.comprehension(ifs=[test, *_]):
            yield 'negated', test, ast.UnaryOp(op=ast.Not(), operand=test)


def first_line(function: ast.FunctionDef) -> int:
    """As Python counts it: a decorator's, where there is one."""
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All mutants of one module; annotations and what stands in formatted strings stay as they are."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []

    def visit(node: ast.AST, function: int) -> None:
        if isinstance(node, ast.FunctionDef):
            function = first_line(node)
        for kind, expression, other in mutations(node):
            place = (starts[expression.lineno - 1] + expression.col_offset,
                     starts[expression.end_lineno - 1] + expression.end_col_offset)
            old = source.encode()[slice(*place)].decode()
            found.append(Mutant(file, expression.lineno, kind, old, f'({ast.unparse(other)})', place, function))
        for name, value in ast.iter_fields(node):
            if name in ('annotation', 'returns'):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    visit(child, function)

    visit(ast.parse(source), 0)
    return found


def draw(root: Path, number: int, seed: int) -> list[Mutant]:
    """``number`` mutants of the package in ``root``, as many of each kind as there are."""
    kinds: dict[str, list[Mutant]] = {}
    for path in sorted((root / 'mmseg_sats').rglob('*.py')):
        if path.name not in EXCLUDED:
            for mutant in mutants_of(str(path.relative_to(root)), path.read_text()):
                kinds.setdefault(mutant.kind, []).append(mutant)
    generator = random.Random(seed)
    for kind in sorted(kinds):
        generator.shuffle(kinds[kind])
    drawn: list[Mutant] = []
    while len(drawn) < number and any(kinds.values()):
        drawn += [kinds[kind].pop() for kind in sorted(kinds) if kinds[kind]]
    return drawn[:number]
