"""``python -m neurolib``: the command for torchrun, or where its script is not on the path."""

from neurolib.course.cli import main

main()
