"""`python -m data_tools` is `mmvit-data`."""

from data_tools.cli.app import main

main()
