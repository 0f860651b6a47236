"""python -m longhaul: how launch scripts start every job, so that the mounted checkout is what runs."""

from longhaul.cli import main

main()
