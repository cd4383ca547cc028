#!/bin/sh
# Builds busybox, with dynamic linking to musl, in a Debian tree that has its source package in /usr/src.
# Leaves /usr/src/busybox/busybox.
set -eu
cd /usr/src
dpkg-source --no-check -x busybox_*.dsc busybox # apt has checked it
# The kernel's headers alone: glibc's lie beside them.
mkdir include
ln -s /usr/include/linux /usr/include/asm-generic /usr/include/mtd "/usr/include/$(gcc -print-multiarch)/asm" include/
cd busybox
make defconfig
# A patch of Debian's passes a sockaddr_un for a sockaddr: glibc's header takes it, musl's does not.
make -j"$(nproc)" CC="musl-gcc -Wno-incompatible-pointer-types -idirafter /usr/src/include" HOSTCC=gcc busybox
