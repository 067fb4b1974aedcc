#!/bin/sh
# Install what the tests need and run them: sh tests/run.sh [--long] [pytest arguments]
# Without arguments that is all of them, two files at a time: most of them wait for something.
set -eu
cd "$(dirname "$0")/.."
. contrib/install.sh
if [ "${1:-}" = --long ]; then
    IMGFS_TEST_LONG=1
    export IMGFS_TEST_LONG
    shift
fi

# .guest gets Debian's cloud kernel, unpacked only: to install it would change what this machine
# boots.
need_guest_kernel() {
    [ "$(dpkg --print-architecture)" = amd64 ] || return 0
    ls .guest/boot/vmlinuz-* >/dev/null 2>&1 && return 0
    rm -rf .guest
    mkdir .guest
    download_kernel 2>/dev/null || { as_root apt-get update -qq >/dev/null && download_kernel; } ||
        return 0 # the test that boots it says what is missing
    dpkg-deb -x .guest/*.deb .guest
    rm .guest/*.deb
}

download_kernel() (
    cd .guest
    package=$(apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$package" ] && apt-get download -q "$package" >/dev/null
)

need_packages qemu-utils procps util-linux mount openssh-server openssh-client openssl
need_packages fio qemu-system-x86 busybox-static e2fsprogs nginx-light nbdkit gnutls-bin libnbd-bin
need_packages cryptsetup-bin dosfstools exfat-fuse exfatprogs fdisk gdisk mtools rsync strace
need_packages bcache-tools btrfs-progs f2fs-tools lvm2 ntfs-3g partclone xfsprogs
need_packages 7zip lz4 lzip lzop
need_packages man-db groff-base systemd systemd-sysv dbus dbus-user-session libpam-systemd
need_guest_kernel
need_venv '[test]'
# Where PYTHONDONTWRITEBYTECODE is set each of the thousands of commands would compile all of it.
.venv/bin/python -m compileall -q imgfs tests
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec .venv/bin/python -m pytest "$@"
