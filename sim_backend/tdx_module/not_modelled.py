"""What the model does not know it says by name."""


class NotModelled(Exception):  # noqa: N818  (nobody erred)
    """The module would do something here that the model does not: never a made-up answer instead."""

    def __init__(self, what: str) -> None:
        super().__init__(f"not modelled: {what}")
        self.what = what
