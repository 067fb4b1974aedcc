"""Where the signatures of what may be in a partition stand, and which bytes they are.

They are those by which libblkid (util-linux, libblkid/src/superblocks) tells them, as far as four
bytes or more make them hard to meet by chance.
"""

from __future__ import annotations

from imgfs.guest import swap

LVM2 = "LVM2 physical volume"
SUSPENDED_SWAP = "suspended swap"
SECOND_LUKS2 = "second LUKS2 header"
DM_VERITY = "dm-verity"
DM_INTEGRITY = "dm-integrity"
DM_SNAPSHOT = "snapshot exception store"
AVB_METADATA = "Android verified boot metadata"
AVB_FOOTER = "Android verified boot footer"
VERITY_MAGIC = b"verity\0\0"

#: (offset, bytes there, what it is); an offset below 0 counts from the end.
MAGICS: list[tuple[int, bytes, str]] = [
    (1024 + 56, b"\x53\xef", "ext"),
    (0, b"XFSB", "xfs"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (64 * 1024 + 64, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe\0\1", "LUKS1"),
    (0, b"LUKS\xba\xbe\0\2", "LUKS2"),
    (3, b"-FVE-FS-", "BitLocker"),
    (424, bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"), "BitLocker"),  # To Go
    (4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "bcache"),
    (4096 + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"), "bcachefs"),
    (-4096 + 60, b"\x83\x74\x02\x6b", "DRBD"),
    (-4096 + 60, b"\x83\x74\x02\x6c", "DRBD"),
    (-4096 + 60, b"\x83\x74\x02\x6d", "DRBD"),
    (0, b"$DRBDmgr=q", "DRBD control volume"),
    (0, b"DRBDdlh*", "DRBD proxy log"),
    (0, b"integrt\0", DM_INTEGRITY),
    (0, VERITY_MAGIC, DM_VERITY),
    (0, b"SnAp", DM_SNAPSHOT),
    (0, b"AVB0", AVB_METADATA),
    (-64, b"AVBf", AVB_FOOTER),
    (0, b"dmvdo001", "VDO"),
    (0, b"bluestore block device", "Ceph BlueStore"),
    (512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh", "Stratis"),
    (4608 + 4, b"!Stra0tis\x86\xff\x02^\x41rh", "Stratis"),
    (32, b"NXSB", "APFS"),
    (1024, b"H+\0\4", "HFS+"),
    (1024, b"HX\0\5", "HFS+"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (1024, b"\2\0\0\0\0\0\x34\x34", "NILFS2"),
    (1024, b"\xe2\xe1\xf5\xe0", "EROFS"),
    (1024, b"\xf5\xfc\x01\xa5", "VxFS"),
    (8 * 1024, b"\xa5\x01\xfc\xf5", "VxFS"),
    (0, b"\0\0\0ReFS\0", "ReFS"),
    (0, b"hsqs", "squashfs"),
    (0, b"sqsh", "squashfs"),
    (0, b"\x45\x3d\xcd\x28", "cramfs"),
    (0, b"\x28\xcd\x3d\x45", "cramfs"),
    (0, b"UBI#", "UBI"),
    (0, b"-rom1fs-", "romfs"),
    (32, b"ORCLDISK", "Oracle ASM"),
    (32 * 1024, b"JFS1", "JFS"),
    (64 * 1024, b"\x01\x16\x19\x70", "GFS2"),
    (64 * 1024, b"ReIsEr4", "Reiser4"),
    (16 * 512, b"\x49\xe8\x95\xf9", "HPFS"),
    (1 << 20, b"\x0d\xd0\x01\xc0", "VMFS volume"),
    (2 << 20, b"\x5e\xf1\xab\x2f", "VMFS"),
    (-2 * 512, b"Intel Raid ISM Cfg Sig. ", "Intel RAID member"),
    (-2 * 512, b"NVIDIA  ", "NVIDIA RAID member"),
    (-512, b"$XIDE$", "LSI RAID member"),
    (-512, b"\xde\x11\xde\x11", "DDF RAID member"),
    (-512, b"\x11\xde\x11\xde", "DDF RAID member"),
    (-257 * 512, b"\xde\x11\xde\x11", "DDF RAID member"),
    (-257 * 512, b"\x11\xde\x11\xde", "DDF RAID member"),
    # Tables of partitions that are not read here.
    (512, b"\x57\x45\x56\x82", "BSD disklabel"),
    (64, b"\x57\x45\x56\x82", "BSD disklabel"),
    (512 + 12, b"\xee\xde\x0d\x60", "Solaris table"),
    (508, b"\xda\xbe", "Sun disklabel"),
    (0, b"\x0b\xe5\xa9\x41", "SGI volume header"),
    (512, b"PM\0\0", "Apple partition map"),
    (0, b"\xc9\xc2\xd4\xc1", "AIX volume"),
    (6 * 512, b"PRIVHEAD", "Windows dynamic disk"),
]
MAGICS += [(offset, b"OCFSV2", "OCFS2") for offset in (1024, 2048, 4096, 8192)]
MAGICS += [(8192 + 52, b"ReIsErFs", "ReiserFS"), (8192 + 20, b"ReIsErFs", "ReiserFS")]
MAGICS += [(65536 + 52, name, "ReiserFS") for name in (b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs")]
MAGICS += [
    (32 * 1024 + 1, name, "ISO 9660 or UDF")
    for name in (b"CD001", b"BEA01", b"NSR02", b"NSR03", b"TEA01", b"BOOT2", b"CDW02")
]
MAGICS += [
    (at * 1024 + 1372, magic, "UFS")
    for at in (0, 8, 64)
    for magic in (
        b"\x54\x19\x01\x00",
        b"\x00\x01\x19\x54",
        b"\x19\x01\x54\x19",
        b"\x19\x54\x01\x19",
    )
]
MAGICS += [
    (page - swap.MAGIC_LENGTH, magic, name)
    for page in swap.PAGE_SIZES
    for magic, name in [
        (swap.VERSION_0, "swap"),
        (swap.VERSION_1, "swap"),
        *((each, SUSPENDED_SWAP) for each in swap.SUSPENDED),
    ]
]
MAGICS += [(0, swap.TUXONICE, SUSPENDED_SWAP)]
#: bcachefs keeps more superblocks than the first.
MAGICS += [
    (offset + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"), "bcachefs")
    for offset in (2 << 20, -(1 << 20))
]

#: LUKS2 writes its header twice; the second stands where the first ends.
LUKS2_SECOND = [0x4000 << step for step in range(9)]
LUKS2_SECOND_MAGIC = b"SKUL\xba\xbe"
LUKS2_HEADER_OFFSET = 256  # of the field that says at which byte the header is

MD_MAGIC = 0xA92B4EFC
MD_90_ALIGN = 64 * 1024
MD_1_SUPER_OFFSET = 144  # of the field that says in which sector the superblock is

ZFS_LABEL = 256 * 1024
#: The self-check at the end of the label's list of names and values, and the first root blocks.
ZFS_CHECK = 128 * 1024 - 40
ZFS_CHECK_MAGIC = 0x0210DA7AB10C7A11
ZFS_ROOT = 128 * 1024
ZFS_ROOT_MAGIC = 0x00BAB10C
ZFS_ROOTS_READ = 8 * 1024

#: Types of partitions that have the hashes of another one: `root-verity`, `usr-verity` of each
#: architecture.
VERITY_TYPES = {
    "d13c5d3b-b5d1-422a-b29f-9454fdc89d76",
    "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5",
    "fc56d9e9-e6e5-4c06-be32-e74407ce09a5",
    "24b2d975-0f97-4521-afa1-cd531e421b8d",
    "7386cdf2-203c-47a9-a498-f2ecce45a2d6",
    "df3300ce-d69f-4c92-978c-9bfb0f38d820",
    "86ed10d5-b607-45bb-8957-d350f23d0571",
    "f3393b22-e9af-4613-a948-9d3bfbd0c535",
    "d7d150d2-2a04-4a33-8f12-16651205ff7b",
    "16b417f8-3e06-4f57-8dd2-9b5232f41aa6",
    "98cfe649-1588-46dc-b2f0-add147424925",
    "9225a9a3-3c19-4d89-b4f6-eeff88f17631",
    "906bd944-4589-4aae-a4e4-dd983917446a",
    "ae0253be-1167-4007-ac68-43926c14c5de",
    "b6ed5582-440b-4209-b8da-5ff7c419ea3d",
    "7ac63b47-b25c-463b-8df8-b4a94e6c90e1",
    "b325bfbe-c7be-4ab8-8357-139e652d2f6b",
    "966061ec-28e4-4b2e-b4a5-1f0a825a1d84",
    "8f461b0d-14ee-4e81-9aa9-049b6fb97abd",
    "77ff5f63-e7b6-4633-acf4-1565b864c0e6",
    "8cce0d25-c0d0-4a44-bd87-46331bf1df67",
    "fca0598c-d880-4591-8c16-4eda05c7347c",
    "c215d751-7bcd-4649-be90-6627490a4c05",
    "6e11a4e7-fbca-4ded-b9e9-e1a512bb664e",
    "6a491e03-3be7-4545-8e38-83320e0ea880",
    "f46b2c26-59ae-48f0-9106-c50ed47f673d",
    "46b98d8d-b55c-4e8f-aab3-37fca7f80752",
    "3c3d61fe-b5f3-414d-bb71-8739a694a4ef",
    "df765d00-270e-49e5-bc75-f47bb2118b09",
    "bdb528a5-a259-475f-a87d-da53fa736a07",
    "ee2b9983-21e8-4153-86d9-b6901a54d1ce",
    "cb1ee4e3-8cd0-4136-a0a4-aa61a32e8730",
    "8f1056be-9b05-47c4-81d6-be53128e5b54",
    "b663c618-e7bc-4d6d-90aa-11b756bb1797",
    "31741cc4-1a2a-4111-a581-e00b447d2d06",
    "2fb4bf56-07fa-42da-8132-6b139f2026ae",
}
