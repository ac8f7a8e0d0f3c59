"""The inventory: what a lab file may say, and where an error points."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.lab import inventory
from tdxhw.lab.errors import InventoryError
from tdxhw.lab.hosts import Driver, SshTarget

REPOSITORY = Path(__file__).parents[3]

GOOD = """\
host:
  name: spr-01
  ssh: tdx@spr-01.lab
  promises: [kvm, tdx]
  labels: [spr]
  limits: {memory_gib: 64, run_timeout_s: 900}
  power: {driver: redfish, url: "https://bmc-spr-01.lab", credentials_env: BMC_SPR_01}
  console:
    driver: ipmi-sol
    address: bmc-spr-01.lab
"""


def write(folder: Path, text: str, name: str = "spr-01.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_lab_file_says_everything_about_a_host(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    host = inventory.load(tmp_path).host("spr-01")

    assert str(host.ssh) == "tdx@spr-01.lab"
    assert host.promises == ("kvm", "tdx")
    assert (host.limits.memory_gib, host.limits.run_timeout_s, host.limits.tds) == (64, 900, None)
    assert host.power == Driver("redfish", {"url": "https://bmc-spr-01.lab", "credentials_env": "BMC_SPR_01"})
    assert host.console == Driver("ipmi-sol", {"address": "bmc-spr-01.lab"})
    assert host.place == f"{tmp_path}/spr-01.yaml:2"


def test_a_lease_may_be_a_labgrid_place(tmp_path: Path) -> None:
    lease = "{driver: labgrid, place: spr-01, coordinator: 'lg.lab:20408'}"
    write(tmp_path, f"host: {{name: a, ssh: a, lease: {lease}}}\n")
    assert inventory.load(tmp_path).host("a").lease == Driver(
        "labgrid", {"place": "spr-01", "coordinator": "lg.lab:20408"}
    )


@pytest.mark.parametrize(
    ("lease", "message"),
    [
        ("{driver: labgrid}", "place"),
        ("{driver: labgrid, place: '*'}", "is no name of a labgrid place"),
        ("{driver: labgrid, place: a, coordinator: 'http://x'}", "has to be HOST or HOST:PORT"),
        ("{driver: file, place: a}", "there are: labgrid"),
    ],
)
def test_a_wrong_lease_is_an_error_with_its_line(tmp_path: Path, lease: str, message: str) -> None:
    path = write(tmp_path, f"host:\n  name: a\n  ssh: a\n  lease: {lease}\n")
    with pytest.raises(InventoryError, match=rf"{path}:4.*{re.escape(message)}"):
        inventory.load(tmp_path)


def test_the_example_in_the_repository_is_valid() -> None:
    assert list(inventory.load(REPOSITORY / "labs").hosts) == ["spr-01"]


def test_one_file_may_hold_several_hosts(tmp_path: Path) -> None:
    write(tmp_path, "hosts:\n- {name: b, ssh: b}\n- {name: a, ssh: a, labels: [gnr]}\n")
    lab = inventory.load(tmp_path)

    assert list(lab.hosts) == ["a", "b"], "hosts are in the order of their names"
    assert [host.name for host in lab.select("all")] == ["a", "b"]
    assert [host.name for host in lab.select("label=gnr")] == ["a"]
    assert [host.name for host in lab.select("b,a,b")] == ["b", "a"], "each host once, in the order asked for"


SECRET_POWER = GOOD.replace("credentials_env: BMC_SPR_01", "password: x")
SECRET_VARIABLE = GOOD.replace("BMC_SPR_01", "root:calvin")
PYTHON_NAME = "host:\n  ssh: a\n  name: !!python/name:os.system\n"

# What is wrong, the line it is on, and what the message has to say.
WRONG: dict[str, tuple[str, int, str]] = {
    "misspelt_key": (GOOD.replace("ssh: tdx", "adress: tdx"), 3, "unknown key 'adress'"),
    "misspelt_limit": (GOOD.replace("run_timeout_s", "timeout"), 6, "unknown key 'timeout'"),
    "repeated_key": (GOOD + "  name: spr-02\n", 11, "there twice, first on line 2"),
    "no_ssh": ("host:\n  name: a\n", 2, "no 'ssh'"),
    "host_is_a_list": ("host: [a]\n", 1, "has to be a mapping, not a list"),
    "number_as_text": (GOOD.replace("memory_gib: 64", "memory_gib: lots"), 6, "whole number, not text"),
    "number_out_of_range": (GOOD.replace("900", "0"), 6, "between 1 and 604800"),
    "sexagesimal_number": (GOOD.replace("900", "1:30"), 6, "plain decimal number"),
    "boolean_as_name": (GOOD.replace("name: spr-01", "name: no"), 2, "has to be text, not true/false"),
    "fraction_as_version": (GOOD + "  expects: {module: 1.5}\n", 11, "quote it if it is meant as text"),
    "version_of_letters": (GOOD + "  expects: {module: newest}\n", 11, "such as '1.5.16'"),
    "empty_name": (GOOD.replace("name: spr-01", 'name: ""'), 2, "empty"),
    "name_with_capitals": (GOOD.replace("name: spr-01", "name: SPR"), 2, "lower-case"),
    "name_that_means_all": (GOOD.replace("name: spr-01", "name: all"), 2, "means something else"),
    "promise_twice": (GOOD.replace("[kvm, tdx]", "[kvm, kvm]"), 4, "'kvm' twice"),
    "promise_unknown": (GOOD.replace("[kvm, tdx]", "[kvm, tdxx]"), 4, "no capability 'tdxx'"),
    "ssh_option_as_host": (GOOD.replace("tdx@spr-01.lab", "-oProxyCommand=reboot"), 3, "no host name"),
    "ssh_option_as_user": (GOOD.replace("tdx@spr-01.lab", "-oProxyCommand=x@host"), 3, "no user name"),
    "ssh_port_by_colon": (GOOD.replace("tdx@spr-01.lab", "spr-01.lab:2222"), 3, "ssh://user@host:port"),
    "ssh_password": (GOOD.replace("tdx@spr-01.lab", "ssh://tdx:hunter2@spr-01"), 3, "password"),
    "unknown_driver": (GOOD.replace("driver: redfish", "driver: magic"), 7, "driver 'magic' is unknown"),
    "option_of_another_driver": (GOOD.replace("url:", "port: 1, url:"), 7, "unknown key 'port'"),
    "missing_driver_option": (GOOD.replace(", credentials_env: BMC_SPR_01", ""), 7, "no 'credentials_env'"),
    "secret_in_power": (SECRET_POWER, 7, "no secrets in a lab file"),
    "secret_in_host": (GOOD + "  password: x\n", 11, "no secrets in a lab file"),
    "secret_in_url": (GOOD.replace("https://bmc", "https://root:calvin@bmc"), 7, "carries credentials"),
    "secret_instead_of_variable": (SECRET_VARIABLE, 7, "NAME of an environment variable"),
    "sol_without_address": (GOOD.replace("    address: bmc-spr-01.lab\n", ""), 9, "needs an address"),
    "broken_yaml": ("host:\n  name: [a\n", 3, "expected ',' or ']'"),
    "tab_indentation": ("host:\n\tname: a\n", 2, "cannot start any token"),
    "python_object": ("host: !!python/object/apply:os.system ['reboot']\n", 1, "has to be a mapping"),
    "python_object_as_name": (PYTHON_NAME, 3, "tagged tag:yaml.org,2002:python/name"),
    "two_documents": (GOOD + "---\nhost: {}\n", 11, "found another document"),
    "neither_host_nor_hosts": ("{}\n", 1, "either one 'host:' or a list"),
    "empty": ("# nothing yet\n", 1, "empty"),
    "merge_key": ("hosts:\n- &a {name: a, ssh: a}\n- {<<: *a, name: b}\n", 3, "key has to be text"),
}  # fmt: skip


WRONG_PLACES = {
    "url: 'https://[bmc'": "has to be an http(s) URL",
    "url: 'https://bmc:99999'": "has to be an http(s) URL",
    "url: 'https://bmc?x=1'": "has to be an http(s) URL",
    "url: 'https://root:calvin'": "has to be an http(s) URL",
    "url: 'https://root:cal[vin@bmc'": "has to be an http(s) URL",
    "url: 'https://bmc', ca: '~nobody-of-that-name/ca.pem'": "there is no user ~nobody-of-that-name",
}


@pytest.mark.parametrize("place", WRONG_PLACES)
def test_a_place_that_cannot_be_is_an_error_with_its_line_and_without_a_secret(tmp_path: Path, place: str) -> None:
    power = f"  power: {{driver: redfish, credentials_env: X, {place}}}\n"
    path = write(tmp_path, f"host:\n  name: a\n  ssh: a\n{power}")
    with pytest.raises(InventoryError) as error:
        inventory.load(tmp_path)
    assert str(error.value).startswith(f"{path}:4: ")
    assert WRONG_PLACES[place] in str(error.value)
    assert "calvin" not in str(error.value)


@pytest.mark.parametrize(
    ("ssh", "message"),
    [("ssh://root:calvin@h", "'ssh://root:…@h': carries a password"),
     ("root:calvin@h", "'root:…@h': carries a password"),
     ("ssh://h:0", "no host has a port 0"), ("[" * 3000, "too deep to be a lab file")],
)  # fmt: skip
def test_an_ssh_target_that_cannot_be_is_an_error_without_its_password(tmp_path: Path, ssh: str, message: str) -> None:
    quoted = ssh if ssh.startswith("[[") else f'"{ssh}"'
    write(tmp_path, f"host:\n  name: a\n  ssh: {quoted}\n")
    with pytest.raises(InventoryError) as error:
        inventory.load(tmp_path)
    assert message in str(error.value)
    assert "calvin" not in str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_file_line_and_what_is_wrong(tmp_path: Path, case: str) -> None:
    text, line, message = WRONG[case]
    path = write(tmp_path, text)

    with pytest.raises(InventoryError) as error:
        inventory.load(tmp_path)
    assert str(error.value).startswith(f"{path}:{line}: "), str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_secret_is_repeated_in_an_error(tmp_path: Path) -> None:
    for case in ("secret_in_url", "secret_instead_of_variable"):
        write(tmp_path, WRONG[case][0])
        with pytest.raises(InventoryError) as error:
            inventory.load(tmp_path)
        assert "calvin" not in str(error.value)


def test_two_files_may_not_describe_one_host(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "a.yaml")
    write(tmp_path, GOOD, "b.yaml")

    with pytest.raises(InventoryError, match=r"b\.yaml:2: host 'spr-01' is already at .*a\.yaml:2"):
        inventory.load(tmp_path)


def test_a_file_that_is_not_text_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"host:\n  name: \xff\xfe\n")

    with pytest.raises(InventoryError, match=r"a\.yaml:2: not UTF-8 text"):
        inventory.load(tmp_path)


def test_a_missing_folder_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match="lab init"):
        inventory.load(tmp_path / "nowhere")


def test_an_unknown_host_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(InventoryError, match=r"no host 'spr-02' in .*; there are: spr-01"):
        inventory.load(tmp_path).host("spr-02")
    with pytest.raises(InventoryError, match="matches 'label=gnr'"):
        inventory.load(tmp_path).select("label=gnr")


HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,20}", fullmatch=True),
    st.ip_addresses(v=6).map(str),
    st.ip_addresses(v=4).map(str),
)
USERS = st.none() | st.from_regex(r"[a-z_][a-z0-9_-]{0,10}", fullmatch=True)


@given(HOSTS, USERS, st.none() | st.integers(1, 65535))
def test_an_ssh_target_survives_being_written_and_read(host: str, user: str | None, port: int | None) -> None:
    target = SshTarget(host, user, port)
    assert inventory.parse_ssh_target(str(target)) == target


@given(st.text(max_size=60))
def test_any_text_is_either_a_lab_file_or_an_error_with_a_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("labs") / "a.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    problem = ""
    try:
        inventory.load_file(path)
    except InventoryError as error:
        problem = str(error)
    assert problem == "" or problem.startswith(f"{path}:")


@pytest.mark.parametrize(
    ("drivers", "message"),
    [
        (
            "power: {driver: redfish, url: 'http://bmc-1', credentials_env: X}",
            "http would send the password in the clear",
        ),
        (
            "power: {driver: ipmi, address: a, credentials_env: X, cipher_suite: 0}",
            "cipher_suite 0 protects too little",
        ),
        ("power: {driver: ipmi, address: a, credentials_env: X, privilege: root}", "one of: operator, administrator"),
        ("console: {driver: ipmi-sol, address: a}", "needs credentials_env"),
        ("power: {driver: command, on: [a], off: [a]}", "has no 'status'"),
        ("power: {driver: command, on: [a], off: [a], status: a}", "has to be a list"),
    ],
)
def test_the_options_of_power_and_console_are_checked(tmp_path: Path, drivers: str, message: str) -> None:
    write(tmp_path, f"host:\n  name: a\n  ssh: a\n  {drivers}\n")
    with pytest.raises(InventoryError) as error:
        inventory.load(tmp_path)
    assert message in str(error.value)


def test_on_and_off_are_commands_although_yaml_takes_them_for_true_and_false(tmp_path: Path) -> None:
    write(tmp_path, "host: {name: a, ssh: a, power: {driver: command, on: [x], off: [y], status: [z]}}\n")
    power = inventory.load(tmp_path).host("a").power
    assert power == Driver("command", {"on": ("x",), "off": ("y",), "status": ("z",)})


def test_a_ca_is_found_beside_its_lab_file_and_a_tunnel_needs_no_tls(tmp_path: Path) -> None:
    options = "credentials_env: X"
    write(tmp_path, f"host: {{name: a, ssh: a, power: {{driver: redfish, url: 'https://b', ca: ca.pem, {options}}}}}\n")
    write(
        tmp_path, f"host: {{name: b, ssh: b, power: {{driver: redfish, url: 'http://[::1]:8', {options}}}}}\n", "b.yaml"
    )
    power = inventory.load(tmp_path).host("a").power
    assert power is not None
    assert power.options["ca"] == str(tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("power", "console", "expected"),
    [
        ("{driver: ipmi, address: a, port: 6, cipher_suite: 3, credentials_env: X}", "{driver: ipmi-sol}",
         {"address": "a", "port": 6, "cipher_suite": 3, "credentials_env": "X"}),
        ("{driver: ipmi, address: a, credentials_env: X}", "{driver: ipmi-sol, address: b, credentials_env: Y}",
         {"address": "b", "credentials_env": "Y"}),
        ("{driver: redfish, url: 'https://a', credentials_env: X}", "{driver: ipmi-sol, address: a}",
         {"address": "a", "credentials_env": "X"}),
    ],
)  # fmt: skip
def test_serial_over_lan_takes_from_power_what_it_does_not_say(
    tmp_path: Path, power: str, console: str, expected: dict[str, object]
) -> None:
    write(tmp_path, f"host: {{name: a, ssh: a, power: {power}, console: {console}}}\n")
    assert inventory.sol_options(inventory.load(tmp_path).host("a")) == expected
