"""Where things are in a payload's memory: the same addresses as in `boot.S` and `tdx.inc`."""

from typing import Final

PAGE_SIZE: Final = 4096
IMAGE_GPA: Final = 0xFFFF_0000
IMAGE_BYTES: Final = 0x1_0000
RESET_VECTOR: Final = 0xFFFF_FFF0
PARAMETERS_GPA: Final = 0xFFFF_3000
STACKS_GPA: Final = 0xFFFF_4000
STACK_BYTES: Final = 512
MAX_VCPUS: Final = 16
DATA_GPA: Final = 0xFFFF_8000
CODE_GPA: Final = 0xFFFF_A000
SHARED_ALIAS: Final = 1 << 32
"""Added to a guest-virtual address below 4 GiB: the same page through the shared bit."""

PORT_SUCCESS: Final = 0x30
PORT_TEST: Final = 0x31
PORT_FAILURE: Final = 0x32

FAILED_CHECK: Final = 0x0BAD_0000
"""A payload's failed check number n reports this plus n."""
UNHANDLED_EXCEPTION: Final = 0xEC00_0000
"""An exception that no handler takes reports this plus its vector."""
