"""Alarms on series of real runs: silent on a healthy one, loud on one that goes wrong, and once an episode."""
