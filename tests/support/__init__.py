"""Helpers that several tests share: tables, goldens, faults, processes."""
