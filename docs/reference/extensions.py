"""Docstrings as Diffusers writes them, for mkdocstrings: [`Name`] is a link, and `Args:` may share a line."""

import re

import griffe

import diffusers_dmp

PUBLIC = {name for name in dir(diffusers_dmp) if not name.startswith("_")}
REFERENCE = re.compile(r"\[`~?((\w+)(?:\.\w+)*)`\](?!\(|\[)")
# 'name (`type`), other (`type`): text', of which each has a line of its own on the site
ARGUMENTS = re.compile(
    r"^( +)(\w+(?: \([^()]*(?:\([^()]*\)[^()]*)*\))?(?:, \w+(?: \([^()]*(?:\([^()]*\)[^()]*)*\))?)*): ", re.M
)
OPEN_LINE = re.compile(r"^( +\w+ \(.+\)):\n +", re.M)  # whose text begins in the next one
ARGUMENT = re.compile(r"(\w+)(?: \(((?:[^()]|\([^()]*\))*)\))?")


class DiffusersDocstrings(griffe.Extension):
    """What Google's style, which mkdocstrings reads, does not know."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ARGUMENTS.sub(_one_per_line, OPEN_LINE.sub(r"\1: ", obj.docstring.value))
            obj.docstring.value = REFERENCE.sub(_linked, text)


def _linked(match: re.Match) -> str:
    path, name = match.groups()
    return f"[`{path}`][diffusers_dmp.{path}]" if name in PUBLIC else f"`{path}`"


def _one_per_line(match: re.Match) -> str:
    indent, arguments = match.groups()
    found = [
        (name, re.sub(r"[`*]|\[(?=[`\w]+`\])|(?<=`)\]", "", kind or "")) for name, kind in ARGUMENT.findall(arguments)
    ]
    if not any(kind for _, kind in found):
        return match.group()
    shared = found[-1][1]
    lines = [f"{indent}{name} ({kind or shared}): " for name, kind in found]
    return "See the argument below.\n".join(lines)
