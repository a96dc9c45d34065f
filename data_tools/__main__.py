"""Runs `mmvit-data` as `python -m data_tools`."""

from data_tools.cli.app import main

main()
