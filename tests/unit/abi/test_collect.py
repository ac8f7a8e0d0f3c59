"""From packages, images, folders and modules to kernels."""

import contextlib
import gzip
import lzma
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.abi.collect import collect
from tdxhw.abi.errors import AbiError
from tdxhw.abi.kernel_files import KernelFiles, Role, place_of
from tests.unit.abi.samples import (
    BUILD_ID,
    CONFIG,
    PACKERS,
    RELEASE,
    bzimage,
    classic_package,
    deb,
    elf,
    kvm_intel,
    module,
    vmlinux,
)


def collected(tmp_path: Path, *given: Path | str) -> list[KernelFiles]:
    work = tmp_path / "work"
    work.mkdir(parents=True)
    return collect([str(one) for one in given], work)


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def assert_whole(kernel: KernelFiles, image: bytes | None = None) -> None:
    assert kernel.release == RELEASE
    assert kernel.image is not None
    assert kernel.image.build_id == BUILD_ID.hex()
    assert kernel.config == CONFIG
    assert kernel.base is not None
    assert kernel.base.read_bytes() == (image or vmlinux())
    assert kernel.modules["kvm-intel"].read_bytes() == kvm_intel()
    assert kernel.module_info["kvm-intel"].parameters == {"ept": "bool", "tdx": "bool"}


@pytest.mark.parametrize("packing", PACKERS)
def test_a_classic_package_is_one_kernel(tmp_path: Path, packing: str) -> None:
    package = written(tmp_path / "linux-image.deb", deb(classic_package(), packing))
    (kernel,) = collected(tmp_path, package)
    assert_whole(kernel)
    assert kernel.config_from == f"linux-image.deb:boot/config-{RELEASE}"


def test_packages_of_a_split_kernel_are_one_kernel(tmp_path: Path) -> None:
    lib = f"usr/lib/modules/{RELEASE}"
    packages = {
        "linux-image": {"usr/share/doc/linux-image/copyright": b""},
        "linux-base": {f"{lib}/config": CONFIG.encode()},
        "linux-binary": {f"{lib}/vmlinuz": bzimage(vmlinux())},
        "linux-modules": {f"{lib}/kernel/arch/x86/kvm/kvm-intel.ko.xz": lzma.compress(kvm_intel())},
    }
    given = [written(tmp_path / f"{name}.deb", deb(files)) for name, files in packages.items()]
    (kernel,) = collected(tmp_path, *given)
    assert_whole(kernel)
    assert kernel.given == ["linux-base.deb", "linux-binary.deb", "linux-modules.deb"]


def test_two_kernels_stay_two(tmp_path: Path) -> None:
    other = {f"boot/vmlinuz-{RELEASE}-2": bzimage(vmlinux(f"{RELEASE}-2"), release=f"{RELEASE}-2")}
    kernels = collected(
        tmp_path, written(tmp_path / "a.deb", deb(classic_package())), written(tmp_path / "b.deb", deb(other))
    )
    assert [kernel.release for kernel in kernels] == [RELEASE, f"{RELEASE}-2"]


def test_a_split_package_alone_says_which_others_to_give(tmp_path: Path) -> None:
    depends = "linux-initramfs-tool, linux-base-7.3.4 (= 1), linux-binary-7.3.4 (= 1), linux-modules-7.3.4 (= 1)"
    package = written(tmp_path / "linux-image-7.3.4.deb", deb({"usr/share/doc/x": b""}, depends=depends))
    with pytest.raises(
        AbiError, match=r"split over several packages; give also linux-base-7\.3\.4, linux-binary-7\.3\.4, linux-mod"
    ):
        collected(tmp_path, package)


def test_another_package_is_no_kernel(tmp_path: Path) -> None:
    package = written(tmp_path / "bash.deb", deb({"bin/bash": b""}))
    with pytest.raises(AbiError, match="a Debian package without a kernel"):
        collected(tmp_path, package)


PACKAGES = [deb(classic_package(), packing) for packing in ("gz", "xz", "zst")]


@given(st.sampled_from(PACKAGES), st.data())
def test_a_cut_package_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, package: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    length = data.draw(st.integers(8, len(package) - 2))  # the last byte may be padding
    with pytest.raises(AbiError) as error:
        collected(folder, written(folder / "linux-image.deb", package[:length]))
    assert "\n" not in str(error.value)


@given(st.sampled_from(PACKAGES), st.data())
def test_a_damaged_package_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, package: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(package)
    for at in data.draw(st.lists(st.integers(0, len(package) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(AbiError):
        for kernel in collected(folder, written(folder / "linux-image.deb", bytes(damaged))):
            assert kernel.image is None or kernel.image.vmlinux == vmlinux()


def root(folder: Path) -> Path:
    for name, content in classic_package().items():
        written(folder / name, content)
    return folder


def test_a_root_folder_brings_every_kernel_in_it(tmp_path: Path) -> None:
    folder = root(tmp_path / "root")
    (folder / "lib").symlink_to("usr/lib")  # as distributions have it; each file counts once
    (kernel,) = collected(tmp_path, folder)
    assert_whole(kernel)


def test_an_installed_image_brings_its_neighbours(tmp_path: Path) -> None:
    folder = root(tmp_path / "root")
    written(folder / "boot/config-6.1", b"CONFIG_OTHER=y\n")
    (kernel,) = collected(tmp_path, folder / f"boot/vmlinuz-{RELEASE}")
    assert_whole(kernel)


@pytest.mark.parametrize("what", ["", "vmlinux", "arch/x86/boot/bzImage"])
def test_a_build_tree_brings_what_was_built(tmp_path: Path, what: str) -> None:
    tree = tmp_path / "linux"
    written(tree / "vmlinux", vmlinux())
    written(tree / "arch/x86/boot/bzImage", bzimage(vmlinux()))
    written(tree / ".config", CONFIG.encode())
    written(tree / "arch/x86/kvm/kvm-intel.ko", kvm_intel())
    (kernel,) = collected(tmp_path, tree / what)
    assert_whole(kernel)


def test_modules_given_by_themselves_join_their_kernel(tmp_path: Path) -> None:
    image = written(tmp_path / "vmlinuz", bzimage(vmlinux(config=CONFIG)))
    (kernel,) = collected(tmp_path, written(tmp_path / "kvm-intel.ko.xz", lzma.compress(kvm_intel())), image)
    assert_whole(kernel, vmlinux(config=CONFIG))


def test_a_compressed_vmlinux_is_unpacked(tmp_path: Path) -> None:
    (kernel,) = collected(tmp_path, written(tmp_path / "vmlinux.xz", lzma.compress(vmlinux(config=CONFIG))))
    assert kernel.config == CONFIG


def test_a_module_of_another_kernel_is_refused(tmp_path: Path) -> None:
    files = classic_package()
    files[f"usr/lib/modules/{RELEASE}/kernel/arch/x86/kvm/kvm.ko.xz"] = lzma.compress(module("6.1.0"))
    with pytest.raises(AbiError, match=rf"kvm\.ko\.xz: a module for Linux 6\.1\.0, not for {RELEASE}"):
        collected(tmp_path, written(tmp_path / "linux-image.deb", deb(files)))


def test_an_image_of_another_release_than_its_place_is_refused(tmp_path: Path) -> None:
    files = {f"boot/vmlinuz-{RELEASE}": bzimage(vmlinux("6.1.0"), release="6.1.0")}
    with pytest.raises(AbiError, match=rf"it is Linux 6\.1\.0, its place says {RELEASE}"):
        collected(tmp_path, written(tmp_path / "linux-image.deb", deb(files)))


def test_two_builds_of_one_release_are_not_taken_for_one_kernel(tmp_path: Path) -> None:
    """A kernel built again keeps its release; the structures of one with the build id of the other is neither."""
    other = bytes(reversed(BUILD_ID))
    again = classic_package() | {f"boot/vmlinuz-{RELEASE}": bzimage(vmlinux().replace(BUILD_ID, other))}
    first = written(tmp_path / "first.deb", deb(classic_package()))
    second = written(tmp_path / "second.deb", deb(again))
    with pytest.raises(AbiError, match=rf"second\.deb:boot/vmlinuz.*{other.hex()}.*first\.deb:boot/vmlinuz.*one at a"):
        collected(tmp_path, first, second)


def test_the_same_build_may_be_given_twice(tmp_path: Path) -> None:
    package = written(tmp_path / "linux-image.deb", deb(classic_package()))
    (kernel,) = collected(tmp_path, package, written(tmp_path / "vmlinux", vmlinux()))
    assert_whole(kernel)
    assert kernel.given == ["linux-image.deb", "vmlinux"]


def test_what_is_inside_the_image_is_its_configuration_whatever_lies_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    written(folder / "vmlinux", vmlinux(config=CONFIG))
    written(folder / "arch/x86/kvm/kvm-intel.ko", kvm_intel())
    written(folder / ".config", b"CONFIG_EDITED_SINCE=y\n")
    (kernel,) = collected(tmp_path, folder)
    assert (kernel.config, kernel.config_from) == (CONFIG, "inside vmlinux")


HEAD = "#\n# Automatically generated file; DO NOT EDIT.\n# Linux/x86 7.2.13 Kernel Configuration\n#\n"


@pytest.mark.parametrize("name", [".config", f"config-{RELEASE}"])
def test_a_configuration_given_by_itself_joins_the_kernel(tmp_path: Path, name: str) -> None:
    config = written(tmp_path / name, (HEAD + CONFIG).encode())
    (kernel,) = collected(tmp_path, config, written(tmp_path / "vmlinux", vmlinux()))
    assert (kernel.config, kernel.config_from) == (HEAD + CONFIG, name)


def test_a_configuration_of_one_of_several_kernels_has_to_say_of_which(tmp_path: Path) -> None:
    images = [written(tmp_path / "vmlinux", vmlinux()), written(tmp_path / "other", vmlinux("6.1.0"))]
    named = written(tmp_path / "config-6.1.0", HEAD.encode())
    first, second = collected(tmp_path / "named", *images, named)
    assert (first.config_from, second.config_from) == ("", "config-6.1.0")
    with pytest.raises(AbiError, match=rf"\.config: a configuration, but of which kernel \({RELEASE}, 6\.1\.0\)"):
        collected(tmp_path / "nameless", *images, written(tmp_path / ".config", HEAD.encode()))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AbiError, match="pipe: not a regular file"):
        collected(tmp_path, tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("kernel.rpm", b"\xed\xab\xee\xdb\x03\x00", "an RPM package, which is not read here: unpack it"),
        ("passwd", b"root:x:0:0::/root:/bin/sh\n", "not a kernel: neither a Debian package"),
        ("ls", elf({".text": b""}), "an ELF file, but no kernel"),
        ("kvm-intel.ko", elf({".text": b""}), "does not say for which kernel"),
        ("kvm-intel.ko", b"\x7fELF", "cut short or broken"),
        ("empty.deb", b"!<arch>\n", "an ar archive, but no Debian package"),
    ],
)
def test_refuses(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    with pytest.raises(AbiError, match=complaint):
        collected(tmp_path, written(tmp_path / name, content))


def test_a_missing_file_is_named_with_what_a_kernel_can_be(tmp_path: Path) -> None:
    with pytest.raises(AbiError, match=r"nowhere: no such file \(a kernel is a \.deb"):
        collected(tmp_path, "nowhere")


def test_an_empty_folder_is_no_kernel(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(AbiError, match="neither a build tree nor a root"):
        collected(tmp_path, tmp_path / "folder")


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("boot/vmlinuz-7.2", Role.IMAGE),
        ("usr/lib/modules/7.2/vmlinuz", Role.IMAGE),
        ("lib/modules/7.2/kernel/arch/x86/kvm/kvm-intel.ko.zst", Role.MODULE),
        ("lib/modules/7.2/updates/kvm_intel.ko", Role.MODULE),
        ("usr/lib/debug/boot/vmlinux-7.2", None),
        ("usr/lib/debug/lib/modules/7.2/vmlinux", Role.DEBUG_IMAGE),
        ("usr/lib/debug/usr/lib/modules/7.2/kernel/arch/x86/kvm/kvm.ko", Role.DEBUG_MODULE),
        ("lib/modules/7.2/kernel/arch/x86/kvm/kvm-amd.ko", None),
        ("usr/share/doc/boot/config-7.2", None),
    ],
)
def test_a_path_says_what_a_file_is(path: str, role: Role | None) -> None:
    place = place_of(path)
    assert (place.role if place else None) == role
    assert place is None or place.release == "7.2"


def test_the_running_kernel_is_what_it_shows_of_itself(tmp_path: Path) -> None:
    from tdxhw.abi.running import running_kernel

    folder = root(tmp_path / "root")
    written(folder / "proc/config.gz", gzip.compress(b"CONFIG_RUNNING=y\n"))
    written(folder / "sys/kernel/btf/vmlinux", b"\x9f\xeb\x01\x00")
    written(folder / "sys/kernel/btf/kvm_intel", b"\x9f\xeb\x01\x00")
    written(folder / "sys/module/kvm_intel/parameters/tdx", b"Y\n")
    kernel = running_kernel(tmp_path / "work", folder, RELEASE)
    assert kernel.config == "CONFIG_RUNNING=y\n"
    assert kernel.base == folder / "sys/kernel/btf/vmlinux"
    assert kernel.modules["kvm-intel"] == folder / "sys/kernel/btf/kvm_intel"
    assert kernel.modules["kvm"].read_bytes() == module()  # not in memory: its file
    assert kernel.parameter == "Y"
