"""Whether a BMC is the one that was meant: by who signed its certificate, or by the certificate's own fingerprint.

What BMCs have from the factory nobody signed, and it is for no name that anybody uses. Its fingerprint, compared once
with what the BMC's own page shows, tells them apart all the same.
"""

import hashlib
import re
import socket
import ssl
from typing import Any, Final
from urllib.parse import urlsplit

from requests.adapters import HTTPAdapter
from sushy import connector

_HTTPS: Final = 443
_WHY: Final = re.compile(r"certificate verify failed: (.*?)(?: \(_ssl|$)")
_OTHER: Final = re.compile(r'Fingerprints did not match\. Expected "\w+", got "(\w+)"')


class _Pinned(HTTPAdapter):
    """Speaks only with whoever shows one certificate; who signed it, and for which name, is not asked."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Have every connection checked."""
        super().init_poolmanager(*arguments, assert_fingerprint=self._fingerprint, **options)


class Wire(connector.Connector):  # type: ignore[misc]
    """A connection to a Redfish service: `ca` is a file, empty for the system's; `fingerprint` counts instead of it.

    `fingerprint` is the SHA-256 of the whole certificate in 64 hexadecimal digits.
    """

    def __init__(self, url: str, *, ca: str, fingerprint: str, answer_s: float, connect_s: float) -> None:
        # One try each: whether and when to try again is decided one level up.
        super().__init__(
            url, verify=not fingerprint and (ca or True), server_side_retries=1, default_request_timeout=answer_s,
            connect_timeout=connect_s,
        )  # fmt: skip
        if fingerprint:
            self._session.mount("https://", _Pinned(fingerprint))


def shown(fingerprint: str) -> str:
    """Return a fingerprint as openssl and BMCs show it: ``AB:CD:…``."""
    return ":".join(fingerprint[at : at + 2] for at in range(0, len(fingerprint), 2)).upper()


def fingerprint_of(url: str, limit_s: float) -> str:
    """Return the fingerprint of the certificate that is shown there, whoever it is; nothing if none is."""
    parts = urlsplit(url)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or _HTTPS), limit_s) as line,
            context.wrap_socket(line) as tls,
        ):
            return hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
    except OSError:
        return ""


def refusal(said: str, url: str, limit_s: float) -> str:
    """Say in one line why a certificate was refused, and what to do; `said` is the TLS library's message."""
    if other := _OTHER.search(said):
        return (
            f"its certificate is not the one of fingerprint: but {shown(other[1])}: it is somebody else's machine, or "
            "the BMC has a new one"
        )
    found = _WHY.search(said)
    why = found[1] if found else "TLS failed"
    remedy = "name the CA that signed it with ca: FILE"
    if "mismatch" in why or "is not valid for" in why:
        remedy = "url: has to say a name that is in it"
    elif "expired" in why or "not yet valid" in why:
        remedy = "renew it on the BMC, or set the clock of this machine right"
    if fingerprint := fingerprint_of(url, limit_s):
        remedy += f", or, if its own page shows this one, fingerprint: '{shown(fingerprint)}'"
    return f"its certificate is not trusted ({why}): {remedy}"
