"""What makes the method a course: command line, runs, sweeps, figures, exercises."""
