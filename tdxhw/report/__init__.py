"""Results for people and for CI: one model, and one file per format."""
