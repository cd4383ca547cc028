"""What a check finds, as values: a verdict, and the finding that people and programs get of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hpc_workspace.doctor.site import Site

Level = Literal["ok", "warn", "fail"]
# A value of the configuration file.
Setting = str | bool | list[str]
# Settings by their key, such as `slurm.partition`.
Recommended = Mapping[str, Setting]


@dataclass(frozen=True)
class Verdict:
    """What one look found.

    Attributes:
        level: `ok`; `warn`: works, but with less than there could be; `fail`: workspaces will not work.
        found: what was seen, in one short line.
        remedy: the exact thing to do or to set; empty where nothing is to be done.
        recommends: settings that fit what was seen, by their key in the configuration file.
    """

    level: Level
    found: str
    remedy: str = ""
    recommends: Recommended = field(default_factory=dict)


def ok(found: str, **more: Any) -> Verdict:
    return Verdict("ok", found, **more)


def warn(found: str, remedy: str, **more: Any) -> Verdict:
    return Verdict("warn", found, remedy, **more)


def fail(found: str, remedy: str, **more: Any) -> Verdict:
    return Verdict("fail", found, remedy, **more)


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        name: for people; unique.
        why: what depends on it, in one sentence.
        look: looks; None: there is nothing to look at here (no Slurm, no runtime).
        on_node: whether a compute node is looked at too, with `--node`.
    """

    name: str
    why: str
    look: Callable[[Site], Verdict | None]
    on_node: bool = True


@dataclass(frozen=True)
class Finding:
    """What a check found, and what it means.

    Attributes:
        name: the check's.
        level, found, remedy, recommends: as in `Verdict`.
        why: what depends on it.
        node: the short name of the compute node that it is of; empty: of this machine, or of the site.
    """

    name: str
    level: Level
    found: str
    why: str = ""
    remedy: str = ""
    recommends: Recommended = field(default_factory=dict)
    node: str = ""

    @classmethod
    def of(cls, name: str, why: str, verdict: Verdict, node: str = "") -> Finding:
        return cls(name, verdict.level, verdict.found, why, verdict.remedy, verdict.recommends, node)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Finding:
        """The finding that `dataclasses.asdict` made `value` of; what a later version has added is passed over.

        Raises:
            ValueError: it is none.
        """
        names = {one.name for one in dataclasses.fields(cls)}
        try:
            found = cls(**{name: given for name, given in value.items() if name in names})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no finding: {error}") from error
        if found.level not in ("ok", "warn", "fail"):
            raise ValueError(f"no level: {found.level!r}")
        return found
