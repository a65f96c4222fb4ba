"""Links to pictures: every link ends as a record or as a reject with its reason.

Read `download_links` first, then `fetch`.
"""
