#!/bin/sh
# Install what imgfs needs and run its main job.
#   sh contrib/quickstart.sh                      a demonstration over a local sshd
#   sh contrib/quickstart.sh SOURCE MOUNTPOINT    mount that
set -eu
cd_back=$(pwd)
cd "$(dirname "$0")/.."
. contrib/install.sh
need_venv ''
imgfs=$(pwd)/.venv/bin/imgfs
if [ $# -ge 2 ]; then
    cd "$cd_back"
    exec "$imgfs" mount "$@"
fi
need_packages openssh-server openssh-client e2fsprogs qemu-utils

work=$(mktemp -d)
server=
clean() {
    "$imgfs" umount "$work/mnt" 2>/dev/null || fusermount3 -uzq "$work/mnt" 2>/dev/null || :
    [ -z "$server" ] || kill "$server" 2>/dev/null || :
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

say() { printf '\n$ %s\n' "$*"; }
show() { say "$@"; "$@"; }

# A disk of 256 MiB with a file system and a few files.
mkdir "$work/files" "$work/mnt"
head -c 5000000 /dev/urandom >"$work/files/data"
cp -r imgfs "$work/files/"
truncate -s 256M "$work/disk.img"
/sbin/mke2fs -q -t ext4 -d "$work/files" "$work/disk.img"
sync "$work/disk.img"

# An sshd of our own on a free port, with throw-away keys.
port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
ssh-keygen -q -t ed25519 -N '' -f "$work/host"
ssh-keygen -q -t ed25519 -N '' -f "$work/user"
cp "$work/user.pub" "$work/authorized"
printf '[127.0.0.1]:%s %s\n' "$port" "$(cut -d' ' -f1,2 "$work/host.pub")" >"$work/known"
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd
/usr/sbin/sshd -D -f /dev/null -o "Port=$port" -o ListenAddress=127.0.0.1 \
    -o "HostKey=$work/host" -o "AuthorizedKeysFile=$work/authorized" -o StrictModes=no \
    -o UsePAM=no -o PidFile=none -o 'Subsystem=sftp /usr/lib/openssh/sftp-server' \
    2>/dev/null &
server=$!
sleep 1

# What snapshots and the cache hold would outlive this.
XDG_STATE_HOME=$work/state
XDG_CACHE_HOME=$work/cache
export XDG_STATE_HOME XDG_CACHE_HOME

say "imgfs ssh://127.0.0.1:$port$work/disk.img $work/mnt"
"$imgfs" "ssh://$(id -un)@127.0.0.1:$port$work/disk.img" "$work/mnt" \
    -o "known_hosts=$work/known,key=$work/user"
show ls -lsR "$work/mnt"
show "$imgfs" info "$work/mnt/disk.raw"
show "$imgfs" map "$work/mnt/disk.raw"
show cp "$work/mnt/disk.raw" "$work/copy.raw"
show cmp "$work/mnt/disk.raw" "$work/disk.img"
show du -h "$work/disk.img" "$work/copy.raw"
show qemu-img check "$work/mnt/disk.qcow2"
show mkdir "$work/mnt/snapshots/work"
show dd if=/dev/urandom of="$work/mnt/snapshots/work/work.raw" bs=1M count=2 seek=100 conv=notrunc,fsync
show cp "$work/mnt/snapshots/work/work.delta.qcow2" "$work/"
show qemu-img info "$work/work.delta.qcow2"
show cmp "$work/mnt/disk.raw" "$work/disk.img"
show rm "$work/work.delta.qcow2"
show rmdir "$work/mnt/snapshots/work"
show cp "$work/mnt/sparse/disk.vmdk" "$work/copy.vmdk"
show qemu-img compare "$work/copy.vmdk" "$work/copy.raw"
show "$imgfs" umount "$work/mnt"
