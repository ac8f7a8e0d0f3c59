"""What the module does with each VM exit of a TD."""
