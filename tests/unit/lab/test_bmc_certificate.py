"""A BMC with a certificate as it comes from the factory: signed by nobody, for a name that nobody uses."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tdxhw.lab import inventory
from tdxhw.lab.credentials import Credentials
from tdxhw.lab.errors import InventoryError, PowerFailed
from tdxhw.lab.power.redfish import RedfishSwitch
from tdxhw.lab.power.switch import State
from tests.unit.lab.redfish_service import PASSWORD, USER, Service

CREDENTIALS = Credentials(USER, PASSWORD, "BMC")
OTHER = "ab" * 32


def make_certificate(path: Path) -> str:
    """Write key and certificate; return the certificate's fingerprint as a BMC shows it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "idrac-SVCTAG.example")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


@pytest.fixture
def fingerprint(tmp_path: Path) -> str:
    return make_certificate(tmp_path / "bmc.pem")


@pytest.fixture
def service(tmp_path: Path, fingerprint: str) -> Iterator[Service]:
    service = Service()
    service.show(tmp_path / "bmc.pem")
    with service:
        yield service


def digits(fingerprint: str) -> str:
    return fingerprint.replace(":", "").lower()


def test_it_is_refused_and_the_error_shows_what_it_would_be_known_by(service: Service, fingerprint: str) -> None:
    switch = RedfishSwitch({"url": service.url}, CREDENTIALS)
    with pytest.raises(PowerFailed, match=r"not trusted \(self-signed certificate") as error, switch.connect():
        pass
    assert f"if its own page shows this one, fingerprint: '{fingerprint}'" in str(error.value)
    assert service.seen == [], "nothing was sent to it, no password either"


def test_with_its_fingerprint_it_is_spoken_with(service: Service, fingerprint: str) -> None:
    switch = RedfishSwitch({"url": service.url, "fingerprint": digits(fingerprint)}, CREDENTIALS)
    with switch.connect() as buttons:
        assert buttons.state() is State.OFF


@pytest.mark.filterwarnings("error")
def test_no_other_certificate_will_do_then(service: Service, fingerprint: str) -> None:
    switch = RedfishSwitch({"url": service.url, "fingerprint": OTHER}, CREDENTIALS)
    with pytest.raises(PowerFailed, match="not the one of fingerprint") as error, switch.connect():
        pass
    assert fingerprint in str(error.value)
    assert service.seen == []


def test_a_lab_file_has_it_as_openssl_shows_it(tmp_path: Path, fingerprint: str) -> None:
    text = (
        "host: {{name: a, ssh: a, power: {{driver: redfish, url: 'https://b', credentials_env: B, fingerprint: {}}}}}\n"
    )
    (tmp_path / "a.yaml").write_text(text.format(f"'{fingerprint}'"))
    found = inventory.load(tmp_path).host("a").power
    assert found is not None
    assert found.options["fingerprint"] == digits(fingerprint)
    (tmp_path / "a.yaml").write_text(text.format("'AB:CD'"))
    with pytest.raises(InventoryError, match=r"a\.yaml:1.*64 hexadecimal digits"):
        inventory.load(tmp_path)
