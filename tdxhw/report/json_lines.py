"""JSON lines: one result a line, with everything in it. `tdxhw compare` and `tdxhw report` read it back."""

import json

from tdxhw.report.results import Results


def render(results: Results) -> str:
    """Return one line of JSON per result."""
    return "".join(json.dumps(result.to_json(), sort_keys=True) + "\n" for result in results.results)
