"""`python -m mmvit`, and so `accelerate launch -m mmvit`, is the `mmvit` program."""

from mmvit.cli import main

if __name__ == "__main__":
    main()
