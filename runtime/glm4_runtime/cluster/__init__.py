"""Runs one bundle on many replicas, and moves requests from a replica that died to another one."""
