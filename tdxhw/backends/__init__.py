"""Where a run can happen. `select` is the only place that decides; `sim` is the only file that knows a simulator."""
