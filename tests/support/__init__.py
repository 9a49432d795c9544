"""What several tests share: tables, goldens, faults, processes."""
