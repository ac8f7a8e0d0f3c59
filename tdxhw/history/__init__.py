"""The results of all runs, kept: an SQLite file by default, a PostgreSQL URL where a team outgrows it."""
