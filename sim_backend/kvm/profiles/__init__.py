"""Host profiles, one YAML file each."""
