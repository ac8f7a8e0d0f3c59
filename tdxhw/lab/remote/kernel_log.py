"""Print the kernel log of this host, and go on as it grows. Usage: ``kernel_log.py BOOT_ID SEQUENCE``.

Begins after record SEQUENCE if the host is still in boot BOOT_ID, else with the first. One record a line:
``BOOT_ID SEQUENCE AGE_S TEXT``, TEXT as printk shows it on a console. AGE_S saves comparing clocks.
"""

from __future__ import annotations

import errno
import os
import sys
import time


def main() -> int:
    """Read /dev/kmsg, one record a read(2), until somebody ends us."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
        boot_id = file.read().strip()
    known = int(sys.argv[2]) if sys.argv[1] == boot_id else -1
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        print("/dev/kmsg: %s" % error.strerror, file=sys.stderr)  # noqa: T201, UP031
        return 1
    while True:
        try:
            record = os.read(fd, 1 << 16).decode("utf-8", "replace")
        except OSError as error:
            if error.errno == errno.EPIPE:  # overwritten before we came to it; the next read finds the oldest
                continue
            raise
        head, _, text = record.partition(";")
        fields = head.split(",")  # level, sequence, microseconds, flags, ...
        sequence, microseconds = int(fields[1]), int(fields[2])
        if sequence <= known:
            continue
        caller = next((field[7:] for field in fields[3:] if field.startswith("caller=")), "")
        stamp = "[%5d.%06d]%s" % (microseconds // 10**6, microseconds % 10**6, caller and "[%6s]" % caller)  # noqa: UP031
        age_s = time.clock_gettime(time.CLOCK_MONOTONIC) - microseconds / 1e6
        line = text.split("\n", 1)[0]  # further lines are about the device
        sys.stdout.write("%s %d %.6f %s %s\n" % (boot_id, sequence, max(0.0, age_s), stamp, line))  # noqa: UP031
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
