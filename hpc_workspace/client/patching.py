"""The shell text that makes one patch of all that changed in a repository, and changes nothing of it.

git works in a repository of its own beside: its own configuration, no hooks, an index that is a copy, objects that go
to a temporary directory, with the real repository as a place to read from (alternates). So nothing that the real one's
configuration names is run (hooks, fsmonitor, filters, external diffs, textconv), and nobody asks whose it is
(safe.directory). Of its configuration only what says how files are to be read is taken over.

Source: git(1), gitrepository-layout(5), git-update-index(1), of git 2.30 to 2.47.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

NO_GIT, NO_REPOSITORY, FAILED = 61, 62, 63

_SCRIPT = r"""
t=
fail() { code=$1; shift; [ -z "$*" ] || printf '%s\n' "$*" >&2; [ -z "$t" ] || rm -rf "$t"; exit "$code"; }
run() { "$@" || fail $FAILED; }
git --version >/dev/null 2>&1 || fail $NO_GIT
cd -- "$p" 2>/dev/null || fail $NO_REPOSITORY "$p is no directory"
r=$(pwd -P; echo x); r=${r%?x}
until [ -e "$r/.git" ]; do
  [ -n "$r" ] && [ "$r" != / ] || fail $NO_REPOSITORY "there is no .git in $p or above it"
  r=${r%/*}
done
g=$r/.git
if [ -f "$g" ]; then
  g=$(sed -n '1s/^gitdir: *//p' "$g")
  case $g in /*) ;; *) g=$r/$g ;; esac
fi
[ -f "$g/HEAD" ] || [ -h "$g/HEAD" ] || fail $NO_REPOSITORY "$g is no git directory"
c=$g
if [ -f "$g/commondir" ]; then
  IFS= read -r c <"$g/commondir"
  case $c in /*) ;; *) c=$g/$c ;; esac
fi
for v in $(env | sed -n 's/^\(GIT_[A-Za-z0-9_]*\)=.*/\1/p'); do case $v in $KEPT) ;; *) unset "$v" ;; esac; done
LC_ALL=C; export LC_ALL
of_its_own() { (GIT_DIR=$g; export GIT_DIR; git -c core.fsmonitor=false "$@"); }

t=$(mktemp -d) || fail $FAILED "there is no room for temporary files"
excludes=$(of_its_own config --path --get core.excludesfile)
format=$(of_its_own config --get extensions.objectformat)
base=$(of_its_own rev-parse --quiet --verify 'HEAD^{tree}')
for k in core.autocrlf core.eol core.filemode core.symlinks core.ignorecase core.precomposeunicode; do
  v=$(of_its_own config --get $k) && printf '%s %s\n' $k "$v"
done >"$t/settings"

[ -n "$excludes" ] || excludes=${XDG_CONFIG_HOME:-$HOME/.config}/git/ignore
HOME=$t XDG_CONFIG_HOME=$t GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null; export HOME XDG_CONFIG_HOME
export GIT_CONFIG_NOSYSTEM GIT_CONFIG_GLOBAL
run git init -q --template= ${format:+--object-format="$format"} "$t/own"
GIT_DIR=$t/own/.git GIT_WORK_TREE=${r:-/} GIT_INDEX_FILE=$t/index; export GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
run ln -s "$c/objects" "$t/objects"
GIT_ALTERNATE_OBJECT_DIRECTORIES=$t/objects; export GIT_ALTERNATE_OBJECT_DIRECTORIES
while read -r k v; do run git config $k "$v"; done <"$t/settings"
run git config core.safecrlf false
run git config core.excludesfile "$excludes"
run mkdir -p "$GIT_DIR/info"
for k in exclude attributes; do [ ! -f "$c/info/$k" ] || run cp "$c/info/$k" "$GIT_DIR/info/$k"; done
# With its time: git tells by that which files may have changed in the moment in which it was written.
if [ -f "$g/index" ]; then run cp -p "$g/index" "$t/index"; elif [ -n "$base" ]; then run git read-tree "$base"; fi
for k in "$g"/sharedindex.*; do [ ! -f "$k" ] || run cp -p "$k" "$GIT_DIR/"; done

cd -- "${r:-/}" || fail $FAILED
changed() { git diff-files -z --name-only --no-ext-diff --ignore-submodules=dirty "$@" >"$t/names" || fail $FAILED; }
changed --diff-filter=D
run git update-index -z --force-remove --stdin <"$t/names"
changed --diff-filter=d
run git update-index -z --add --replace --stdin <"$t/names"
git ls-files -z --others --exclude-standard >"$t/names" || fail $FAILED
# What ends with a slash is a repository in this one, and stays out.
if tr '\n\0' 'x\n' <"$t/names" | grep -q '/$'; then
  tr '\n\0' '\0\n' <"$t/names" | sed '/\/$/d' | tr '\n\0' '\0\n' >"$t/files" && mv "$t/files" "$t/names"
fi
run git update-index -z --add --replace --stdin <"$t/names"
tree=$(git write-tree --missing-ok) || fail $FAILED
[ -n "$base" ] || base=$(git hash-object -w -t tree /dev/null) || fail $FAILED
# A link that is moved as it is has no mode in a patch, and `git apply` does not see that it makes room.
renames=-M
if git diff-tree -r "$base" "$tree" | grep -q '^:120000'; then renames=--no-renames; fi
git diff-tree -r -p --binary --full-index $renames --no-color --no-ext-diff --no-textconv \
  --src-prefix=a/ --dst-prefix=b/ "$base" "$tree" >"$t/patch" || fail $FAILED
printf '%s\n' "$t"
"""


def patching(path: str, *, git: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> str:
    """Text that writes the patch of the repository at `path` to `DIRECTORY/patch`, and prints DIRECTORY.

    It ends with `NO_GIT`, `NO_REPOSITORY` or `FAILED`, and what was wrong on stderr.

    Args:
        git: how git is started; empty: as `git`.
        environment: what that git must find in its environment.
    """
    settings = dict(environment or {})
    head = [f"p={shlex.quote(path)}", f"NO_GIT={NO_GIT} NO_REPOSITORY={NO_REPOSITORY} FAILED={FAILED}"]
    head += [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    # Those of a git that is brought along say where its programs are.
    head += [f"KEPT={shlex.quote('GIT_EXEC_PATH' if 'GIT_EXEC_PATH' in settings else '-')}"]
    if git:
        head += [f'unset LD_PRELOAD LD_AUDIT; git() {{ {shlex.join(git)} "$@"; }}']
    return "\n".join(head) + _SCRIPT
