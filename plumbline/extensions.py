"""What other packages add: commands, scanners, suites and reward components, by entry points.

A package of somebody else's says in its pyproject.toml what it adds, and Plumbline finds it wherever both are installed:

    [project.entry-points."plumbline.scanners"]
    bank_terms = "my_package.scanners:BankTerms"

Groups: `plumbline.commands` (a module with `main(argv)`), `plumbline.scanners` (a class of the Scanner protocol),
`plumbline.suites` (a function that returns an EvalTask).
"""

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

GROUPS = ("plumbline.commands", "plumbline.scanners", "plumbline.suites")


def added(group: str, taken: Collection[str]) -> dict[str, EntryPoint]:
    """name -> entry point of one group; nothing is imported until `.load()`.

    Raises ValueError, with the distributions, where two use one name or one uses a name of our own (`taken`).
    """
    assert group in GROUPS
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in found and entry.value == found[entry.name].value:
            continue  # one distribution seen in two places of sys.path
        owner = found[entry.name].dist if entry.name in found else None
        if owner or entry.name in taken:
            other = owner.name if owner else "plumbline-rlhf"
            mine = entry.dist.name if entry.dist else entry.value
            raise ValueError(f"{group}: both {mine} and {other} add {entry.name!r}; uninstall or rename one")
        found[entry.name] = entry
    return found
