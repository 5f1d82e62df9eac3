"""The command line: one file per command, all through `kvfold.cli.app`."""
