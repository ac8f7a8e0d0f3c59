"""What the model does not know it says by name."""

from uapi_ctypes.errors import BackendLimit


class NotModelled(BackendLimit):
    """The module would do something here that the model does not: never a made-up answer instead."""

    def __init__(self, what: str) -> None:
        super().__init__(f"not modelled: {what}")
        self.what = what
