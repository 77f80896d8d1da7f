"""study.compare compares two commands. The other modules are experiments."""
