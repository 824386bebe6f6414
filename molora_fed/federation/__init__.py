"""Flower apps, mailboxes, workers and the supervisors around them."""
