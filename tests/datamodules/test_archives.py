"""Archives are unpacked whole and inside their folder, or a UserError names the archive."""

import bz2
import gzip
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.datamodules.archives import read_archive, unpack
from microtune.modules.atomic_files import whole_folder
from microtune.modules.user_error import UserError

FILES = {f"clips/word_{k}/größe.bin": np.random.default_rng(k).bytes(300 + 400 * k) for k in range(4)}
HEADER = 512  # bytes, of each member
KINDS = {".tar": "w", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def member(name, kind=tarfile.REGTYPE, link="", mode=0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def archive_of(members, mode="w", tar_format=tarfile.USTAR_FORMAT):
    """The bytes of an archive of members and what they hold."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode, format=tar_format) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


ARCHIVES = {suffix: archive_of([(member(n), c) for n, c in FILES.items()], mode) for suffix, mode in KINDS.items()}


def unpacked(path):
    """Name and content of each file that is unpacked, or None if the archive is refused."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            unpack(path, Path(folder))
        except UserError:
            return None
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("archives")


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_archive_is_unpacked(tmp_path, suffix, tar_format):
    files = dict(FILES)
    if tar_format != tarfile.USTAR_FORMAT:
        files["long/" + "word " * 40 + ".bin"] = b"a name longer than the field for it"
    path = tmp_path / f"archive{suffix}"
    members = [(member(name), content) for name, content in files.items()]
    path.write_bytes(archive_of(members, KINDS[suffix], tar_format))
    assert unpacked(path) == files


def test_the_suffix_does_not_matter(tmp_path):
    path = tmp_path / "download"
    path.write_bytes(ARCHIVES[".tar.gz"])
    assert unpacked(path) == FILES


def test_an_archive_of_the_current_folder(tmp_path):
    path = tmp_path / "archive.tar"
    path.write_bytes(archive_of([(member(".", tarfile.DIRTYPE, mode=0o500), b""), (member("./a.txt"), b"a")]))
    assert unpacked(path) == {"a.txt": b"a"}


def test_links_inside_the_folder_are_kept(tmp_path):
    path, folder = tmp_path / "archive.tar", tmp_path / "folder"
    links = [(member("hard", tarfile.LNKTYPE, "d/a"), b""), (member("soft", tarfile.SYMTYPE, "d/a"), b"")]
    path.write_bytes(archive_of([(member("d/a"), b"content"), *links]))
    unpack(path, folder)
    assert (folder / "hard").read_bytes() == b"content"
    assert (folder / "soft").readlink() == Path("d/a")


def test_what_is_unpacked_can_be_read_and_is_not_executable_by_others(tmp_path):
    path, folder = tmp_path / "archive.tar", tmp_path / "folder"
    path.write_bytes(archive_of([(member("closed/a", mode=0o000), b"a"), (member("b", mode=0o4777), b"b")]))
    unpack(path, folder)
    assert (folder / "closed/a").stat().st_mode & 0o777 == 0o600
    assert (folder / "b").stat().st_mode & 0o7022 == 0


def test_a_leading_slash_is_stripped(tmp_path):
    path, folder = tmp_path / "archive.tar", tmp_path / "folder"
    name = f"{tmp_path}/outside.txt"
    path.write_bytes(archive_of([(member(name), b"a"), (member("//b.txt"), b"b")]))
    unpack(path, folder)
    assert (folder / name.lstrip("/")).read_bytes() == b"a"
    assert (folder / "b.txt").read_bytes() == b"b"
    assert not (tmp_path / "outside.txt").exists()


HOSTILE = {
    "above": [(member("../outside.txt"), b"hostile")],
    "above, in the middle": [(member("a/../../outside.txt"), b"hostile")],
    "absolute symbolic link": [(member("link", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "symbolic link outside": [(member("link", tarfile.SYMTYPE, "../outside.txt"), b"")],
    "through a symbolic link": [(member("up", tarfile.SYMTYPE, ".."), b""), (member("up/outside.txt"), b"hostile")],
    "hard link outside": [(member("link", tarfile.LNKTYPE, "../secret.txt"), b"")],
    "absolute hard link": [(member("link", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "character device": [(member("device", tarfile.CHRTYPE), b"")],
    "block device": [(member("device", tarfile.BLKTYPE), b"")],
    "pipe": [(member("pipe", tarfile.FIFOTYPE), b"")],
}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members_are_refused(tmp_path, what, suffix):
    path, around = tmp_path / f"hostile{suffix}", tmp_path / "around"
    path.write_bytes(archive_of([(member("harmless.txt"), b"harmless"), *HOSTILE[what]], KINDS[suffix]))
    around.mkdir()
    (around / "secret.txt").write_text("secret")
    with (
        pytest.raises(UserError, match=rf"hostile{suffix} has a member that .* do not trust this archive"),
        whole_folder(around / "folder") as partial,
    ):
        unpack(path, partial)
    assert list(around.iterdir()) == [around / "secret.txt"]
    assert (around / "secret.txt").read_text() == "secret"
    assert sorted(tmp_path.iterdir()) == [around, path]


# Of which tarfile makes a KeyError.
def test_a_hard_link_to_nothing_is_refused(tmp_path):
    path = tmp_path / "archive.tar"
    path.write_bytes(archive_of([(member("link", tarfile.LNKTYPE, "not there"), b"")]))
    assert unpacked(path) is None


# Of which open makes a ValueError.
def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    path = tmp_path / "archive.tar"
    path.write_bytes(archive_of([(member("ä\0b"), b"content")], tar_format=tarfile.PAX_FORMAT))
    assert unpacked(path) is None


# tarfile itself stops behind the first part of .tar.gz, and refuses a .tar.bz2 of parts, which is what pbzip2 writes.
@pytest.mark.parametrize(("suffix", "compress"), [(".tar.gz", gzip.compress), (".tar.bz2", bz2.compress)])
@pytest.mark.parametrize("length", [2 * HEADER, 2000])
def test_archives_compressed_in_parts_are_unpacked_whole(tmp_path, suffix, compress, length):
    path = tmp_path / f"archive{suffix}"
    path.write_bytes(compress(ARCHIVES[".tar"][:length]) + compress(ARCHIVES[".tar"][length:]))
    assert unpacked(path) == FILES


def test_members_are_read_one_after_another(tmp_path):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(ARCHIVES[".tar.gz"])
    with read_archive(path) as members:
        assert {info.name: tar.extractfile(info).read() for tar, info in members} == FILES


@pytest.mark.parametrize("exception", [UserError, ValueError, KeyboardInterrupt])
def test_other_exceptions_of_the_block_pass(tmp_path, exception):
    path = tmp_path / "archive.tar"
    path.write_bytes(ARCHIVES[".tar"])
    with pytest.raises(exception, match="of the block"), read_archive(path):
        raise exception("of the block")


def test_no_room_on_the_disk_is_a_user_error(tmp_path):
    path = tmp_path / "archive.tar"
    path.write_bytes(ARCHIVES[".tar"])
    expected = r"archive\.tar cannot be unpacked .*No space left.* make room on the disk"
    with pytest.raises(UserError, match=expected), read_archive(path):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("path", ["missing.tar.gz", ""])
def test_a_missing_archive_is_named(tmp_path, path):
    with pytest.raises(UserError, match=rf"{path} does not exist: give a \.tar or \.tar\.gz file"):
        unpack(tmp_path / path, tmp_path / "folder")


@pytest.mark.parametrize("content", [b"", b"\0", b"no archive", b"<html>404</html>" * 99, b"\x1f\x8b", b"PK\3\4" * 600])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"archive\.tar\.gz cannot be unpacked \(.+\): download it again"):
        unpack(path, tmp_path / "folder")


# tarfile itself takes a .tar cut inside the second header or a later one for whole.
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_archive_cut_short_is_refused(folder, suffix, data):
    whole = ARCHIVES[suffix]
    length = data.draw(st.integers(0, 20) | st.integers(0, len(whole) - 1))
    path = folder / f"cut{suffix}"
    path.write_bytes(whole[:length])
    # what is missing may be no more than the padding
    assert unpacked(path) in (None, FILES)


# tarfile itself reads these as the end of the archive, and the members behind would be silently missing.
@pytest.mark.parametrize("behind", [0, 1, 511])
def test_an_archive_cut_at_a_header_is_refused(tmp_path, behind):
    path = tmp_path / "archive.tar"
    path.write_bytes(ARCHIVES[".tar"][: 2 * HEADER + behind])  # the first member has 300 bytes, padded to 512
    assert unpacked(path) is None


# tarfile itself compares no checksum of a .tar.gz: members would be silently other, or missing.
@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_found_where_there_is_a_checksum(folder, suffix, data):
    content = bytearray(ARCHIVES[suffix])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / f"flipped{suffix}"
    path.write_bytes(content)
    assert unpacked(path) in (None, FILES)


# tarfile itself takes a wrong checksum of any header but the first for the end of the archive.
@settings(max_examples=40, deadline=None)
@given(byte=st.integers(0, 147), bit=st.integers(0, 7), number=st.integers(0, 3))
def test_a_flipped_bit_in_a_header_is_found(folder, byte, bit, number):
    content = bytearray(ARCHIVES[".tar"])
    padded = [HEADER + -(-len(file) // HEADER) * HEADER for file in FILES.values()]
    content[sum(padded[:number]) + byte] ^= 1 << bit
    path = folder / "flipped.tar"
    path.write_bytes(content)
    assert unpacked(path) is None
