"""``tdxhw decode``: what a completion status of the TDX module says, in words."""

import json

import click

from tdxhw.errors import HarnessError
from uapi_ctypes.tdx_status import describe, explain

_HIGHEST = (1 << 64) - 1


def parse_status(text: str) -> int:
    """Read a 64-bit status, hexadecimal with 0x or decimal. Raise `HarnessError` on anything else."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= _HIGHEST:
        raise HarnessError(f"{text!r} is no 64-bit status; give it as 0xc000010000000045 or in decimal")
    return value


@click.command(short_help="Say what a SEAMCALL or TDCALL status means.")
@click.argument("status", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def decode(status: tuple[str, ...], as_json: bool) -> None:
    """Say what each STATUS means (hexadecimal or decimal).

    RAX after SEAMCALL or TDCALL, `hw_error` of an ioctl, or R10 after TDG.VP.VMCALL.

    \b
    $ tdxhw decode 0xc000010000000045
    0xc000010000000045  OPERAND_INVALID(CPUID_CONFIG)
    """  # noqa: D301 (click's mark for verbatim text)
    values = [parse_status(text) for text in status]
    if as_json:
        readings = [
            {"value": f"{value:#018x}", "text": describe(value), "readings": explain(value)[:-1]} for value in values
        ]
        click.echo(json.dumps(readings, indent=1))
        return
    for value in values:
        click.echo(f"{value:#018x}  {describe(value)}")
        for line in explain(value):
            click.echo(f"    {line}")
