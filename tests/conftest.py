"""What holds for every test of the project."""

from hypothesis import HealthCheck, settings

# The gate runs on small shared machines: how long an example takes there says nothing about the code.
settings.register_profile("gate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gate")
