"""Job specs and the files that start a job."""
