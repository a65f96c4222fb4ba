"""What a run holds while it lasts: a Ray session, the database's lease, the process's memory."""
