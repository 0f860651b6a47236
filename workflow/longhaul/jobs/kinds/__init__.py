"""One module per job kind (or per few that belong together); longhaul.jobs.job_kind finds them here."""
