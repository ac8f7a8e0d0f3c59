"""How a leaf gives up."""


class LeafError(Exception):
    """A check of a leaf failed: `rax` is the completion status. Only dispatch.py catches it."""

    def __init__(self, status: int, detail: int = 0) -> None:
        """`status` is RAX[63:32], `detail` RAX[31:0]: an operand id, an MSR address, packed bytes."""
        self.rax = int(status) << 32 | int(detail)

    def __str__(self) -> str:
        """Hexadecimal: decoding is the binding's job."""
        return f"{self.rax:#018x}"


class SimBug(Exception):  # noqa: N818  (not an error of anybody's input: an invariant of ours broke)
    """An invariant of the model broke: our bug, never a guest's or a host's."""
