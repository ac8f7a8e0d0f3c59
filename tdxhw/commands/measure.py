"""``tdxhw measure``: predict the MRTD of a TDVF firmware image."""

import json
from pathlib import Path
from typing import Final

import click

from tdxhw.errors import BackendUnavailable, MeasureError
from tdxhw.measure import Order, mrtd, steps
from tdxhw.tdvf import Section, parse

_ORDERS: Final = [order.value for order in Order]
_LARGEST_IMAGE: Final = 256 << 20
"""Far above any firmware [bytes]; of a disk image or a device given by mistake no more is read."""


@click.command(short_help="Predict the MRTD of a TDVF firmware image.")
@click.argument("firmware", type=click.Path(path_type=Path))
@click.option(
    "--order", "order_name", type=click.Choice(_ORDERS), default=Order.PAGE_BY_PAGE.value, show_default=True,
    help="How the VMM adds and measures: each page at once, as KVM does, or all pages of a section first.",
)  # fmt: skip
@click.option("--module", default="1.5.01", show_default=True, metavar="PROFILE", help="TDX module to build it on.")
@click.option("--no-model", is_flag=True, help="Hash only; by default the TD is built on the module model as well.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def measure(firmware: Path, order_name: str, module: str, no_model: bool, as_json: bool) -> None:
    """Predict MRTD, the measurement of a TD that starts from FIRMWARE.

    The sections of the image's TDVF metadata are added in their order. MRTD is hashed, and computed once more by
    building a TD on the TDX module model; both must agree.
    """
    image = _read(firmware)
    try:
        sections = parse(image)
    except MeasureError as error:
        raise MeasureError(f"{firmware}: {error}") from None
    order = Order(order_name)
    digest = mrtd(sections, order)
    checked = "no"
    if not no_model:
        checked = _check_on_model(sections, order, module, digest)
    if as_json:
        click.echo(json.dumps(_as_json(firmware, order, digest, checked, sections), indent=1))
        return
    for section in sections:
        click.echo(f"{section.type.name:<14} {section.gpa:#12x} {section.size:#10x} bytes  {_what_happens(section)}")
    click.echo(f"order          {order.value}")
    click.echo(f"checked        {checked}")
    click.echo(f"MRTD           {digest.hex()}")


def _read(firmware: Path) -> bytes:
    try:
        with firmware.open("rb") as file:  # a pipe or a device has no size to ask for
            image = file.read(_LARGEST_IMAGE + 1)
    except OSError as error:
        raise MeasureError(f"{firmware}: {error.strerror}") from None
    if len(image) > _LARGEST_IMAGE:
        raise MeasureError(f"{firmware}: larger than any firmware image")
    return image


def _check_on_model(sections: list[Section], order: Order, module: str, digest: bytes) -> str:
    """Build the TD and compare. Raise `MeasureError` on a difference: then neither figure can be believed."""
    from tdxhw.backends.sim import mrtd_on_model

    pages = sum(section.pages for section in sections if section.is_added)
    try:
        built = mrtd_on_model(steps(sections, order), pages, module)
    except BackendUnavailable as error:
        return f"no ({error})"
    if built != digest:
        raise MeasureError(f"the TDX module model measures {built.hex()}, hashing gives {digest.hex()}: a bug in tdxhw")
    return f"built on the model of TDX module {module}"


def _what_happens(section: Section) -> str:
    if not section.is_added:
        return "accepted by the guest"
    return "added, measured" if section.is_measured else "added"


def _as_json(firmware: Path, order: Order, digest: bytes, checked: str, sections: list[Section]) -> dict[str, object]:
    return {
        "firmware": str(firmware),
        "order": order.value,
        "mrtd": digest.hex(),
        "checked": checked,
        "sections": [
            {
                "type": section.type.name,
                "gpa": section.gpa,
                "size": section.size,
                "added": section.is_added,
                "measured": section.is_measured,
            }
            for section in sections
        ],
    }
