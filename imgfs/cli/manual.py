"""What can be said to imgfs, told once: for `--help`, the manual pages, completion and README."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """`form` is as it is written, what stands for something in capitals; `default` may be empty."""

    form: str
    meaning: str
    default: str = ""

    @property
    def names(self) -> list[str]:
        """What each of its forms begins with: `prefetch`, `timeout=`, `write=through`."""
        forms = self.form.replace("[=", ", ").split(", ")
        names = [form.split("=")[0] + "=" * ("=" in form) for form in forms]
        return [name.rstrip("]") for name in names if not name.rstrip("]").isupper()]


def table(entries: tuple[Entry, ...]) -> str:
    """Its rows in Markdown; a third column where something has a default."""
    has_defaults = any(entry.default for entry in entries)
    rows = []
    for form, meaning, default in entries:
        first = ", ".join(f"`{each}`" for each in form.split(", ")).replace("|", "\\|")
        third = f" {default} |".replace("  ", " ") if has_defaults else ""
        rows.append(f"| {first} | {meaning} |{third}")
    return "\n".join(rows)


#: Of `-o`.
OPTIONS = (
    Entry("extents=on|off", "learn the holes of the source", "on"),
    Entry(
        "cache_size=SIZE",
        "most bytes that the cache may hold on disk",
        "10 GiB or a tenth of the free disk, the less",
    ),
    Entry("timeout=SECONDS", "how long an absent server is waited for before a read is EIO", "30"),
    Entry(
        "prefetch[=RATE]",
        "fetch whole images into the cache, at most RATE (like 20M) a second",
        "off",
    ),
    Entry(
        "hard",
        "wait for an absent server for ever instead, but for the mount command (soft is the "
        "opposite)",
        "off",
    ),
    Entry(
        "lazy",
        "connect at the first stat or read instead of at mount; ls of the names does not",
        "off",
    ),
    Entry("known_hosts=FILE, key=FILE, config=FILE", "instead of what is in ~/.ssh"),
    Entry(
        "helpers=NAME+NAME",
        "which of python3, perl, qemu-img to ask on the server, in this order",
        "all",
    ),
    Entry(
        "identity=TEXT",
        "a source that cannot tell (NBD) is the same image for as long as this text is",
    ),
    Entry(
        "format=NAME",
        "of the image: raw, qcow2, vmdk, vdi, vhd, vhdx, qcow, qed, parallels, dmg, cloop, bochs, "
        "luks",
        "by content",
    ),
    Entry(
        "snapshot=NAME",
        "id or name of a snapshot inside of a qcow2, whose disk is shown",
        "the disk as it is now",
    ),
    Entry(
        "luks_key=FILE",
        "the passphrase of a LUKS volume; what it unlocks is never kept on disk",
        "shown as it is stored",
    ),
    Entry(
        "backing=any, backing=SOURCE",
        "follow what a header names anywhere; or where that is",
        "beside the image only",
    ),
    Entry("uid=N, gid=N", "the owner that files show", "the mounting user"),
    Entry("umask=OCTAL", "all may do what the owner may, but for these bits", "only the owner may"),
    Entry("allow_other", "let other users in", "off"),
    Entry("write=through", "what is written to NAME.raw goes to the source", "off"),
    Entry("ro", "mount read-only, and take no snapshots", "off"),
)

#: Of a SOURCE.
SOURCES = (
    Entry("PATH", "a local image or block device; or, with a slash at its end, a directory"),
    Entry("FILE.toml", "many images, each with what it needs: see imgfs.toml(5)"),
    Entry(
        "ssh://[USER@]HOST[:PORT]/PATH", "an image behind ssh; with a slash at its end a directory"
    ),
    Entry("http://HOST[:PORT]/PATH, https://…", "an image at a web server that serves ranges"),
    Entry("s3://BUCKET/KEY", "an image in an object store; or, with a slash, all below it"),
    Entry("nbd://…, nbds://…, nbd+unix://…, nbds+unix://…, nbd+vsock://…", "an NBD export"),
    Entry("nbd+command:COMMAND", "what a server of NBD exports, which imgfs starts and ends"),
)

#: Under the mount point, or under an image's name there.
NAMES = (
    Entry(
        "NAME.raw",
        "the disk, whatever format the image is in: raw, qcow2, vmdk, vdi, vhd, vhdx, with their "
        "backing files; qed, qcow, parallels, dmg, cloop, bochs and LUKS through qemu-nbd",
    ),
    Entry(
        "NAME.qcow2, NAME.vmdk, NAME.stream.vmdk, NAME.vdi, NAME.vhd, NAME.vhdx",
        "the same disk in that format, made as it is read",
    ),
    Entry("original/FILE", "the bytes as stored"),
    Entry("snapshots/", "mkdir takes a writable snapshot, rmdir deletes it, mv renames it"),
    Entry(
        "sparse/",
        "the disk, in all formats, with the blocks that its filesystems do not use any more as "
        "holes",
    ),
    Entry("partitions/", "each partition, and each LVM volume, as a file"),
    Entry("extents.json", "as qemu-img map --output=json prints it"),
    Entry(
        ".imgfs/status.json, .imgfs/metrics",
        "what the mount is doing; the second for Prometheus",
    ),
)

#: Where imgfs keeps things, and what it is told by the environment.
ENVIRONMENT = (
    Entry("STATE_DIRECTORY, XDG_STATE_HOME", "where snapshots are kept", "~/.local/state/imgfs"),
    Entry("CACHE_DIRECTORY, XDG_CACHE_HOME", "where the cache is kept", "~/.cache/imgfs"),
    Entry(
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN",
        "the keys; profiles and ~/.aws are not read",
    ),
    Entry(
        "AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3",
        "another server than AWS's (MinIO, Ceph, SeaweedFS), by path: http://host:port",
    ),
    Entry("AWS_REGION, AWS_DEFAULT_REGION", "the bucket's region", "us-east-1"),
    Entry(
        "AWS_CA_BUNDLE, SSL_CERT_FILE",
        "a CA to trust besides the system's, and instead of them",
    ),
    Entry(
        "IMGFS_HTTP_AUTHORIZATION",
        "an Authorization header for https:// (Basic …, Bearer …); not sent on to other hosts",
    ),
    Entry("HTTPS_PROXY, HTTP_PROXY, NO_PROXY", "as in curl"),
    Entry("NOTIFY_SOCKET, WATCHDOG_USEC", "of systemd: told of with --foreground"),
)

#: Of an image in a TOML file, and of [defaults] but for the last three.
KEYS = (
    Entry("format", 'the image\'s format, as with -o format=: "raw", "qcow2", "vhd", …'),
    Entry("backing", 'a SOURCE that the image stands on, or "any"'),
    Entry("luks_key", "a file that holds the passphrase of a LUKS volume"),
    Entry("cache_size", 'most bytes of this image in the cache, like "2G"'),
    Entry("readahead", 'how far sequential reads are fetched ahead at most, like "64M", or "off"'),
    Entry("prefetch", 'fetch it whole: true, or so many bytes a second, like "20M"'),
    Entry("extents", '"off": do not ask where its holes are'),
    Entry("timeout", "seconds until an absent server is an error"),
    Entry("hard", "true: wait for an absent server for ever"),
    Entry("known_hosts", "ssh's file of known hosts"),
    Entry("key", "ssh's private key file"),
    Entry("config", "ssh's configuration file"),
    Entry("helpers", 'a list of "python3", "perl", "qemu-img": what to ask on the server'),
    Entry("source", "a SOURCE as on the command line, but for directories and TOML files"),
    Entry("command", "in its place: a list, the words of a command that serves NBD"),
    Entry("write", '"through": what is written to it goes to the source'),
    Entry("identity", "it is the same image for as long as this text is; for what cannot tell"),
    Entry("snapshot", "id or name of a snapshot inside of a qcow2, whose disk is shown"),
    Entry("s3, http", "tables, as [s3] and [http] for all images"),
)

#: Of [s3] and [http]; what is for s3 alone comes first.
STORE_KEYS = (
    Entry("endpoint", "another server than AWS's"),
    Entry("region", "the bucket's"),
    Entry("access_key, secret_key, session_token", "the keys"),
    Entry("path_style", "true: the bucket is in the path and not in the host's name"),
    Entry("authorization", "of [http]: the header that is sent"),
    Entry("ca_file", "a file of CAs to trust"),
    Entry("allow_http", "true: send keys without TLS, too"),
)
