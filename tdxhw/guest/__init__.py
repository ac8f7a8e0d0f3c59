"""Guest payloads: machine code sources, layout, boot stub."""
