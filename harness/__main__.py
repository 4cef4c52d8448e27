"""`python -m harness`, which `accelerate launch -m harness …` runs on every rank."""

from harness.cli import main

main()
