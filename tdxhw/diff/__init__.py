"""`tdxhw diff`: the calls that suites make, recorded on two kernels and compared call by call.

`recording_kernel` sees the calls, `names` and `fields` write them down without what belongs to one process, `recording`
is the file, `rules` says what belongs to one machine, `compare` compares and `report` shows it.
"""
