"""The dialect of the lkml series of November 2023, version 17, where it differs from mainline."""
