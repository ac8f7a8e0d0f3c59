"""The readiness of a host: facts are gathered once, and every check is a pure function over them."""
