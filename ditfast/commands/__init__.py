"""The commands of ``ditfast``, one a file: HELP, EXAMPLES, ``add_arguments`` and ``run``, which returns the exit status."""
