"""study.compare compares two commands. The other modules are experiments, or print results."""
