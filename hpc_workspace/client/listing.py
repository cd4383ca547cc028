"""The shell text that lists what changed in a repository, where the server's own list does not do.

OpenHands' server (1.58) splits git's lines at blanks and fails on the first changed file whose name has one, and gives
other names as git quotes them. The base that it compares with is the same here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from hpc_workspace.results import GitChange

NO_GIT = 61
_WORDS = {"M": "UPDATED", "A": "ADDED", "D": "DELETED", "U": "UPDATED", "T": "UPDATED"}
# No path of git's begins like that.
_PLACE, _UNTRACKED = "//in:", "//untracked"
_SCRIPT = r"""
GIT_OPTIONAL_LOCKS=0 GIT_TERMINAL_PROMPT=0 LC_ALL=C; export GIT_OPTIONAL_LOCKS GIT_TERMINAL_PROMPT LC_ALL
q() { git --no-pager -c core.fsmonitor=false -c core.hooksPath=/dev/null "$@"; }
commit() { q rev-parse --verify --quiet "$1^{commit}"; }
fork_point() {
  default=$(q rev-parse --abbrev-ref --verify --quiet origin/HEAD)
  if [ -n "$default" ]; then q merge-base HEAD "$default" || commit "$default"; return; fi
  for name in main master; do
    tip=$(commit "refs/heads/$name") || continue
    [ "$name" != "$branch" ] && [ "$(q merge-base HEAD "$tip")" = "$tip" ] && echo "$tip"
    return
  done
}
base() {
  head=$(commit HEAD) || { q hash-object -t tree /dev/null; return; }
  branch=$(q symbolic-ref --short --quiet HEAD)
  if [ -n "$branch" ] && upstream=$(commit "refs/remotes/origin/$branch"); then
    if [ "$upstream" != "$head" ] || [ -n "$(q status --porcelain --untracked-files=no)" ]; then
      echo "$upstream"; return
    fi
  fi
  found=$(fork_point)
  echo "${found:-$head}"
}
list() {
  q rev-parse --git-dir >/dev/null 2>&1 || return 0
  printf '//in:%s\0' "$1"
  base=$(base) || return
  q diff --name-status -z --no-renames --relative --no-ext-diff --ignore-submodules=dirty "$base" || return
  printf '//untracked\0'
  q ls-files -z --others --exclude-standard
}
git --version >/dev/null 2>&1 || exit $NO_GIT
cd -- "$p" 2>/dev/null || exit 0
list . || exit 1
for d in */; do
  d=${d%/}
  [ ! -e "./$d/.git" ] || (cd -- "./$d" && list "$d" 2>/dev/null)
done
exit 0
"""


def listing(path: str) -> str:
    """Text that prints what `parse_listing` reads. Its status is `NO_GIT` where there is none, 1 where git failed."""
    return f"p={shlex.quote(path)} NO_GIT={NO_GIT}{_SCRIPT}"


def parse_listing(printed: bytes) -> list[GitChange]:
    """The changes, sorted; those within repositories one level below under their names."""
    found = list(_changes(printed))
    nested = {place for place, _, _ in found if place != "."}
    kept = [
        GitChange(status=status, path=path if place == "." else f"{place}/{path}")
        for place, status, path in found
        if path and (place != "." or path.partition("/")[0] not in nested)
    ]
    return sorted(kept, key=lambda change: change.path)


def _changes(printed: bytes) -> Iterator[tuple[str, str, str]]:
    """Place, status and path of each; of each place a first one without a path."""
    # A name that is not UTF-8 has no place in JSON; it is shown with replacement characters, as by the bundled server.
    fields = iter(part.decode("utf-8", "replace") for part in printed.split(b"\0")[:-1])
    place, is_untracked = ".", False
    for field in fields:
        if field.startswith(_PLACE):
            place, is_untracked = field.removeprefix(_PLACE), False
            yield place, "", ""
        elif field == _UNTRACKED:
            is_untracked = True
        elif is_untracked:
            yield place, "ADDED", field
        else:
            yield place, _WORDS.get(field[:1], "UPDATED"), next(fields)
