"""Runs on a cluster, over the job server of its head: submitted, watched and stopped from anywhere."""
