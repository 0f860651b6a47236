"""One module per job kind (or per few that belong together); longhaul.jobs.kind finds them here."""
