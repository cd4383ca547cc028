#!/bin/sh
# The first moments of a node, run by the host's shell as PID 1 of new mount, UTS, IPC, PID and cgroup namespaces, in the
# node's network namespace. Makes the node's file systems and becomes tini.
#
#   node_init.sh NAME TREE NODE_DIR "CONTROLLERS" [SOURCE TARGET]...
#
# pivot_root and not chroot: the kernel refuses user namespaces to a chrooted process (user_namespaces(7), EPERM), and
# Apptainer lives on them. For the same reason /proc and /sys must be whole: nothing is mounted over parts of /proc.
set -eu
name=$1 tree=$2 dir=$3 controllers=$4
shift 4

mount --make-rprivate /
root=$dir/root
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t sysfs -o nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
mkdir -m 1777 "$root/run/lock"

if [ -n "$controllers" ]; then
    mount -t tmpfs -o mode=755,nosuid,nodev,noexec tmpfs "$root/sys/fs/cgroup"
    for controller in $controllers; do
        mkdir "$root/sys/fs/cgroup/$controller"
        mount -t cgroup -o "$controller" cgroup "$root/sys/fs/cgroup/$controller"
        # The namespace's root is the node's own cgroup; Slurm divides it, so no process may stay in it.
        echo 0 >"$root/sys/fs/cgroup/$controller/init/cgroup.procs"
    done
fi

mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
while read -r node minor_major mode; do
    mknod -m "$mode" "$root/dev/$node" c ${minor_major%:*} ${minor_major#*:}
done <<DEVICES
null 1:3 666
zero 1:5 666
full 1:7 666
random 1:8 666
urandom 1:9 666
tty 5:0 666
fuse 10:229 666
DEVICES
mkdir "$root/dev/pts" "$root/dev/shm" "$root/dev/mqueue"
mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
mount -t mqueue mqueue "$root/dev/mqueue"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"

while [ $# -ge 2 ]; do
    mount --bind "$1" "$root$2"
    shift 2
done

hostname "$name"
mkdir -p "$root/.host"
cd "$root"
pivot_root . .host
cd /
umount -l /.host
exec /usr/bin/tini -- /usr/bin/sleep infinity </dev/null
