"""What sources share: files on disks and hubs, rows, archives, columns, conditions.

Read `row_ranges` first: the rule that no row is ever taken twice.
"""
