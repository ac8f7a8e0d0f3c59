"""One file per subcommand of `tdxhw`."""
