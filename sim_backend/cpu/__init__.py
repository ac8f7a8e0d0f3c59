"""How a guest's instructions run: engine, paging, event delivery."""
