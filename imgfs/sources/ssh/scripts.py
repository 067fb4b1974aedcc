"""What runs on the server: small programs that tell exact identity and extents.

Each is started by a command that means the same to sh, csh and fish and holds no file name; the
program itself is the first line of its input.  Then it says "imgfs helper", and answers a
line at a time:

    id NAME     its identity
    map NAME    its extents, then its identity, if that was the same before and after
    look NAME   python3 only: "b MODE WHOLE HEAD TAIL N N N …": its mode (octal), its first 1024 and
                last 512 bytes (hex, - for none), and its extents, if WHOLE is 1; then as `map`
    peek NAME OFFSET LENGTH …   python3 only: "p BYTES …" (base64, - for none); then as `map`
    punch NAME DEV:INO:OFFSET:LENGTH    python3 only: makes a hole, then its identity
    utime NAME DEV:INO:NANOSECONDS      python3 only: sets its mtime, -1: to now; then its identity

NAME is the bytes of the path in hex, for sh each as \\0ooo.  Extents are lines "d N N N …": the
boundaries of the data ranges (start, end, start, end …), each as the distance from the one before;
or what qemu-img prints.  The closing line tells a whole answer from a cut one:

    i dev:ino:size:mtime_ns:ctime_ns        exact identity
    j size:mtime_s                          the server can tell no better
    x errno                                 it failed; 116 is "changed while it was read"

Everything ends when the input does.
"""

from __future__ import annotations

PYTHON = r"""
import os, stat, sys, time
from binascii import b2a_base64
out = sys.stdout
DATA = getattr(os, "SEEK_DATA", None)
def token(s, size):
    return "i %d:%d:%d:%d:%d" % (s.st_dev, s.st_ino, size, s.st_mtime_ns, s.st_ctime_ns)
def ident(path):
    s = os.stat(path)
    size = s.st_size
    if stat.S_ISBLK(s.st_mode):
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.lseek(fd, 0, 2)
        finally:
            os.close(fd)
    return token(s, size)
def step(fd, at, size):
    try:
        start = os.lseek(fd, at, DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as e:
        if e.errno == 6:
            return size, size
        if e.errno != 22:
            raise
        return at, size
    if start < at or end <= start:
        raise OSError(5, "")
    return start, min(end, size)
def walk(path):
    before = ident(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = os.lseek(fd, 0, 2)
        if before != token(os.fstat(fd), size):
            return "x 116"
        at = last = 0
        found, due = [], time.time() + 1
        while at < size:
            start, at = step(fd, at, size) if DATA is not None else (at, size)
            if start < at:
                found += [start - last, at - start]
                last = at
            if len(found) >= 2048 or found and time.time() > due:
                out.write("d %s\n" % " ".join(map(str, found)))
                out.flush()
                found, due = [], time.time() + 1
        if found:
            out.write("d %s\n" % " ".join(map(str, found)))
        return before if before == ident(path) else "x 116"
    finally:
        os.close(fd)
def whole(path):
    s = os.stat(path)
    before = token(s, s.st_size)
    if not stat.S_ISREG(s.st_mode):
        raise OSError(95, "")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if before != token(os.fstat(fd), s.st_size):
        os.close(fd)
        raise OSError(116, "")
    return fd, s, before
def look(path):
    fd, s, before = whole(path)
    try:
        size = s.st_size
        ends = [os.pread(fd, 1024, 0), os.pread(fd, 512, max(0, size - 512))]
        at = last = 0
        found, due = [], time.time() + 0.05
        while at < size and len(found) < 2048 and time.time() < due:
            start, at = step(fd, at, size) if DATA is not None else (at, size)
            if start < at:
                found += [start - last, at - start]
                last = at
    finally:
        os.close(fd)
    if before != ident(path):
        return "x 116"
    words = [data.hex() or "-" for data in ends] + list(map(str, found))
    out.write("b %o %d %s\n" % (s.st_mode, at >= size, " ".join(words)))
    return before
def peek(path, *numbers):
    fd, s, before = whole(path)
    try:
        parts = [os.pread(fd, n, at) for at, n in zip(numbers[::2], numbers[1::2])]
    finally:
        os.close(fd)
    if before != ident(path):
        return "x 116"
    words = [b2a_base64(part).decode().strip() or "-" for part in parts]
    out.write("p %s\n" % " ".join(words))
    return before
def punch(path, dev, ino, offset, length):
    import ctypes
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        s = os.fstat(fd)
        if (s.st_dev, s.st_ino) != (dev, ino):
            return "x 116"
        libc = ctypes.CDLL(None, use_errno=True)
        call = getattr(libc, "fallocate64", None) or libc.fallocate
        if call(fd, 3, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
            return "x %d" % (ctypes.get_errno() or 5)
    finally:
        os.close(fd)
    return ident(path)
def utime(path, dev, ino, mtime):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        s = os.fstat(fd)
        if (s.st_dev, s.st_ino) != (dev, ino):
            return "x 116"
        if mtime < 0:
            os.utime(fd)
        else:
            os.utime(fd, ns=(s.st_atime_ns, mtime))
    finally:
        os.close(fd)
    return ident(path)
out.write("imgfs helper\n")
out.flush()
while True:
    words = sys.stdin.readline().split()
    if len(words) < 2:
        break
    try:
        name = bytes.fromhex(words[1])
        if words[0] == "punch":
            answer = punch(name, *map(int, words[2].split(":")))
        elif words[0] == "utime":
            answer = utime(name, *map(int, words[2].split(":")))
        elif words[0] == "peek":
            answer = peek(name, *map(int, words[2:]))
        else:
            answer = {"map": walk, "look": look}.get(words[0], ident)(name)
    except AttributeError:
        answer = "x 95"
    except OSError as e:
        answer = "x %d" % (e.errno or 5)
    out.write(answer + "\n")
    out.flush()
"""

# Perl's own stat has seconds only and Time::HiRes rounds to what a double holds, so coreutils'
# stat is asked, without a shell.
PERL = r"""
use strict; use Fcntl; $| = 1; binmode STDOUT;
my %whence = (linux => [3, 4], freebsd => [3, 4], darwin => [4, 3]);
sub ident { my ($path) = @_;
  my @s = stat($path) or return "x " . ($! + 0);
  local $/;
  if (open(my $p, "-|", "stat", "-L", "-c", "%d:%i:%s:%.9Y:%.9Z", "--", $path)) {
    my $t = <$p>; close $p;
    if (defined $t and $t =~ /^(\d+:\d+:\d+):(-?\d+)\.(\d{9}):(-?\d+)\.(\d{9})$/) {
      return "i $1:$2$3:$4$5"; } }
  return "j $s[7]:$s[9]"; }
sub walk { my ($path) = @_;
  my $before = ident($path); return $before if $before =~ /^x/;
  sysopen(my $f, $path, O_RDONLY|O_NONBLOCK) or return "x " . ($! + 0);
  my @a = stat($f); my $size = sysseek($f, 0, 2) + 0;
  my ($at, $last, @found) = (0, 0); my $w = $whence{$^O};
  while ($at < $size) {
    my ($start, $end) = ($at, $size);
    if ($w) {
      my $r = sysseek($f, $at, $w->[0]);
      if (defined $r) {
        $start = $r + 0; $r = sysseek($f, $start, $w->[1]);
        return "x 116" unless defined $r; $end = $r + 0;
      } elsif ($! == 6) { last; } elsif ($! != 22) { return "x " . ($! + 0); } }
    return "x 5" if $start < $at or $end <= $start;
    $end = $size if $end > $size;
    push @found, $start - $last, $end - $start; $last = $at = $end;
    if (@found >= 2048) { print "d @found\n"; @found = (); } }
  print "d @found\n" if @found;
  my @b = stat($path);
  return "x 116" unless @b and $a[0] == $b[0] and $a[1] == $b[1];
  return $before eq ident($path) ? $before : "x 116"; }
print "imgfs helper\n";
while (defined(my $line = <STDIN>)) {
  my ($what, $hex) = split " ", $line; last unless defined $hex;
  my $path = pack("H*", $hex);
  print(($what eq "map" ? walk($path) : ident($path)) . "\n"); }
"""

QEMU_IMG = r"""
export LC_ALL=C;
ident() {
 t=$(stat -L -c '%d:%i:%s:%.9Y:%.9Z' -- "$f" 2>/dev/null | tr -d .);
 case $t in *[!0-9:-]*|'') t=$(stat -L -c '%s:%Y' -- "$f" 2>/dev/null);
  if [ "$t" ]; then echo "j $t"; else echo "x 2"; fi;;
 *) echo "i $t";; esac; };
command -v qemu-img >/dev/null || exit 1;
echo 'imgfs helper';
while read -r what name; do
 f=$(printf '%b.' "$name"); f=${f%.};
 case $f in /*) ;; *) f=./$f;; esac;
 if [ "$what" = map ]; then
  before=$(ident);
  qemu-img map -U -f raw --output=json "$f" </dev/null 2>/dev/null || before='x 5';
  echo;
  after=$(ident);
  case $before in x*|"$after") echo "$before";; *) echo 'x 116';; esac;
 else ident; fi;
done
"""


def _hex(name: bytes) -> bytes:
    return name.hex().encode()


def _octal(name: bytes) -> bytes:
    return "".join(f"\\0{byte:03o}" for byte in name).encode()


#: kind: (the command, the first line of its input, how a name is written)
HELPERS = {
    "python3": (
        'python3 -IS -c "import sys;exec(bytes.fromhex(sys.stdin.readline()).decode())"',
        _hex(PYTHON.encode()),
        _hex,
    ),
    "perl": (
        'perl -e "eval pack(q(H*),substr(scalar(readline(STDIN)),0,-1))"',
        _hex(PERL.encode()),
        _hex,
    ),
    "qemu-img": (
        "sh -c 'read -r s;eval \"$s\"'",
        " ".join(QEMU_IMG.split("\n")).encode(),
        _octal,
    ),
}
