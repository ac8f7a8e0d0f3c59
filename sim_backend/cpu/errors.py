"""What an engine may fail with. None of these is a guest's fault.

::

    RuntimeError
    └─ EngineError               the engine cannot go on
       ├─ EngineSelfTestError    an assumption about Unicorn does not hold: wrong version or build
       └─ UnsupportedInstruction the modelled CPU has the instruction, this engine has not
"""


class EngineError(RuntimeError):
    """The engine cannot go on: a broken installation, or our bug."""


class EngineSelfTestError(EngineError):
    """An assumption about the engine's internals does not hold."""


class UnsupportedInstruction(EngineError):  # noqa: N818 - the architecture's name
    """The guest executes an instruction that the modelled CPU has but this engine cannot execute."""

    def __init__(self, rip: int, code: bytes, name: str) -> None:
        super().__init__(f"the CPU engine cannot execute {name} at RIP {rip:#x}: bytes {code.hex(' ')}")
        self.rip = rip
        self.code = code
