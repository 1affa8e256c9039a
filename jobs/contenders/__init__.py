"""What distrain is measured against, each run as a process of its own: `python -m jobs.contenders.NAME SPEC`."""
