"""The suites that `tdxhw run` runs. They use fixtures only: nothing here knows whether the kernel is real."""
