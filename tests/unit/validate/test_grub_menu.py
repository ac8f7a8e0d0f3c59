"""GRUB's menu as grub-mkconfig writes it: what boots by default, what an entry loads, an entry for another kernel."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.validate import grub_menu
from tdxhw.validate.grub_menu import MenuError, candidate_entry, default_entry, parse, path_to

# As Debian 13's update-grub writes it, shortened. The kernels are two of Debian's.
UUID = "f1801d00-e188-41ae-88b3-827be21920c6"
OLD, NEW = "6.12.117+deb13-amd64", "6.12.120+deb13-amd64"


def entry(title: str, identifier: str, release: str, more: str = "") -> str:
    return f"""menuentry '{title}' --class debian --class os $menuentry_id_option '{identifier}' {{
\tload_video
\tif [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
\tinsmod ext2
\tsearch --no-floppy --fs-uuid --set=root {UUID}
\techo\t'Loading Linux {release} ...'
\tlinux\t/boot/vmlinuz-{release} root=UUID={UUID} ro {more}console=ttyS0 quiet
\techo\t'Loading initial ramdisk ...'
\tinitrd\t/boot/initrd.img-{release}
}}
"""


def configuration(default: str = "0", first: str = NEW) -> str:
    inner = "".join(
        entry(f"Debian, with Linux {release}", f"gnulinux-{release}-advanced-{UUID}", release)
        + entry(f"Debian, {release} (recovery mode)", f"gnulinux-{release}-recovery-{UUID}", release, "single ")
        for release in (NEW, OLD)
    )
    return f"""### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="{default}"
fi
function savedefault {{
  if [ -z "${{boot_once}}" ]; then
    saved_entry="${{chosen}}"
    save_env saved_entry
  fi
}}
function gfxmode {{
\tset gfxpayload="${{1}}"
}}
{entry("Debian GNU/Linux", f"gnulinux-simple-{UUID}", first)}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-{UUID}' {{
{inner}}}
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {{
\tfwsetup
}}
if [ -f $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
"""


ADVANCED = f"gnulinux-advanced-{UUID}"


@pytest.mark.parametrize(
    ("default", "environment", "kernel"),
    [
        ("0", {}, f"vmlinuz-{NEW}"),
        (f"{ADVANCED}>gnulinux-{OLD}-advanced-{UUID}", {}, f"vmlinuz-{OLD}"),
        ("1>2", {}, f"vmlinuz-{OLD}"),
        ("1", {}, f"vmlinuz-{NEW}"),  # a submenu: its first entry
        ("Debian GNU/Linux", {}, f"vmlinuz-{NEW}"),
        (f"Advanced options>Debian, with Linux {OLD}", {}, f"vmlinuz-{OLD}"),
        ("${saved_entry}", {}, f"vmlinuz-{NEW}"),
        ("${saved_entry}", {"saved_entry": f"{ADVANCED}>gnulinux-{OLD}-advanced-{UUID}"}, f"vmlinuz-{OLD}"),
        ("2", {}, ""),
    ],
)
def test_the_default_is_found_as_grub_finds_it(default: str, environment: dict[str, str], kernel: str) -> None:
    assert default_entry(configuration(default), environment).kernel_name == kernel


@pytest.mark.parametrize("default", ["7", "nothing called so", f"{ADVANCED}>9"])
def test_a_default_that_is_not_there_is_an_error(default: str) -> None:
    with pytest.raises(MenuError, match="no entry is called that"):
        default_entry(configuration(default), {})


def test_the_lasting_name_of_a_kernel_is_not_that_of_the_first_entry() -> None:
    for release in (OLD, NEW):
        path, found = path_to(configuration(), f"vmlinuz-{release}")
        assert path == f"{ADVANCED}>gnulinux-{release}-advanced-{UUID}"
        assert found.kernel_name == f"vmlinuz-{release}"
        assert "single" not in found.arguments, "not the recovery entry"


def test_the_lasting_name_stays_right_when_a_newer_kernel_comes() -> None:
    path, _ = path_to(configuration(first=OLD), f"vmlinuz-{OLD}")
    assert default_entry(configuration(path, first=NEW), {}).kernel_name == f"vmlinuz-{OLD}"


def test_a_kernel_without_an_entry_is_an_error() -> None:
    with pytest.raises(MenuError, match="no lasting entry for vmlinuz-1"):
        path_to(configuration(), "vmlinuz-1")


@pytest.mark.parametrize("broken", [configuration() + "}\n", configuration().replace("\n}\n", "\n", 1)[:-90]])
def test_braces_that_do_not_match_are_an_error(broken: str) -> None:
    with pytest.raises(MenuError, match=r"grub\.cfg"):
        parse(broken + "menuentry 'x' {\n")


def test_the_entry_on_trial_boots_like_the_host_s_own_kernel() -> None:
    _, base = path_to(configuration(), f"vmlinuz-{OLD}")
    text = candidate_entry(base, "vmlinuz-new", "initrd.img-new", "panic=5 kvm_intel.tdx=Y")
    (made,) = parse(text)
    assert made.id == grub_menu.CANDIDATE
    assert made.kernel == "/boot/vmlinuz-new"
    assert made.arguments == f"root=UUID={UUID} ro console=ttyS0 quiet panic=5 kvm_intel.tdx=Y"
    assert made.initrds == ("/boot/initrd.img-new",)
    assert f"search --no-floppy --fs-uuid --set=root {UUID}" in made.body


def test_the_entry_on_trial_keeps_microcode_and_drops_what_would_make_it_the_default() -> None:
    text = entry("x", "y", OLD).replace("\tinsmod ext2", "\tsavedefault\n\tinsmod ext2")
    (base,) = parse(text.replace("\tinitrd\t", "\tinitrd\t/boot/intel-ucode.img "))
    made = candidate_entry(base, "vmlinuz-new", "initrd.img-new", "")
    assert "initrd /boot/intel-ucode.img /boot/initrd.img-new" in made
    assert "savedefault" not in made
    without = candidate_entry(base, "vmlinuz-new", "", "")
    assert "[ -f" not in without, "and none where it has none"


def test_what_would_have_ubuntu_boot_it_twice_is_left_out() -> None:
    """`initrdfail` saves the entry as `prev_entry`, and boots it again if nothing has cleared that until then."""
    text = (
        entry("x", "y", OLD).replace("\tload_video", "\trecordfail\n\tload_video").replace("\n}", "\n\tinitrdfail\n}")
    )
    (base,) = parse(text)
    assert {"recordfail", "initrdfail"} <= set(base.body)
    made = candidate_entry(base, "vmlinuz-new", "initrd.img-new", "")
    assert "recordfail" not in made
    assert "initrdfail" not in made


@pytest.mark.parametrize(
    ("line", "waits", "asks"),
    [
        ("  set timeout=-1", True, False),
        ("set timeout='-1'", True, False),
        ("  set timeout=5", False, False),
        ("set timeout_style=hidden", False, False),
        ("set superusers=root", False, True),
        ('set superusers="a b"', False, True),
        ('set superusers=""', False, False),
        ("# set superusers=root", False, False),
    ],
)
def test_a_menu_that_waits_for_a_person_is_told(line: str, waits: bool, asks: bool) -> None:
    text = f"{configuration()}\n{line}\n"
    assert (grub_menu.waits_for_ever(text), grub_menu.asks_for_a_password(text)) == (waits, asks)


def test_what_grub_cannot_load_is_answered_by_the_host_s_own_kernel_not_by_a_menu() -> None:
    (base,) = parse(entry("x", "y", OLD))
    lines = [line.strip() for line in candidate_entry(base, "vmlinuz-new", "initrd.img-new", "panic=1").splitlines()]
    start = lines.index("set tdxhw_loaded=")
    assert lines[start + 1 : -1] == [
        "if [ -f /boot/initrd.img-new ]; then",
        f"if linux /boot/vmlinuz-new root=UUID={UUID} ro console=ttyS0 quiet panic=1; then",
        "initrd /boot/initrd.img-new",
        "set tdxhw_loaded=1",
        "fi",
        "fi",
        'if [ "${tdxhw_loaded}" != 1 ]; then',
        f"linux\t/boot/vmlinuz-{OLD} root=UUID={UUID} ro console=ttyS0 quiet",
        f"initrd\t/boot/initrd.img-{OLD}",
        "fi",
    ]


def test_without_an_initial_ram_disk_the_root_is_named_so_that_the_kernel_finds_it() -> None:
    (base,) = parse(entry("x", "y", OLD))
    (made,) = parse(candidate_entry(base, "vmlinuz-new", "", "panic=1", "root=PARTUUID=12-01"))
    assert made.arguments == "root=PARTUUID=12-01 ro console=ttyS0 quiet panic=1"
    (made,) = parse(candidate_entry(base, "vmlinuz-new", "initrd.img-new", "", "root=PARTUUID=12-01"))
    assert f"root=UUID={UUID}" in made.arguments


@pytest.mark.parametrize(
    ("own", "append", "arguments"),
    [
        ("ro -- single", "panic=5", "ro panic=5 -- single"),
        ("ro --", "panic=5", "ro panic=5"),
        ("ro -- --x root=UUID=1", "panic=5 -- 3", "ro panic=5 -- --x root=UUID=1 3"),
        ("ro", "panic=5 -- 3", "ro panic=5 -- 3"),
        ("""dyndbg='file x.c -- +p' ro""", "panic=5", """dyndbg='file x.c -- +p' ro panic=5"""),
        (r'a="b \" -- c" d\ -- -- e', "panic=5", r'a="b \" -- c" d\ -- panic=5 -- e'),
    ],
)
def test_what_is_for_the_kernel_stands_before_what_is_for_init(own: str, append: str, arguments: str) -> None:
    base = grub_menu.Entry("x", "y", (f"linux\t/boot/vmlinuz-{OLD} {own}",))
    (made,) = parse(candidate_entry(base, "vmlinuz-new", "", append, "root=PARTUUID=12-01"))
    assert made.arguments == arguments


def test_a_separate_boot_partition_keeps_its_short_paths() -> None:
    (base,) = parse(entry("x", "y", OLD).replace("/boot/", "/"))
    (made,) = parse(candidate_entry(base, "vmlinuz-new", "initrd.img-new", ""))
    assert (made.kernel, made.initrds) == ("/vmlinuz-new", ("/initrd.img-new",))


def test_a_configuration_that_does_not_forget_the_entry_for_one_boot_is_told() -> None:
    assert grub_menu.one_shot_works(configuration())
    assert not grub_menu.one_shot_works(configuration().replace("save_env next_entry", ""))
    assert not grub_menu.reads_custom(configuration().replace("custom.cfg", "other.cfg"))


@given(st.text(alphabet="{}\n menuentry'submenu$id-", max_size=200))
def test_whatever_is_in_a_configuration_parsing_ends_in_a_menu_or_one_kind_of_error(text: str) -> None:
    with suppress(MenuError):
        for found in parse(text):
            assert found.is_submenu or not found.children
