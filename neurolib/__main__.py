"""``python -m neurolib``: the command, for torchrun or if its script is not on the path."""

from neurolib.course.cli import main

main()
