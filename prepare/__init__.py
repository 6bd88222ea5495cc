"""Raw downloads to training layouts, and demo data that needs no download: `python -m prepare --help`."""
