#!/bin/sh
# Run a command on another release of Debian or Ubuntu, in a copy of this checkout:
#   sh contrib/roots.sh [-k] NAME COMMAND...
#   sh contrib/roots.sh sid sh contrib/quickstart.sh
#   sh contrib/roots.sh debian13 sh tests/run.sh tests/sources
# NAME is debian12, debian13, sid, ubuntu24.04, ubuntu26.04 or ubuntu (the newest LTS).
#
# The first call for a release makes its root with debootstrap, below $IMGFS_ROOTS
# (/var/tmp/imgfs-roots).  COMMAND runs in an overlay of it, in mount and PID namespaces of its
# own: when it ends its processes end, nothing is left mounted, and what it wrote is dropped.  So
# several commands may use one root at once.
#   -k  keep what COMMAND writes in the root itself, for later calls: packages, and of the copy its
#       .venv and the native modules.  Other commands must not use the root meanwhile, and wait.
# A root has this machine's configuration of apt and pip, and its CA certificates.
#   IMGFS_ROOTS           the directory with the roots
#   IMGFS_MIRROR_DEBIAN   mirrors; the default is this machine's own, else debootstrap's
#   IMGFS_MIRROR_UBUNTU
# It needs root, debootstrap and the overlay filesystem.
set -eu

die() {
    printf 'roots.sh: %s\n' "$*" >&2
    exit 2
}

usage='usage: roots.sh [-k] debian12|debian13|sid|ubuntu24.04|ubuntu26.04|ubuntu COMMAND...'
self=$(readlink -f "$0")
checkout=$(dirname "$(dirname "$self")")
roots=${IMGFS_ROOTS:-/var/tmp/imgfs-roots}
inside=/usr/src/imgfs # where the copy of the checkout is in a root

# mirror LABEL: the archive that this machine's apt uses for it, if any.
mirror() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(LABEL)|$(REPO_URI)' 'Identifier: Packages' 2>/dev/null |
        sed -n "s/^$1|//p" | head -n 1
}

# Sets what NAME is: suite, family, script (debootstrap's), keyring, archive, sources.
describe() {
    family=debian script=sid
    case $1 in
    debian12) suite=bookworm ;;
    debian13) suite=trixie ;;
    sid) suite=sid ;;
    ubuntu24.04) suite=noble family=ubuntu ;;
    ubuntu26.04 | ubuntu) suite=resolute family=ubuntu ;;
    *) die "$1: no such release; $usage" ;;
    esac
    base=$roots/$suite
    keyring=/usr/share/keyrings/$family-archive-keyring.gpg
    if [ "$family" = ubuntu ]; then
        script=gutsy
        archive=${IMGFS_MIRROR_UBUNTU:-$(mirror Ubuntu)}
    else
        archive=${IMGFS_MIRROR_DEBIAN:-$(mirror Debian)}
    fi
}

# The lines of sources.list, for a root whose archive is known.
sources() {
    if [ "$family" = ubuntu ]; then
        for pocket in '' -updates -security; do
            echo "deb $archive $suite$pocket main universe"
        done
        return
    fi
    echo "deb $archive $suite main"
    [ "$suite" != sid ] || return 0
    echo "deb $archive $suite-updates main"
    security=$(mirror Debian-Security)
    [ -z "$security" ] || echo "deb $security $suite-security main"
}

# Debian has Ubuntu's keys in a package, in its newest release at least.
need_keyring() {
    [ ! -e "$keyring" ] || return 0
    [ "$family" = ubuntu ] || die "$keyring: not found; install the package with Debian's keys"
    kept=$roots/${keyring##*/}
    if [ ! -e "$kept" ]; then
        sh "$self" sid sh -c '{ apt-get update -q && apt-get install -qy ubuntu-archive-keyring ||
            apt-get install -qy ubuntu-keyring; } >&2; cat /usr/share/keyrings/ubuntu-archive-keyring.gpg' \
            </dev/null >"$kept.new" || die "$keyring: not found, nor in Debian sid"
        mv "$kept.new" "$kept"
    fi
    keyring=$kept
}

# copy_settings ROOT: this machine's apt and pip, names and certificates.
copy_settings() {
    for each in /etc/pip.conf /etc/xdg/pip "$HOME/.config/pip" /etc/resolv.conf /etc/hosts \
        /etc/ssl/certs/ca-certificates.crt; do
        [ -e "$each" ] || continue
        mkdir -p "$1${each%/*}"
        rm -rf "${1:?}$each"
        cp -rL "$each" "$1$each"
    done
    # How apt fetches (proxies, dates); what a package brings it brings in the root as well.
    for each in /etc/apt/apt.conf /etc/apt/apt.conf.d/*; do
        if [ -e "$each" ] && grep -qE '^ *Acquire::' "$each" && ! dpkg -S "$each" >/dev/null 2>&1; then
            cp "$each" "$1$each"
        fi
    done
}

make_root() {
    command -v debootstrap >/dev/null || die 'debootstrap: not found; install the package debootstrap'
    need_keyring
    # An older debootstrap does not know the newer names; its scripts fit them all the same, and
    # have the family's default mirror.
    tools=$roots/debootstrap
    rm -rf --one-file-system "$base.new" "$tools"
    cp -r "${DEBOOTSTRAP_DIR:-/usr/share/debootstrap}" "$tools"
    [ -e "$tools/scripts/$suite" ] || ln -s "$script" "$tools/scripts/$suite"
    echo "roots.sh: making $base, once" >&2
    set -- --variant=minbase --include=ca-certificates --keyring="$keyring"
    [ "$family" = debian ] || set -- "$@" --components=main,universe
    set -- "$@" "$suite" "$base.new"
    [ -z "$archive" ] || set -- "$@" "$archive"
    if ! DEBOOTSTRAP_DIR=$tools debootstrap "$@" >"$base.log" 2>&1; then
        tail -n 5 "$base.log" >&2
        die "debootstrap failed; all that it said is in $base.log"
    fi
    archive=$(sed -n 's/^deb \([^ ]*\) .*/\1/p' "$base.new/etc/apt/sources.list" | head -n 1)
    sources >"$base.new/etc/apt/sources.list"
    # No service starts in a root: an sshd of its own would take this machine's port.
    printf '#!/bin/sh\nexit 101\n' >"$base.new/usr/sbin/policy-rc.d"
    chmod +x "$base.new/usr/sbin/policy-rc.d"
    mkdir -p "$base.new$inside"
    mv "$base.new" "$base"
}

# copy_checkout TO: what git knows and what is new, without what is ignored.
copy_checkout() {
    mkdir -p "$1"
    find "$1" -path "$1/.venv" -prune -o -type f ! -name '*.so' -exec rm -f {} +
    cd "$checkout"
    if git -c safe.directory='*' ls-files >/dev/null 2>&1; then
        git -c safe.directory='*' ls-files -coz --exclude-standard | while_there
    else
        find . -name .venv -prune -o -type f -print0
    fi | tar --null -T - -c | tar -x -C "$1" --no-same-owner
}

# Of names that end with NUL, those of files: git still lists one that was removed.
while_there() {
    xargs -0 sh -c 'for each; do [ ! -e "$each" ] || printf "%s\0" "$each"; done' sh
}

# In the namespaces: mount all, and become COMMAND.
run_inside() {
    work=$1 where=$2
    shift 2
    if [ "$where" = "$work/root" ]; then
        mount -t overlay overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/work" "$where"
    else
        mount --bind "$where" "$where"
    fi
    copy_settings "$where"
    copy_checkout "$where$inside"
    mount -t proc proc "$where/proc"
    mount --rbind /sys "$where/sys"
    mount --rbind /dev "$where/dev"
    mount -t tmpfs tmpfs "$where/run"
    mkdir -p "$where/run/lock"
    # Not in the overlay: tests look closely at what the filesystem of /tmp can.
    mount --bind "$work/tmp" "$where/tmp"
    if [ -d /opt ]; then # wheels, that pip's configuration points to
        mount --rbind -o ro /opt "$where/opt"
    fi
    # What runs in the background of a shell ignores SIGINT, and hands that on.
    exec env --default-signal=INT,QUIT -u TMPDIR -u VIRTUAL_ENV -u PYTHONPATH -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS \
        -u XDG_CACHE_HOME -u XDG_STATE_HOME \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
        chroot "$where" /bin/sh -c 'cd "$0" && exec "$@"' "$inside" "$@"
}

if [ "${1:-}" = --inside ]; then # from below, with the namespaces
    describe "$2"
    shift 2
    run_inside "$@"
fi

lock=-s
if [ "${1:-}" = -k ]; then
    lock=-x
    shift
fi
[ $# -ge 2 ] || die "$usage"
name=$1
shift
describe "$name"
[ "$(id -u)" = 0 ] || die 'needs root: it mounts'
mkdir -p "$roots"
exec 9>"$base.lock"
if [ ! -d "$base" ]; then
    flock -x 9
    [ -d "$base" ] || make_root
fi
flock "$lock" 9

work=$(mktemp -d "$roots/run.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
mkdir "$work/root" "$work/upper" "$work/work" "$work/tmp"
chmod 1777 "$work/tmp"
where=$work/root
[ "$lock" = -s ] || where=$base
# In the background, since this one must hear of signals: PID 1 of a namespace does not.
exec 8<&0
unshare --mount --pid --fork --kill-child --propagation private \
    sh "$self" --inside "$name" "$work" "$where" "$@" <&8 8<&- 9>&- &
child=$!
trap 'kill -KILL "$child" 2>/dev/null || :; wait "$child" 2>/dev/null || :; exit 130' INT TERM
status=0
wait "$child" || status=$?
exit "$status"
