"""Run the benchmarks and print a table: figure, ours, bound or peer, ratio, target."""

import sys

from rich.console import Console
from rich.table import Table

from bench import guest_code, simulated_kvm, tdx_module
from bench.measure import Figure
from tdxhw.backends.sim import SimHost


def figures() -> list[Figure]:
    """Measure everything; what needs the real /dev/kvm is left out, and said, where there is none."""
    found: list[Figure] = []
    console = Console(stderr=True)
    sim = SimHost("mainline")
    real = simulated_kvm.real_kvm()
    try:
        if real is None:
            console.print("no usable /dev/kvm: the figures against the real kernel are left out")
        else:
            for with_real in simulated_kvm.WITH_REAL:
                console.print(f"measuring {with_real.__name__} ...")
                found += with_real(sim, real)
        for sim_only in (*simulated_kvm.SIM_ONLY, guest_code.integer_loop):
            console.print(f"measuring {sim_only.__name__} ...")
            found += sim_only(sim)
    finally:
        sim.close()
    for alone in (tdx_module.replay_rate, tdx_module.measured_page_build, tdx_module.big_host):
        console.print(f"measuring {alone.__name__} ...")
        found += alone()
    return found


def main() -> int:
    """Print the table; exit 0 when every target is met, 1 otherwise."""
    found = figures()
    table = Table("figure", "ours", "bound or peer", "ratio", "target", "", box=None)
    for figure in found:
        table.add_row(
            figure.name,
            figure.ours,
            figure.peer,
            f"{figure.ratio:.2f}",
            f"{figure.sense} {figure.target:g}",
            "met" if figure.met else "MISSED",
        )
    Console(width=140).print(table)
    return 0 if all(figure.met for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
