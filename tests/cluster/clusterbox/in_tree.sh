#!/bin/sh
# Runs a program chrooted in a Debian tree, with the host's network, name service and certificates.
# To be run in mount and PID namespaces of its own: the mounts end with it, and nothing of them stays in the tree.
#
#   in_tree.sh TREE CERTIFICATES [SOURCE TARGET]... -- PROGRAM...
set -eu
tree=$1 certificates=$2
shift 2
mount -t tmpfs -o mode=1777 tmpfs "$tree/tmp"
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
for file in /etc/resolv.conf /etc/hosts; do
    [ ! -s "$file" ] || mount --bind "$file" "$tree$file"
done
cp -- "$certificates" "$tree/tmp/ca.pem"
while [ "$1" != -- ]; do
    mount --bind "$1" "$tree$2"
    shift 2
done
shift
exec chroot "$tree" "$@"
