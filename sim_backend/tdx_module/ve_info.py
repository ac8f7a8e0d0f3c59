"""VE_INFO: what a guest asks for after a #VE, and whether it may get another.

Spec: TDX Module Base Spec, "Virtualization Exception (#VE)"; ABI Reference, TDG.VP.VEINFO.GET.
"""

from typing import Final

VE_INFO_VALID: Final = 0xFFFF_FFFF


class VeInfo:
    """The #VE information area of one vCPU; `valid` is 0 once the guest has read it."""

    __slots__ = (
        "eptp_index",
        "exit_qualification",
        "exit_reason",
        "gla",
        "gpa",
        "instruction_information",
        "instruction_length",
        "valid",
    )

    def __init__(self) -> None:
        self.exit_reason = 0
        self.valid = 0
        self.exit_qualification = 0
        self.gla = 0
        self.gpa = 0
        self.eptp_index = 0
        self.instruction_length = 0  # [bytes]
        self.instruction_information = 0

    def set(self, reason: int, qualification: int, gla: int, gpa: int) -> None:
        """Store the architectural part, as the CPU does; the area must be free."""
        self.exit_reason = reason
        self.exit_qualification = qualification
        self.gla = gla
        self.gpa = gpa
        self.eptp_index = 0
        self.valid = VE_INFO_VALID
