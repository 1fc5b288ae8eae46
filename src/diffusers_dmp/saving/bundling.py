"""Write one Python file with a class and everything it needs from this package, to load it without the package.

Diffusers fetches a single code file for each component, so the file cannot import siblings: it holds the package's modules one
after the other, in one namespace.
"""

import ast
import functools
import importlib.util
from collections import defaultdict
from pathlib import Path

from .naming import PACKAGE

# The default of `bundle_code` in `save_pretrained`. In a code file it is True, since only that code can load what is saved.
BUNDLE_CODE = False

# What stands in the file in place of this module.
_STAND_IN = '''
# diffusers_dmp/saving/bundling.py, in short
BUNDLE_CODE = True


def source_of(cls: type, *others: type, source: str = Path(__file__).read_text(encoding="utf-8")) -> str:
    """Return this file's text, read when it was executed: another component's file may have replaced it since."""
    return source
'''


@functools.cache
def source_of(cls: type, *others: type) -> str:
    """
    Return the text of the file.

    Args:
        cls (`type`): A class of this package, with a constructor of its own.
        others (`type`): Further classes of this package that are to be found in the file.

    Raises:
        ValueError: if two of the modules give one name to different things.
    """
    imports: dict[str, set[str]] = defaultdict(set)  # names by module
    plain_imports: set[str] = set()
    owners: dict[str, str] = {}
    parts = []
    for module in _modules_needed_by(*(vars(each)["__init__"].__module__ for each in (*others, cls))):
        if module == __name__:
            imports["pathlib"].add("Path")
            parts.append(_STAND_IN)
            continue
        text = _read_source(module)
        statements = ast.parse(text).body
        for name in _defined_names(statements):
            if owners.setdefault(name, module) != module:
                raise ValueError(
                    f"Expected modules in one file to share no names, but got {name!r} in {module} and {owners[name]}."
                )
        for statement in statements:
            if isinstance(statement, ast.Import):
                plain_imports.update(map(ast.unparse, statement.names))
            elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                imports[statement.module].update(map(ast.unparse, statement.names))
        parts.append(f"\n# {module.replace('.', '/')}.py\n{_without_imports(text, statements)}")
    header = (
        f'"""`{cls.__name__}` for those who do not have the package {PACKAGE}.\n\n'
        "The package's modules, put together when the class was saved. Diffusers executes this file with\n"
        f'`trust_remote_code=True`; with the package installed and imported it is not used.\n"""\n'
    )
    lines = [f"import {name}" for name in sorted(plain_imports)]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    return "\n".join([header, *lines, *parts])


def _modules_needed_by(*modules: str) -> list[str]:
    """List modules and those of the package that they import, directly or not, each behind those it imports itself."""
    needed: dict[str, None] = {}  # a set in order

    def visit(name: str) -> None:
        if name in needed:
            return
        if name != __name__:
            for statement in ast.parse(_read_source(name)).body:
                if isinstance(statement, ast.ImportFrom) and statement.level:
                    relative = "." * statement.level + (statement.module or "")
                    visit(importlib.util.resolve_name(relative, name.rpartition(".")[0]))
        needed[name] = None

    for module in modules:
        visit(module)
    return list(needed)


def _read_source(module: str) -> str:
    """Read the file of a module without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _defined_names(statements: list[ast.stmt]) -> list[str]:
    """List the functions, classes and variables that a module defines."""
    names = []
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.append(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return names


def _without_imports(text: str, statements: list[ast.stmt]) -> str:
    """Remove imports from a module's text, also those for type checkers only; comments stay."""
    lines = text.splitlines()
    for statement in reversed(statements):
        if isinstance(statement, (ast.Import, ast.ImportFrom)) or (
            isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        ):
            del lines[statement.lineno - 1 : statement.end_lineno]
    return "\n".join(lines) + "\n"
