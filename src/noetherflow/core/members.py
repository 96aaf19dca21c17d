"""Which modules stand behind a short name such as `embed -> head (+3)`, in few words."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from noetherflow.core.printing import WIDTH, count

MORE = re.compile(r"\(\+\d+\)")
INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def modules_of(parameters: Iterable[str]) -> tuple[str, ...]:
    """The modules that own some parameters, each once; a parameter without one stands for itself.

    Example:
        >>> modules_of(["head.weight", "head.bias", "scale"])
        ('head', 'scale')
    """
    split = (name.rpartition(".") for name in parameters)
    return tuple(dict.fromkeys(o if o and last in ("weight", "bias") else o + dot + last for o, dot, last in split))


def compressed(names: Iterable[str]) -> list[str]:
    """Names that differ in one index only as one, with the range of that index.

    Example:
        >>> compressed(["embed", "h.0.mlp", "h.1.mlp", "h.2.mlp", "h.0.attn"])
        ['embed', 'h.0-2.mlp', 'h.0.attn']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(INDEX.sub("{}", name, count=1), []).append(name)
    out = []
    for pattern, members in groups.items():
        numbers = sorted({int(found[0]) for name in members if (found := INDEX.search(name))})
        out.append(pattern.replace("{}", _ranges(numbers), 1) if len(members) > 1 else members[0])
    return out


NAMED = 3


def some_named(names: Iterable[str]) -> str:
    """A few names for a sentence, those that differ in one index as one, and how many more kinds there are.

    Example:
        >>> some_named(["embed", "h.0.mlp", "h.1.mlp"])
        '`embed`, `h.0-1.mlp`'
    """
    short = compressed(names)
    more = f" and {count(len(short) - NAMED, 'more kind', 'more kinds')}" if len(short) > NAMED else ""
    return ", ".join(f"`{name}`" for name in short[:NAMED]) + more


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def spelled_out(text: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for every name with a `(+n)` that occurs in a text, with all the modules it stands for.

    Args:
        text: what is printed above.
        members: the modules of every symmetry, by its name.

    Example:
        >>> print(*spelled_out("`a (+2) [scale]` grows", {"a (+2) [scale]": ("a", "h.0.o", "h.1.o")}), sep="\\n")
          a (+2) [scale]: a, h.0-1.o
    """
    squeezed = " ".join(text.split())
    shown = [name for name in members if MORE.search(name) and name in squeezed]
    lines = [f"{name}: {', '.join(compressed(members[name]))}" for name in shown]
    return [
        textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    ]
