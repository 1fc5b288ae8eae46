"""One Python file with a class and all that it needs of this package, for those who load a repository without it.

Diffusers fetches no files beside such a one, so that it can import no siblings: it holds the package's modules one after
the other, which therefore share one namespace.
"""

import ast
import functools
import importlib.util
from collections import defaultdict
from pathlib import Path

from .naming import PACKAGE

# What stands in the file for this module.
_STAND_IN = '''
def source_of(cls: type, source: str = Path(__file__).read_text(encoding="utf-8")) -> str:
    """This file as it was executed; the next component's may have taken its place since."""
    return source
'''


@functools.cache
def source_of(cls: type) -> str:
    """
    The file.

    Args:
        cls (`type`): A class of this package, with a constructor of its own.

    Raises:
        ValueError: if two of the modules give one name to different things.
    """
    imports, owners, parts = defaultdict(set), {}, []
    for module in _needed_by(cls.__init__.__module__):
        if module == __name__:
            imports["pathlib"].add("Path")
            parts.append(_STAND_IN)
            continue
        text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        statements = ast.parse(text).body
        for name in _names(statements):
            if owners.setdefault(name, module) != module:
                raise ValueError(
                    f"Expected modules in one file to share no names, but got {name!r} in {module} and {owners[name]}."
                )
        for statement in statements:
            if isinstance(statement, ast.Import):
                imports[None].update(ast.unparse(statement).removeprefix("import ").split(", "))
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                imports[statement.module].update(map(ast.unparse, statement.names))
        parts.append(f"\n# {module.replace('.', '/')}.py\n{_without_imports(text, statements)}")
    header = (
        f'"""`{cls.__name__}` for those who do not have the package {PACKAGE}, put together of its modules when it was saved.\n\n'
        f'Whoever has the package needs no file like this, and none is executed. It is loaded with `trust_remote_code=True`.\n"""\n'
    )
    return "\n".join([header, *_import_lines(imports), *parts])


def _needed_by(module: str) -> list[str]:
    """The package's modules that one needs, each behind those that it needs itself, and that one."""
    needed = {}  # in order

    def visit(name: str) -> None:
        if name in needed:
            return
        if name != __name__:
            for statement in ast.parse(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")).body:
                if isinstance(statement, ast.ImportFrom) and statement.level:
                    visit(
                        importlib.util.resolve_name("." * statement.level + statement.module, name.rpartition(".")[0])
                    )
        needed[name] = None

    visit(module)
    return list(needed)


def _names(statements: list[ast.stmt]) -> list[str]:
    """All that a module defines."""
    names = []
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.append(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return names


def _without_imports(text: str, statements: list[ast.stmt]) -> str:
    """The text as it is, comments too, but for imports, also such as are for type checkers only."""
    lines = text.splitlines()
    for statement in reversed(statements):
        if isinstance(statement, (ast.Import, ast.ImportFrom)) or (
            isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        ):
            del lines[statement.lineno - 1 : statement.end_lineno]
    return "\n".join(lines) + "\n"


def _import_lines(imports: "dict[str | None, set[str]]") -> list[str]:
    plain = [f"import {name}" for name in sorted(imports.pop(None, ()))]
    return plain + [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
