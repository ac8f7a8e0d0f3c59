"""``tdxhw abi``: can this kernel build run TDs, and does the binding fit it? Without booting it."""
