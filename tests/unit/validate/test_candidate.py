"""What is given with --kernel: packages, a bzImage with modules, and everything that is neither."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tdxhw.validate.candidate import CandidateError, read_candidate
from tests.unit.abi.samples import BUILD_ID, RELEASE, bzimage, classic_package, deb, vmlinux


def package(path: Path, files: Mapping[str, bytes], architecture: str = "amd64", packing: str = "xz") -> Path:
    path.write_bytes(deb(files, packing, f"libc6\nVersion: 1-1\nArchitecture: {architecture}"))
    return path


def archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 10
            tar.addfile(member, io.BytesIO(bytes(10)))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(vmlinux()))
    return path


@pytest.mark.parametrize("packing", ["xz", "gz", "zst"])
def test_a_package_says_its_release_and_build_id(tmp_path: Path, packing: str) -> None:
    path = package(tmp_path / "a.deb", classic_package(), packing=packing)
    candidate = read_candidate([path])
    assert (candidate.release, candidate.build_id) == (RELEASE, BUILD_ID.hex())
    assert [(one.name, one.version, one.path) for one in candidate.packages] == [("sample", "1-1", path)]
    assert candidate.installed_bytes > candidate.image_bytes > 0


def test_the_parts_of_a_split_kernel_belong_together(tmp_path: Path) -> None:
    binary = {f"usr/lib/modules/{RELEASE}/vmlinuz": bzimage(vmlinux())}
    modules = {f"usr/lib/modules/{RELEASE}/kernel/fs/ext4/ext4.ko": b"x"}
    paths = [package(tmp_path / "b.deb", binary), package(tmp_path / "m.deb", modules, "all")]
    assert read_candidate(paths).release == RELEASE
    with pytest.raises(CandidateError, match="no kernel image in sample: a split kernel has it in linux-binary"):
        read_candidate(paths[1:])


@pytest.mark.parametrize(
    "release", ["7.2.0-rc1+", "7.3~rc2-1~exp1-amd64", "6.18.44-fc-v669", "7.2.0_x-00012-gabc-dirty"]
)
def test_releases_as_people_have_them_will_do(tmp_path: Path, release: str) -> None:
    path = package(tmp_path / "a.deb", {f"boot/vmlinuz-{release}": bzimage(vmlinux(), release=release)})
    assert read_candidate([path]).release == release


@pytest.mark.parametrize("version", ["1:7.2.13-1", "7.3~rc2-1~exp1", "7.2.13-00012-gabcdef-3"])
def test_a_version_with_an_epoch_or_a_tilde_is_one(tmp_path: Path, version: str) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(deb(classic_package(), "xz", f"libc6\nVersion: {version}\nArchitecture: amd64"))
    assert [one.version for one in read_candidate([path]).packages] == [version]


def test_a_kernel_says_whether_it_reads_an_initial_ram_disk(tmp_path: Path) -> None:
    reads, none = "CONFIG_BLK_DEV_INITRD=y\n", "# CONFIG_BLK_DEV_INITRD is not set\n"
    modules = str(archive(tmp_path / "m.tar.gz", f"lib/modules/{RELEASE}/kernel/kvm.ko"))
    for inside, beside, gets in ((reads, none, True), (none, reads, False), ("", reads, True), ("", none, False)):
        image = bzimage(vmlinux(config=inside))
        files = {f"boot/vmlinuz-{RELEASE}": image, f"boot/config-{RELEASE}": beside.encode()}
        assert read_candidate([package(tmp_path / "a.deb", files)]).gets_initrd is gets
        (tmp_path / "image").write_bytes(image)
        assert read_candidate([tmp_path / "image"], modules).gets_initrd is (gets or inside == "")
        assert not read_candidate([tmp_path / "image"], "none").gets_initrd


def test_a_plain_image_brings_its_modules(tmp_path: Path, image: Path) -> None:
    there = f"lib/modules/{RELEASE}"
    modules = archive(tmp_path / "m.tar.gz", f"./{there}/kernel/kvm.ko", f"{there}/modules.order")
    candidate = read_candidate([image], str(modules))
    assert (candidate.release, candidate.modules_below) == (RELEASE, f"lib/modules/{RELEASE}")
    assert candidate.packages == ()
    assert read_candidate([image], "none").modules is None


@pytest.mark.parametrize("place", ["usr/lib/modules", "out/lib/modules"])
def test_modules_are_found_wherever_they_are_in_the_archive(tmp_path: Path, image: Path, place: str) -> None:
    modules = archive(tmp_path / "m.tar.gz", f"{place}/{RELEASE}/kernel/kvm.ko")
    assert read_candidate([image], str(modules)).modules_below == f"{place}/{RELEASE}"


def test_an_image_says_whether_it_is_signed(tmp_path: Path, image: Path) -> None:
    assert not read_candidate([image], "none").is_signed
    data = bytearray(image.read_bytes())
    data[:2], data[0x3C:0x40] = b"MZ", (0x80).to_bytes(4, "little")
    data[0x80:0x84], data[0x98:0x9A] = b"PE\0\0", b"\x0b\x02"
    image.write_bytes(data)
    assert not read_candidate([image], "none").is_signed, "an EFI program, with no certificate"
    data[0x98 + 112 + 36] = 1
    image.write_bytes(data)
    assert read_candidate([image], "none").is_signed


def mistakes(folder: Path) -> dict[str, tuple[list[Path], str, str]]:
    """Return by name: files, --modules, and what has to be said."""
    good = package(folder / "good.deb", classic_package())
    image = folder / "image"
    image.write_bytes(bzimage(vmlinux()))
    elf = folder / "vmlinux"
    elf.write_bytes(vmlinux())
    text = folder / "text"
    text.write_text("Makefile:\n")
    torn = folder / "torn.deb"
    torn.write_bytes(good.read_bytes()[:-2000])
    foreign = folder / "foreign"
    foreign.write_bytes(bzimage(vmlinux(machine=183)))
    nameless = folder / "nameless.deb"
    nameless.write_bytes(deb(classic_package()))
    arm = package(folder / "arm.deb", classic_package(), "arm64")
    two = package(folder / "two.deb", {"boot/vmlinuz-1": bzimage(vmlinux()), "boot/vmlinuz-2": bzimage(vmlinux())})
    mixed = {f"boot/vmlinuz-{RELEASE}": bzimage(vmlinux()), "lib/modules/6.1/kernel/a.ko": b""}
    other = package(folder / "other.deb", mixed)
    odd = {}
    for number, release in enumerate(("../../etc/x", "7.2'; reboot; '", "7.2{", "-rf", "a" * 65)):
        odd[release] = folder / f"odd-{number}"
        odd[release].write_bytes(bzimage(vmlinux(), release=release))
    renamed = package(folder / "renamed.deb", {"boot/vmlinuz-7.2-mine": bzimage(vmlinux())})
    return {
        **{
            f"a release called {release}": ([path], "none", f"is called {release.split()[0]!r}, which is no name")
            for release, path in odd.items()
        },
        "an image under another release's name": ([renamed], "", f"boot/vmlinuz-7.2-mine says that it is {RELEASE}"),
        "no such file": ([folder / "nothing"], "", "no such file"),
        "text": ([text], "none", "neither a bzImage nor a vmlinux"),
        "vmlinux": ([elf], "none", "no boot loader starts a vmlinux"),
        "torn package": ([torn], "", "torn.deb"),
        "package of another architecture": ([arm], "", "is for arm64, not for amd64"),
        "package without a control file to speak of": ([nameless], "", "does not say Version, Architecture"),
        "image of another architecture": ([foreign], "none", "not for x86-64"),
        "two kernels": ([two], "", "more than one kernel: boot/vmlinuz-1, boot/vmlinuz-2"),
        "modules of another kernel in the package": ([other], "", f"is {RELEASE}, and the modules are of 6.1"),
        "package and image": ([good, image], "", "packages (.deb) or one bzImage"),
        "two images": ([image, image], "none", "packages (.deb) or one bzImage"),
        "package and --modules": ([good], "m.tar", "packages bring their modules"),
        "image without modules": ([image], "", "--modules TAR has to bring its modules"),
        "no archive": ([image], str(text), "no tar archive that can be read: it is no .tar, .tar.gz"),
        "folder for an archive": ([image], str(folder), "no tar archive that can be read: Is a directory"),
        "archive that is not there": ([image], str(folder / "m.tar"), "m.tar: no such file"),
        "modules of another kernel": (
            [image], str(archive(folder / "m", "lib/modules/6.1/kernel/a.ko")), f"of {RELEASE} in it; there are: 6.1",
        ),
    }  # fmt: skip


def test_what_is_no_kernel_is_refused_by_name(tmp_path: Path) -> None:
    for name, (files, modules, told) in mistakes(tmp_path).items():
        with pytest.raises(CandidateError) as error:
            read_candidate(files, modules)
        assert told in str(error.value), name
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress], ids=["", "gz", "xz", "bz2"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_modules_that_are_cut_short_or_damaged_are_refused_and_blame_no_kernel(
    tmp_path: Path, image: Path, pack: Callable[[bytes], bytes], part: float
) -> None:
    path = tmp_path / "m.tar"
    noise = random.Random(1).randbytes(3000)
    with tarfile.open(path, "w") as tar:
        for number in range(30):
            member = tarfile.TarInfo(f"lib/modules/{RELEASE}/kernel/{number}.ko")
            member.size = len(noise)
            tar.addfile(member, io.BytesIO(noise))
    whole = pack(path.read_bytes())
    path.write_bytes(whole)
    assert read_candidate([image], str(path)).installed_bytes > 90000
    at = int(len(whole) * part) // 512 * 512  # the end of a block, where nothing is half there
    for broken in (whole[:at], whole[:at] + b"x" * 4096 + whole[at + 4096 :]):
        path.write_bytes(broken)
        with pytest.raises(CandidateError, match="no tar archive that can be read"):
            read_candidate([image], str(path))
